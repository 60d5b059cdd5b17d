{{- define "forebay.labels" -}}
app.kubernetes.io/part-of: forebay
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image of Forebay: (list ROOT NAME VARIANT). The api's has no variant in its tag. */}}
{{- define "forebay.image" -}}
{{- $root := index . 0 -}}
{{- $variant := index . 2 -}}
{{- with $root.Values.images.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ index . 1 }}:{{ $root.Values.images.tag | default (replace "+" "_" $root.Chart.AppVersion) }}{{ if ne $variant "api" }}-{{ $variant }}{{ end }}
{{- with get $root.Values.images.digests $variant }}@{{ . }}{{ end }}
{{- end }}

{{/* The models with all defaults, and what follows from them: `served`, the name for clients; `consumer`, its name on
NATS (names.model_token); `image`, the variant of the worker's; `onGpu`; `workers`; `concurrent`,
MAX_CONCURRENT_REQUESTS. */}}
{{- define "forebay.models" -}}
{{- if not .Values.models }}
{{- fail "\n\nmodels is empty. Make an entry with: forebay plan --gpu-memory 24GiB --model ID --helm-values > model.yaml\nand give it to helm with: -f model.yaml" }}
{{- end }}
{{- $models := dict }}
{{- $keys := dict }}
{{- range $key, $given := .Values.models }}
{{- if and $given.gpus $given.workers }}
{{- fail (printf "models.%s: gpus is the number of workers too: give gpus or workers" $key) }}
{{- end }}
{{- $one := merge (dict) $given (dict "gpus" 0 "workers" 1 "slots" 1 "queue" 100 "memoryGiB" 2 "engine" "transformers" "engineOptions" "" "task" "auto" "settings" dict) }}
{{- $served := dig "MODEL_NAME" "" $one.settings | default (regexMatch `^(/|\.\.?/|~)|\.gguf$` $one.model | ternary (base $one.model | trimSuffix ".gguf") $one.model) }}
{{- $workers := $one.gpus | default $one.workers | int }}
{{- $onGpu := gt (int $one.gpus) 0 }}
{{- $image := has $one.engine (list "vllm" "sglang" "llamacpp") | ternary "served" ($onGpu | ternary "cuda" "cpu") }}
{{- $consumer := regexReplaceAll "[^A-Za-z0-9_]+" $served "-" | trimAll "-" | default "model" }}
{{- with get $keys $consumer }}
{{- fail (printf "models.%s and models.%s have the same consumer on NATS, %s: give one of them another MODEL_NAME in its settings" . $key $consumer) }}
{{- end }}
{{- $_ := set $keys $consumer $key }}
{{- $derived := dict "served" $served "consumer" $consumer "onGpu" $onGpu "image" $image "workers" $workers "concurrent" (mul $one.slots $workers) }}
{{- $_ := set $models $key (merge $derived $one) }}
{{- end }}
{{- toYaml $models }}
{{- end }}

{{/* The value of a setting. Helm has numbers as floats, and would write a large one as 1e+09. */}}
{{- define "forebay.value" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* The settings of all processes, as a map. */}}
{{- define "forebay.settings" -}}
{{- $nats := .Values.nats }}
{{- $models := include "forebay.models" . | fromYaml }}
{{- $keys := keys $models | sortAlpha }}
{{- $generate := list }}
{{- range $keys }}
{{- $one := get $models . }}
{{- if not (or (has $one.task (list "embed" "rerank")) (eq $one.engine "embedding")) }}{{ $generate = append $generate . }}{{ end }}
{{- end }}
{{- $key := .Values.defaultModel | default (concat $generate $keys | first) }}
{{- $default := get $models $key | required (printf "defaultModel: there is no %s in models" $key) }}
{{- $queue := 0 }}
{{- range $models }}{{ $queue = add $queue (mul .queue .workers) }}{{ end }}
{{- $found := dict
  "NATS_URL" (include "forebay.natsUrl" .)
  "NATS_REPLICAS" $nats.replicas
  "DEFAULT_MODEL" $default.model
  "MAX_CONCURRENT_REQUESTS" $default.concurrent
  "MAX_QUEUE_SIZE" $queue
  "REQUEST_TIMEOUT" .Values.requestTimeout
  "NO_WORKER_POLICY" "wait"
  "LOG_FORMAT" "json" }}
{{- $_ := merge $found (include "forebay.modelNames" $default | fromYaml) }}
{{- if or $nats.enabled $nats.tlsSecret }}{{ $_ := set $found "NATS_TLS_CA" "/etc/forebay/nats/ca.crt" }}{{ end }}
{{- if or $nats.enabled (eq $nats.auth "nkey") }}{{ $_ := set $found "NATS_NKEY_SEED" "/etc/forebay/nats/seed" }}
{{- else if eq $nats.auth "credentials" }}{{ $_ := set $found "NATS_CREDENTIALS" "/etc/forebay/nats/creds" }}
{{- else if eq $nats.auth "certificate" }}{{ $_ := merge $found (dict "NATS_TLS_CERT" "/etc/forebay/nats/tls.crt" "NATS_TLS_KEY" "/etc/forebay/nats/tls.key") }}{{ end }}
{{- range $name, $value := mergeOverwrite $found .Values.settings }}
{{ $name }}: {{ include "forebay.value" $value | quote }}
{{- end }}
{{- end }}

