{{/* serving.yaml: the values' part of it, and what the chart decides. */}}
{{- define "seamount.servingYaml" -}}
{{- $serving := deepCopy .Values.serving -}}
{{- $_ := set $serving "cluster_name" (include "seamount.name" .) -}}
{{- $_ := set $serving "run_dir" "/tmp/seamount" -}}
{{- if .Values.diskCache.enabled -}}
{{- $_ := set $serving.cache "disk_cache_dir" "/var/cache/seamount" -}}
{{- end -}}
{{- $router := $serving.router -}}
{{- $_ := set $router "host" "0.0.0.0" -}}
{{- $_ := set $router "api_key_file" "/etc/seamount-secrets/keys/api-keys" -}}
{{- $_ := set $router "worker_token_file" "/etc/seamount-secrets/worker/token" -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $router "tls_certificate_file" "/etc/seamount-secrets/tls/tls.crt" -}}
{{- $_ := set $router "tls_key_file" "/etc/seamount-secrets/tls/tls.key" -}}
{{- if .Values.tls.clientCertificates -}}
{{- $_ := set $router "client_ca_file" "/etc/seamount-secrets/tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $pools := dict "host" "node" -}}
{{- range $name := list "prefill" "decode" -}}
{{- $pool := index $.Values.pools $name -}}
{{- $resources := dict "CPU" $pool.cpusPerRank $name 1 -}}
{{- if $pool.gpu -}}{{- $_ := set $resources "GPU" 1 -}}{{- end -}}
{{- $_ := set $pools $name (dict "gangs" $pool.gangs "expert_parallel" $pool.expertParallel "resources" $resources) -}}
{{- end -}}
{{- $_ := set $serving "pools" $pools -}}
{{- if .Values.autoscaling.enabled -}}
{{- $autoscaling := deepCopy .Values.autoscaling.targets -}}
{{- $_ := set $autoscaling "enabled" true -}}
{{- $_ := set $autoscaling "routers" (dict "min_replicas" .Values.routers.minReplicas "max_replicas" .Values.routers.maxReplicas) -}}
{{- range $name, $pool := .Values.pools -}}
{{- $_ := set $autoscaling $name (dict "min_gangs" $pool.minGangs "max_gangs" $pool.maxGangs) -}}
{{- end -}}
{{- $_ := set $serving "autoscaling" $autoscaling -}}
{{- end -}}
{{- $draining := dig "draining" dict $serving -}}
{{- $_ := set $draining "watch" (ternary "nodes" "pods" .Values.drain.watchNodes) -}}
{{- $_ := set $serving "draining" $draining -}}
{{- $_ := set $serving "metrics" (dict "host" "node" "port" 9464) -}}
{{- toYaml $serving -}}
{{- end -}}

{{/*
What KubeRay tells Serve: the router and the fleet, each with its settings, so that changed ones reach it. The fleet runs
the gangs by itself, and re-applying this leaves them alone. Routers know nothing of pools: changes there leave them be.
KubeRay turns to a new Ray cluster once all applications run: `readiness` does when the gangs serve, and never again after.
*/}}
{{- define "seamount.serveConfig" -}}
{{- $serving := include "seamount.servingYaml" . | fromYaml -}}
proxy_location: Disabled
applications:
  - name: fleet
    import_path: seamount.cluster.declared:fleet
    route_prefix: null
    args:
      {{- toYaml $serving | nindent 6 }}
  - name: router
    import_path: seamount.cluster.declared:router
    route_prefix: null
    args:
      {{- omit $serving "pools" "autoscaling" "draining" | toYaml | nindent 6 }}
    {{- if .Values.autoscaling.enabled }}
    # The fleet says how many.
    external_scaler_enabled: true
    {{- end }}
    deployments:
      - name: Router
        num_replicas: {{ .Values.routers.replicas }}
  - name: readiness
    import_path: seamount.cluster.declared:readiness
    route_prefix: null
    args:
      {{- pick $serving "cluster_name" "redis" | toYaml | nindent 6 }}
      start_timeout_s: {{ .Values.drain.startupSeconds }}
{{- end -}}
