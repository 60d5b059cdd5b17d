{{/* Of the container that computes the model. */}}
{{- define "forebay.resources" -}}
{{- with .resources }}{{ toYaml . }}{{ else -}}
{{- $gpu := .onGpu | ternary "nvidia.com/gpu: \"1\"" "" -}}
requests: {cpu: {{ .onGpu | ternary "2" "1" | quote }}, memory: {{ int .memoryGiB }}Gi{{ with $gpu }}, {{ . }}{{ end }}}
limits: {memory: {{ add .memoryGiB (max 2 (div .memoryGiB 2)) }}Gi{{ with $gpu }}, {{ . }}{{ end }}}
{{- end }}
{{- end }}

{{/* An inference server beside the worker: (list ROOT KEY MODEL). */}}
{{- define "forebay.engine" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- $model := index . 2 -}}
{{- $image := get $root.Values.images (and $model.onGpu (eq $model.engine "llamacpp") | ternary "llamacppCuda" $model.engine) -}}
# Fetches the model into the volume, so that the server needs no network and no token.
- name: fetch
  image: {{ include "forebay.image" (list $root $root.Values.images.inference $model.image) | quote }}
  imagePullPolicy: IfNotPresent
  args: [fetch, --link, /tmp/model]
  envFrom:
    - configMapRef:
        name: queue-config
    - configMapRef:
        name: inference-config-{{ $key }}
  env:
    - {name: HF_TOKEN_PATH, value: /etc/forebay/hub/token}
    {{- with $model.env }}{{ toYaml . | nindent 4 }}{{ end }}
  resources:
    requests: {cpu: "1", memory: 1Gi}
    limits: {memory: 4Gi}
  securityContext: {{- include "forebay.securityContext" $root | nindent 4 }}
  volumeMounts:
    - {name: engine, mountPath: /tmp}
    - {name: models, mountPath: /var/lib/forebay}
    - {name: hub, mountPath: /etc/forebay/hub, readOnly: true}
# A sidecar: Kubernetes stops it after the worker, which needs it until its drain has ended.
- name: engine
  image: {{ $image | quote }}
  restartPolicy: Always
  imagePullPolicy: IfNotPresent
  command: [sh, -c]
  args:
    - {{ include "forebay.engineCommand" $model | trim | quote }}
  env:
    # The image has no user of this id. Caches are made in its home, and PyTorch asks for its name.
    - {name: HOME, value: /tmp}
    - {name: USER, value: forebay}
    - {name: HF_HUB_OFFLINE, value: "1"}
    - {name: DO_NOT_TRACK, value: "1"}
    {{- with $model.env }}{{ toYaml . | nindent 4 }}{{ end }}
  # It listens on 127.0.0.1 alone, so the kubelet asks from inside. The worker starts after the first success,
  # for which the server has an hour.
  startupProbe:
    exec: {command: [curl, -sf, "http://127.0.0.1:8000/health"]}
    periodSeconds: 10
    timeoutSeconds: 25
    failureThreshold: 360
  # SGLang computes a token for each question. No readiness probe: the worker is ready when the server is.
  livenessProbe:
    exec: {command: [curl, -sf, "http://127.0.0.1:8000/health"]}
    periodSeconds: 30
    timeoutSeconds: 25
    failureThreshold: 4
  resources: {{- include "forebay.resources" $model | nindent 4 }}
  securityContext: {{- include "forebay.securityContext" $root | nindent 4 }}
  volumeMounts:
    - {name: engine, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    - {name: models, mountPath: /var/lib/forebay, readOnly: true}
{{- end }}

{{/* The command of the components of deploy/kubernetes, with the slots and options of the model. */}}
{{- define "forebay.engineCommand" -}}
{{- $pools := has .task (list "embed" "rerank") -}}
{{- $dtype := "--dtype \"$(python3 -c 'import json; c = json.load(open(\"/tmp/model/config.json\")); print(c.get(\"dtype\") or c.get(\"torch_dtype\") or \"float32\")')\"" -}}
{{- if eq .engine "vllm" -}}
exec vllm serve /tmp/model --host 127.0.0.1 --port 8000 --max-num-seqs {{ .slots }} --max-model-len auto
{{- if $pools }} --runner pooling {{ $dtype }}
{{- else }} --generation-config vllm --structured-outputs-config.backend guidance --enable-prompt-tokens-details
{{- end }} --disable-uvicorn-access-log
{{- else if eq .engine "sglang" -}}
exec python3 -m sglang.launch_server --model-path /tmp/model --host 127.0.0.1 --port 8000 --max-running-requests {{ .slots }}
{{- if $pools }} --enable-metrics --is-embedding {{ $dtype }}
{{- else }} --grammar-backend llguidance --enable-metrics --incremental-streaming-output
{{- end }}
{{- else -}}
exec /app/llama-server --model /tmp/model --host 127.0.0.1 --port 8000 --parallel {{ .slots }} --metrics --cache-ram 512
{{- with get (dict "embed" "--embedding" "rerank" "--reranking") .task }} {{ . }}{{ end }}
{{- end }}
{{- with .engineOptions }} {{ . }}{{ end }}
{{- end }}
