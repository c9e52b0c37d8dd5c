{{- define "seamount.name" -}}
{{- .Release.Name | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Of objects that belong to no namespace. */}}
{{- define "seamount.clusterWideName" -}}
{{- printf "%s-%s" .Release.Namespace (include "seamount.name" .) -}}
{{- end -}}

{{/* Not by app.kubernetes.io/name: KubeRay gives its pods one of its own. */}}
{{- define "seamount.selector" -}}
app.kubernetes.io/part-of: seamount
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "seamount.labels" -}}
{{ include "seamount.selector" . }}
app.kubernetes.io/name: seamount
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* image:tag or image@digest; a digest wins. */}}
{{- define "seamount.image" -}}
{{- with .Values.image -}}
{{- if eq .tag "latest" -}}{{- fail "image.tag: latest is another image tomorrow, and two pods must never differ: name a version" -}}{{- end -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "seamount.serviceAccount" -}}
{{- $own := ternary (include "seamount.name" .) "default" .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default $own -}}
{{- end -}}

{{- define "seamount.priorityClass" -}}
{{- printf "%s-%s" (include "seamount.clusterWideName" .root) .class -}}
{{- end -}}

{{- define "seamount.workerTokenSecret" -}}
{{- .Values.auth.workerToken.existingSecret | default (printf "%s-worker-token" (include "seamount.name" .)) -}}
{{- end -}}

{{- define "seamount.apiKeysSecret" -}}
{{- .Values.auth.apiKeys.existingSecret | default (printf "%s-api-keys" (include "seamount.name" .)) -}}
{{- end -}}

{{- define "seamount.redisSecret" -}}
{{- if .Values.redis.external.enabled -}}
{{- required "redis.external.existingSecret: name the secret that holds the password" .Values.redis.external.existingSecret -}}
{{- else -}}
{{- printf "%s-redis" (include "seamount.name" .) -}}
{{- end -}}
{{- end -}}

{{- define "seamount.redisPasswordKey" -}}
{{- ternary .Values.redis.external.passwordKey "password" .Values.redis.external.enabled -}}
{{- end -}}

{{- define "seamount.redisScheme" -}}
{{- ternary "rediss" "redis" (and .Values.redis.external.enabled .Values.redis.external.tls) -}}
{{- end -}}

{{- define "seamount.redisAddress" -}}
{{- if .Values.redis.external.enabled -}}
{{- printf "%s:%v" (required "redis.external.host: name the server" .Values.redis.external.host) .Values.redis.external.port -}}
{{- else -}}
{{- printf "%s-redis:6379" (include "seamount.name" .) -}}
{{- end -}}
{{- end -}}

{{- define "seamount.redisUser" -}}
{{- ternary .Values.redis.external.username "default" .Values.redis.external.enabled -}}
{{- end -}}

{{/* A secret's value that must outlive upgrades: the stored one, else a new random one. Arguments: root, secret, key. */}}
{{- define "seamount.kept" -}}
{{- $stored := lookup "v1" "Secret" .root.Release.Namespace .secret -}}
{{- if and $stored (hasKey $stored.data .key) -}}{{ index $stored.data .key | b64dec }}{{- else -}}{{ randAlphaNum 48 }}{{- end -}}
{{- end -}}

{{/* Seconds that a pod has to be emptied: enough for a gang that waits for the one in its place and hands over. */}}
{{- define "seamount.drainDeadline" -}}
{{- $replacement := dig "draining" "replacement_s" 60 .Values.serving -}}
{{- $handover := dig "draining" "timeout_s" 120 .Values.serving -}}
{{- $least := addf $replacement $handover 10 | ceil | int -}}
{{- if lt (int .Values.drain.deadlineSeconds) $least -}}
{{- fail (printf "drain.deadlineSeconds: %v s are too few: serving.draining lets a gang wait %v s for another and %v s to hand over; give %d or more" .Values.drain.deadlineSeconds $replacement $handover $least) -}}
{{- end -}}
{{- .Values.drain.deadlineSeconds -}}
{{- end -}}

{{/* Seconds after which the old Ray cluster of an upgrade is deleted; the new one's gangs serve by then. */}}
{{- define "seamount.deletionDelay" -}}
{{- $turn := dig "router" "turn_deadline_s" 600 .Values.serving | ceil | int -}}
{{- $least := add $turn .Values.drain.deadlineSeconds -}}
{{- $chosen := int .Values.drain.clusterDeletionDelaySeconds -}}
{{- if and $chosen (lt $chosen (int $least)) -}}
{{- fail (printf "drain.clusterDeletionDelaySeconds: %d s are too few: a turn takes up to %v s, a drain up to %v s; give %v or more, or 0" $chosen $turn .Values.drain.deadlineSeconds $least) -}}
{{- end -}}
{{- $chosen | default $least -}}
{{- end -}}

{{/* Where processes of a pod answer /metrics, by name of the port: as many as the largest pod has ranks. */}}
{{- define "seamount.metricsPorts" -}}
{{- $most := max 1 .Values.pools.decode.ranksPerPod .Values.pools.prefill.ranksPerPod -}}
metrics: 9464
{{- range $i := untilStep 1 (int $most) 1 }}
metrics-{{ $i }}: {{ add 9464 $i }}
{{- end }}
{{- end -}}
