{{/* Pods that hold so many gangs: whole gangs in a pod, or whole pods in a gang. Arguments: pool (its values), gangs. */}}
{{- define "seamount.pods" -}}
{{- $ranks := mul .gangs .pool.expertParallel -}}
{{- div (add $ranks (sub .pool.ranksPerPod 1)) .pool.ranksPerPod -}}
{{- end -}}

{{/* CPUs of a quantity such as 2, "2" or 500m. */}}
{{- define "seamount.cpus" -}}
{{- $quantity := toString . -}}
{{- if hasSuffix "m" $quantity -}}{{ divf (trimSuffix "m" $quantity) 1000 }}{{- else -}}{{ $quantity }}{{- end -}}
{{- end -}}

{{/* Refuses a number of routers that the autoscaler would not keep. Argument: routers (their values). */}}
{{- define "seamount.checkRouters" -}}
{{- if or (lt (int .replicas) (int .minReplicas)) (gt (int .replicas) (int .maxReplicas)) -}}
{{- fail (printf "routers.replicas: %v is not between minReplicas = %v and maxReplicas = %v" .replicas .minReplicas .maxReplicas) -}}
{{- end -}}
{{- end -}}

{{/* Refuses a port that another process of the router's pod listens on: metrics, Ray's exporter, Ray's agent. */}}
{{- define "seamount.checkPort" -}}
{{- $port := int .Values.serving.router.port -}}
{{- if or (eq $port 8080) (eq $port 9464) (eq $port 52365) -}}
{{- fail (printf "serving.router.port: %d is taken in a router's pod (8080 Ray's metrics, 9464 metrics, 52365 Ray's agent); choose another" $port) -}}
{{- end -}}
{{- end -}}

{{/* Refuses what no pod could hold. Arguments: name, pool (its values), device (serving.engine.device). */}}
{{- define "seamount.checkPool" -}}
{{- $pool := .pool -}}
{{- $place := printf "pools.%s" .name -}}
{{- $ranks := int $pool.ranksPerPod -}}
{{- $gang := int $pool.expertParallel -}}
{{- if and (mod $gang $ranks) (mod $ranks $gang) -}}
{{- fail (printf "%s: gangs of %d ranks in pods of %d would share pods by halves, and a drained pod would take two gangs down: let one be a multiple of the other" $place $gang $ranks) -}}
{{- end -}}
{{- if or (lt (int $pool.gangs) (int $pool.minGangs)) (gt (int $pool.gangs) (int $pool.maxGangs)) -}}
{{- fail (printf "%s.gangs: %v is not between minGangs = %v and maxGangs = %v" $place $pool.gangs $pool.minGangs $pool.maxGangs) -}}
{{- end -}}
{{- if hasKey $pool.resources.limits "cpu" -}}
{{- $cpus := include "seamount.cpus" $pool.resources.limits.cpu -}}
{{- if gt (mulf $pool.cpusPerRank $ranks) (float64 $cpus) -}}
{{- fail (printf "%s.cpusPerRank: %d ranks of %v CPUs find no room in a pod of %v" $place $ranks $pool.cpusPerRank $cpus) -}}
{{- end -}}
{{- end -}}
{{- if ne $pool.gpu (eq .device "cuda") -}}
{{- fail (printf "%s.gpu: %v does not go with serving.engine.device = %s" $place $pool.gpu .device) -}}
{{- end -}}
{{- $devices := index $pool.resources.limits "nvidia.com/gpu" | default 0 | int -}}
{{- if and $pool.gpu (ne $devices $ranks) -}}
{{- fail (printf "%s.resources.limits: a pod of ranksPerPod = %d ranks on GPUs needs nvidia.com/gpu: %d, not %d" $place $ranks $ranks $devices) -}}
{{- end -}}
{{- if and $devices (not $pool.gpu) -}}
{{- fail (printf "%s.gpu: the pod asks for %d devices that no rank would use: set gpu: true, or leave them out" $place $devices) -}}
{{- end -}}
{{- end -}}