{{/* The address of the chart's NATS or of yours. */}}
{{- define "forebay.natsUrl" -}}
{{- with .Values.nats }}
{{- if not .enabled -}}
{{ required "nats.url is empty: give the address of your NATS, or set nats.enabled" .url }}
{{- else if or .url (ne .auth "nkey") }}
{{- fail "nats.url and nats.auth are for a NATS of yours: set nats.enabled to false too" }}
{{- else if not (and .tlsSecret .keysConfigMap) }}
{{- fail "The chart's NATS needs nats.tlsSecret and nats.keysConfigMap" }}
{{- else -}}
tls://nats.{{ $.Release.Namespace }}.svc:4222
{{- end }}
{{- end }}
{{- end }}

{{/* With `auth: url` the address has a password: (list ROOT ROLE), as a variable of a container, which comes before
those of ConfigMaps. */}}
{{- define "forebay.natsEnv" -}}
{{- $nats := (index . 0).Values.nats -}}
{{- if eq $nats.auth "url" -}}
- {name: NATS_URL, valueFrom: {secretKeyRef: {name: {{ get $nats.secrets (index . 1) | quote }}, key: url}}}
{{- end }}
{{- end }}

{{/* Where a process listens for others. */}}
{{- define "forebay.anyAddress" -}}
{{ eq .Values.ipFamily "IPv6" | ternary "::" "0.0.0.0" }}
{{- end }}

{{/* What the consumer of a model tells of its names, as a map. */}}
{{- define "forebay.modelNames" -}}
{{- toYaml (pick .settings "MODEL_NAME" "MODEL_ALIASES" "MODEL_ADAPTERS") }}
{{- end }}

{{- define "forebay.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "forebay.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Of every pod: (list ROOT PRIORITY_CLASS VALUES), with the values of its component. */}}
{{- define "forebay.pod" -}}
{{- $root := index . 0 -}}
{{- $given := index . 2 -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with hasKey $given "priorityClassName" | ternary $given.priorityClassName (index . 1) }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- range $field := list "runtimeClassName" "nodeSelector" "tolerations" "affinity" }}
{{- with get $given $field }}
{{ $field }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What a role needs to reach NATS: (list ROOT ROLE), as the sources of a projected volume. */}}
{{- define "forebay.natsSources" -}}
{{- $nats := (index . 0).Values.nats -}}
{{- if or $nats.enabled (not (has $nats.auth (list "none" "url"))) }}
- secret:
    name: {{ get $nats.secrets (index . 1) | quote }}
{{- end }}
{{- if or $nats.enabled $nats.tlsSecret }}
- secret:
    name: {{ $nats.tlsSecret | quote }}
    items:
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- end }}

{{- define "forebay.natsMount" -}}
{{- if include "forebay.natsSources" (list . "api") | trim -}}
- {name: nats-client, mountPath: /etc/forebay/nats, readOnly: true}
{{- end }}
{{- end }}

{{- define "forebay.natsVolume" -}}
{{- with include "forebay.natsSources" . | trim -}}
- name: nats-client
  projected:
    defaultMode: 0440
    sources:
      {{- . | nindent 6 }}
{{- end }}
{{- end }}
