{{/* One Ray pod. Arguments: root, group (head, router, prefill or decode), values (of the group). */}}
{{- define "seamount.pod" -}}
{{- $root := .root -}}
{{- $isHead := eq .group "head" -}}
{{- $isPool := has .group (list "prefill" "decode") -}}
metadata:
  labels:
    {{- include "seamount.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .group }}
    seamount/metrics: "true"
    {{- with .values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if not $isHead }}
  # Ray's autoscaler replaces a pod, and a container that came up again would be a node that it doesn't know.
  restartPolicy: Never
  {{- end }}
  serviceAccountName: {{ include "seamount.serviceAccount" $root }}
  # The head alone talks to Kubernetes: the autoscaler, and the fleet where it watches nodes.
  automountServiceAccountToken: {{ $isHead }}
  enableServiceLinks: false
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $root.Values.priorityClasses.create }}
  priorityClassName: {{ include "seamount.priorityClass" (dict "root" $root "class" (ternary "serving" "control" $isPool)) }}
  {{- end }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $root.Values.drain.deadlineSeconds 60 }}
  securityContext:
    {{- include "seamount.podSecurity" $root | nindent 4 }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.spreadOver }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "seamount.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $.group }}
  {{- end }}
  {{- if and (not $isHead) (eq $root.Values.weights.source "download") }}
  initContainers:
    {{- include "seamount.download" (dict "root" $root "isPool" $isPool) | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" $isHead }}
      image: {{ include "seamount.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "seamount.environment" $root | nindent 8 }}
        {{- with .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if $isHead }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- else if not $isPool }}
        - {name: grpc, containerPort: {{ $root.Values.serving.router.port }}}
        {{- end }}
        - {name: metrics, containerPort: 9464}
        {{- if $isPool }}
        {{- range $i := untilStep 1 (int .values.ranksPerPod) 1 }}
        - {name: metrics-{{ $i }}, containerPort: {{ add 9464 $i }}}
        {{- end }}
        {{- end }}
        - {name: ray-agent, containerPort: 52365}
        - {name: ray-metrics, containerPort: 8080}
      {{- include "seamount.probes" (dict "root" $root "isHead" $isHead "isPool" $isPool) | nindent 6 }}
      {{- if not $isHead }}
      lifecycle:
        preStop:
          # Before SIGTERM, which runs no shutdown hook: the fleet empties the node, then Ray closes it.
          exec:
            command: [seamount, drain, --this-node, --deadline, {{ include "seamount.drainDeadline" $root | quote }}]
      {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- include "seamount.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        {{- include "seamount.mounts" (dict "root" $root "group" .group) | nindent 8 }}
  volumes:
    {{- include "seamount.volumes" . | nindent 4 }}
{{- end -}}

{{/*
Ray's agent answers for its raylet, and on the head for Ray's own state: a pool's pod without a rank is a spare, and
healthy. The model's health is Serve's check. A router is ready once its gRPC health service says so: a model answers.
Nothing asks Redis: while it is away, everyone waits for it.
*/}}
{{- define "seamount.probes" -}}
{{- $path := ternary "/api/healthz" "/api/local_raylet_healthz" .isHead -}}
startupProbe:
  httpGet: {path: {{ $path }}, port: ray-agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: {{ $path }}, port: ray-agent}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if or .isHead .isPool }}
  httpGet: {path: {{ $path }}, port: ray-agent}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
  {{- else if .root.Values.tls.existingSecret }}
  # Kubernetes' own gRPC probe speaks no TLS.
  exec:
    command: [python, -m, seamount.cluster.probe, {{ required "tls.serverName: give a DNS name of the certificate" .root.Values.tls.serverName | quote }}]
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
  {{- else }}
  grpc: {port: {{ .root.Values.serving.router.port }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
  {{- end }}
{{- end -}}

{{/* Everyone runs as a user without rights, on a root file system that stays as it is. */}}
{{- define "seamount.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser | int64 }}
runAsGroup: {{ .Values.podSecurity.runAsGroup | int64 }}
fsGroup: {{ .Values.podSecurity.runAsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "seamount.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Of every Ray pod: addresses and secrets; choices are in the settings. */}}
{{- define "seamount.environment" -}}
- name: SEAMOUNT_CONFIG
  value: /etc/seamount/serving.yaml
- name: SEAMOUNT_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "seamount.redisSecret" . }}
      key: {{ include "seamount.redisPasswordKey" . }}
- name: SEAMOUNT_REDIS_URL
  value: {{ printf "%s://%s:$(SEAMOUNT_REDIS_PASSWORD)@%s/0" (include "seamount.redisScheme" .) (include "seamount.redisUser" .) (include "seamount.redisAddress" .) | quote }}
- name: SEAMOUNT_POD_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: SEAMOUNT_POD_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: SEAMOUNT_NODE_NAME
  valueFrom:
    fieldRef: {fieldPath: spec.nodeName}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: HOME
  value: /tmp
{{- end -}}
