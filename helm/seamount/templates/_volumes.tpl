{{/*
Weights are for routers (the tokenizer) and ranks, disk caches for ranks: the head may be on any node. Arguments: root,
group.
*/}}
{{- define "seamount.mounts" -}}
{{- $values := .root.Values -}}
- name: config
  mountPath: /etc/seamount
  readOnly: true
- name: worker-token
  mountPath: /etc/seamount-secrets/worker
  readOnly: true
- name: api-keys
  mountPath: /etc/seamount-secrets/keys
  readOnly: true
{{- if $values.tls.existingSecret }}
- name: tls
  mountPath: /etc/seamount-secrets/tls
  readOnly: true
{{- end }}
{{- if and (ne $values.weights.source "image") (ne .group "head") }}
- name: weights
  mountPath: {{ $values.weights.mountPath }}
  readOnly: true
{{- end }}
{{- if and $values.diskCache.enabled (has .group (list "prefill" "decode")) }}
- name: disk-cache
  mountPath: /var/cache/seamount
{{- end }}
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- end -}}

{{/* Arguments: root, group, values (of the group). */}}
{{- define "seamount.volumes" -}}
- name: config
  configMap:
    name: {{ include "seamount.name" .root }}
- name: worker-token
  secret:
    secretName: {{ include "seamount.workerTokenSecret" .root }}
    defaultMode: 0440
- name: api-keys
  secret:
    secretName: {{ include "seamount.apiKeysSecret" .root }}
    defaultMode: 0440
    items:
      - {key: api-keys, path: api-keys}
{{- if .root.Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ .root.Values.tls.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- $source := ternary "image" .root.Values.weights.source (eq .group "head") }}
{{- if eq $source "pvc" }}
- name: weights
  persistentVolumeClaim:
    claimName: {{ required "weights.pvc.claimName: name the claim that holds the checkpoint" .root.Values.weights.pvc.claimName }}
    readOnly: true
{{- else if eq $source "hostPath" }}
- name: weights
  hostPath:
    path: {{ required "weights.hostPath.path: name the folder of each node that holds the checkpoint" .root.Values.weights.hostPath.path }}
    type: Directory
{{- else if eq $source "download" }}
- name: weights
  emptyDir:
    sizeLimit: {{ .root.Values.weights.download.sizeLimit }}
{{- end }}
{{- if and .root.Values.diskCache.enabled (has .group (list "prefill" "decode")) }}
- name: disk-cache
  emptyDir:
    sizeLimit: {{ .root.Values.diskCache.sizeLimit }}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .values.scratch }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .values.sharedMemory }}
{{- end -}}

{{/* Fetches the checkpoint and checks it; files that are there and whole are not fetched again. Arguments: root, isPool. */}}
{{- define "seamount.download" -}}
{{- $values := .root.Values -}}
- name: weights
  image: {{ include "seamount.image" .root }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command: [/bin/sh, -eu, /etc/seamount/fetch-weights.sh]
  env:
    - name: BASE_URL
      value: {{ required "weights.download.baseUrl: the address that the files lie under" $values.weights.download.baseUrl | quote }}
    - name: TARGET
      value: {{ $values.weights.mountPath }}
    - name: SUMS
      value: /etc/seamount/weights.sha256
    # Routers need the tokenizer and the configuration alone.
    - name: SKIP
      value: {{ ternary "" "*.safetensors" .isPool | quote }}
    - name: HOME
      value: /tmp
  securityContext:
    {{- include "seamount.containerSecurity" .root | nindent 4 }}
  resources:
    requests: {cpu: "1", memory: 512Mi, ephemeral-storage: 100Mi}
    limits: {cpu: "4", memory: 2Gi, ephemeral-storage: 100Mi}
  volumeMounts:
    - name: weights
      mountPath: {{ $values.weights.mountPath }}
    - name: config
      mountPath: /etc/seamount
      readOnly: true
    - name: tmp
      mountPath: /tmp
{{- end -}}
