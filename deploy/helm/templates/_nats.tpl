{{/* Four fifths of the volume. */}}
{{- define "forebay.natsMaxStore" -}}
{{- with .Values.nats.maxStore }}{{ . }}{{ else -}}
{{- $size := .Values.nats.storage -}}
{{- $all := mul (regexFind "^[0-9]+" $size | int64) (get (dict "M" 1 "G" 1000 "T" 1000000) (regexFind "[MGT]" $size)) -}}
{{- $part := div (mul 4 $all) 5 -}}
{{ if mod $part 1000 }}{{ $part }}MB{{ else }}{{ div $part 1000 }}GB{{ end }}
{{- end }}
{{- end }}

{{- define "forebay.natsSite" -}}
# The settings for Kubernetes. forebay.conf of deploy/nats includes this file. The public keys of the roles (ADMIN_KEY,
# API_KEY, ...) come from the environment.

server_name: $SERVER_NAME
port: 4222
http_port: 8222
pid_file: "/run/nats/nats.pid"
STORE: "/data"
MAX_STORE: {{ include "forebay.natsMaxStore" . }}             # below the size of the volume, so that JetStream refuses messages before the disk is full

tls: {
    cert_file: "/etc/nats-tls/tls.crt"
    key_file: "/etc/nats-tls/tls.key"
    timeout: 5
}

include "./cluster.conf"
{{- end }}

{{- define "forebay.natsCluster" -}}
{{- if gt (int .Values.nats.replicas) 1 -}}
cluster {
  name: forebay
  port: 6222
  # Clients use the Service, because no certificate has the addresses of pods.
  no_advertise: true
  routes: [
    {{- range until (int .Values.nats.replicas) }}
    "nats://nats-{{ . }}.nats-headless:6222"
    {{- end }}
  ]
  # Only servers with a certificate of this authority may join.
  tls {
    cert_file: "/etc/nats-tls/tls.crt"
    key_file: "/etc/nats-tls/tls.key"
    ca_file: "/etc/nats-tls/ca.crt"
    verify: true
  }
}
{{- else -}}
# One server needs no cluster.
{{- end }}
{{- end }}
