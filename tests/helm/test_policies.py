"""What no rendered object may do, whichever values there are."""

from __future__ import annotations

import re

import pytest

from rendered_chart import (
    NAMESPACE,
    RELEASE,
    VALUES,
    Manifest,
    containers,
    groups,
    of_kind,
    pods,
    ray_service,
    rendered,
    secret_references,
    serve_config,
)

RAY_GROUPS = {"head", "router", "prefill", "decode"}


def matching(selector: dict[str, str], pods: dict[str, Manifest]) -> set[str]:
    """Names of the pods that carry these labels."""
    return {name for name, pod in pods.items() if selector.items() <= pod["metadata"]["labels"].items()}


def port_names(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for entry in containers(pod) for port in entry.get("ports", [])}


def test_no_pod_runs_as_root_or_gains_rights(manifests: tuple[Manifest, ...]) -> None:
    for pod in pods(manifests).values():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert min(security["runAsUser"], security["runAsGroup"], security["fsGroup"]) > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        for entry in containers(pod):
            assert entry["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", sorted(set(VALUES)))
def test_volumes_are_those_that_restricted_namespaces_admit(name: str) -> None:
    kinds = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"} | (
        {"hostPath"} if name == "hostpath" else set()
    )
    for pod in pods(rendered(VALUES[name])).values():
        for volume in pod["spec"]["volumes"]:
            assert set(volume) - {"name"} <= kinds
            assert volume.get("emptyDir", {"sizeLimit": "1"})["sizeLimit"]


def test_every_mount_has_its_volume(manifests: tuple[Manifest, ...]) -> None:
    claimed = {
        claim["metadata"]["name"]
        for owner in of_kind(manifests, "StatefulSet")
        for claim in owner["spec"]["volumeClaimTemplates"]
    }
    for name, pod in pods(manifests).items():
        present = {volume["name"] for volume in pod["spec"]["volumes"]} | (claimed if name == "redis" else set())
        mounted = {mount["name"] for entry in containers(pod) for mount in entry["volumeMounts"]}
        assert mounted == present
        for entry in containers(pod):
            paths = [mount["mountPath"] for mount in entry["volumeMounts"]]
            assert len(paths) == len(set(paths))


def test_images_have_a_version(manifests: tuple[Manifest, ...]) -> None:
    for pod in pods(manifests).values():
        for entry in containers(pod):
            image = entry["image"].rsplit("/", 1)[-1]
            assert re.search(r"(:|@sha256:)[\w.-]+$", image)
            assert not image.endswith(":latest")


def test_requests_and_limits_are_set(manifests: tuple[Manifest, ...]) -> None:
    autoscaler = ray_service(manifests)["spec"]["rayClusterConfig"].get("autoscalerOptions")
    for entry in [
        *(entry for pod in pods(manifests).values() for entry in containers(pod)),
        *filter(None, [autoscaler]),
    ]:
        for part in ("requests", "limits"):
            assert entry["resources"][part].keys() >= {"cpu", "memory", "ephemeral-storage"}
        gpus = [entry["resources"][part].get("nvidia.com/gpu") for part in ("requests", "limits")]
        assert gpus[0] == gpus[1]


def test_pods_are_spread_and_ranked(manifests: tuple[Manifest, ...]) -> None:
    classes = {entry["metadata"]["name"]: entry["value"] for entry in of_kind(manifests, "PriorityClass")}
    for name, pod in pods(manifests).items():
        if name in RAY_GROUPS - {"head"}:
            (spread,) = pod["spec"]["topologySpreadConstraints"]
            assert matching(spread["labelSelector"]["matchLabels"], pods(manifests)) == {name}
        if classes:
            chosen = classes[pod["spec"]["priorityClassName"]]
            assert chosen == (min if name in ("prefill", "decode") else max)(classes.values())


def test_only_the_head_may_talk_to_kubernetes_and_only_to_look(manifests: tuple[Manifest, ...]) -> None:
    accounts = [entry["metadata"]["name"] for entry in of_kind(manifests, "ServiceAccount")]
    for name, pod in pods(manifests).items():
        assert pod["spec"]["automountServiceAccountToken"] is (name == "head")
        assert pod["spec"]["serviceAccountName"] in accounts
    (role,) = of_kind(manifests, "Role")
    cluster_roles = of_kind(manifests, "ClusterRole")
    for rule in [rule for entry in [role, *cluster_roles] for rule in entry["rules"]]:
        assert set(rule["verbs"]) <= {"get", "list", "watch"}
        assert set(rule["resources"]) <= {"pods", "nodes"}
    named = {(entry["kind"], entry["metadata"]["name"]) for entry in [role, *cluster_roles]}
    for binding in of_kind(manifests, "RoleBinding") + of_kind(manifests, "ClusterRoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in named
        (subject,) = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (accounts[0], NAMESPACE)


def test_services_name_ports_of_the_pods_that_they_select(manifests: tuple[Manifest, ...]) -> None:
    present = pods(manifests)
    services = of_kind(manifests, "Service")
    for service in services:
        chosen = matching(service["spec"]["selector"], present)
        assert chosen, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            target = port["targetPort"]
            offered = [{**port_names(present[name]), **{value: value for value in port_names(present[name]).values()}}
                       for name in chosen]  # fmt: skip
            if service["metadata"]["name"].endswith("-metrics"):  # a port for each rank of the largest pod
                assert any(target in ports for ports in offered)
            else:
                assert all(target in ports for ports in offered)
    by_name = {service["metadata"]["name"]: service for service in services}
    for name in (RELEASE, f"{RELEASE}-routers"):
        assert matching(by_name[name]["spec"]["selector"], present) == {"router"}


def test_service_monitors_find_their_service(manifests: tuple[Manifest, ...]) -> None:
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [entry for entry in of_kind(manifests, "Service") if wanted <= entry["metadata"]["labels"].items()]
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {
            port["name"] for port in service["spec"]["ports"]
        }
        assert matching(service["spec"]["selector"], pods(manifests)) == groups(manifests).keys()
    for rule in of_kind(manifests, "PrometheusRule"):
        assert all(group["rules"] for group in rule["spec"]["groups"])


def test_routers_listen_where_the_service_and_the_probe_ask(manifests: tuple[Manifest, ...]) -> None:
    (_, router, _) = serve_config(manifests)["applications"]
    (entry,) = pods(manifests)["router"]["spec"]["containers"]
    assert {"name": "grpc", "containerPort": router["args"]["router"]["port"]} in entry["ports"]
    probe = entry["readinessProbe"]
    if "tls_key_file" in router["args"]["router"]:
        assert probe["exec"]["command"][:3] == ["python", "-m", "seamount.cluster.probe"]
    else:
        assert probe["grpc"] == {"port": router["args"]["router"]["port"]}


def test_pool_pods_are_asked_about_their_raylet_alone_and_redis_is_never_asked(manifests: tuple[Manifest, ...]) -> None:
    for name, pod in pods(manifests).items():
        (entry,) = pod["spec"]["containers"]
        probes = {key: value for key, value in entry.items() if key.endswith("Probe")}
        if name == "redis":
            assert not probes
        elif name in ("prefill", "decode"):
            assert probes
            for probe in probes.values():
                assert probe["httpGet"] == {"path": "/api/local_raylet_healthz", "port": "ray-agent"}


def test_pods_are_drained_before_their_time_is_up_and_clusters_before_they_are_deleted(
    manifests: tuple[Manifest, ...],
) -> None:
    deadlines = set()
    for name, pod in pods(manifests).items():
        (entry,) = pod["spec"]["containers"]
        if name in ("head", "redis"):
            assert "lifecycle" not in entry
            continue
        *command, deadline = entry["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["seamount", "drain", "--this-node", "--deadline"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= int(deadline) + 30
        deadlines.add(int(deadline))
    (deadline,) = deadlines
    (fleet, *_) = serve_config(manifests)["applications"]
    turn_s = fleet["args"]["router"].get("turn_deadline_s", 600)
    assert ray_service(manifests)["spec"]["rayClusterDeletionDelaySeconds"] >= turn_s + deadline


def test_disruption_budgets_select_one_group_and_count_pods_that_stay(manifests: tuple[Manifest, ...]) -> None:
    found = set()
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        (group,) = matching(budget["spec"]["selector"]["matchLabels"], pods(manifests))
        found.add(group)
        # maxUnavailable and percentages need an owner with a scale; without one nothing could be evicted at all.
        assert set(budget["spec"]) == {"minAvailable", "selector"}
        assert (
            0 <= budget["spec"]["minAvailable"] < groups(manifests)[group]["replicas"]
            or not budget["spec"]["minAvailable"]
        )
    assert found == groups(manifests).keys() - {"head"}


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"minimal"}))
def test_nothing_is_open_by_default(name: str) -> None:
    manifests = rendered(VALUES[name])
    policies = of_kind(manifests, "NetworkPolicy")
    present = pods(manifests)
    denied = set()
    for policy in policies:
        spec = policy["spec"]
        chosen = matching(spec["podSelector"]["matchLabels"], present)
        assert chosen, policy["metadata"]["name"]
        if not {"ingress", "egress"} & spec.keys() and set(spec["policyTypes"]) == {"Ingress", "Egress"}:
            denied |= chosen
        for rule in spec.get("ingress", []):
            assert rule["from"], policy["metadata"]["name"]
            for port in rule.get("ports", []):
                names = [port_names(present[pod]) for pod in chosen]
                assert any(port["port"] in ports or port["port"] in ports.values() for ports in names)
        for rule in spec.get("egress", []):
            assert rule.get("to") or rule.get("ports"), policy["metadata"]["name"]
    assert denied == present.keys()


def test_secrets_are_named_not_told(manifests: tuple[Manifest, ...]) -> None:
    made = {entry["metadata"]["name"]: entry["data"] for entry in of_kind(manifests, "Secret")}
    for value in [value for data in made.values() for value in data.values()]:
        rest = [entry for entry in manifests if entry["kind"] != "Secret"]
        assert value not in str(rest)
    for pod in pods(manifests).values():
        for name, key in secret_references(pod):
            assert name not in made or key is None or key in made[name]
        for entry in containers(pod):
            for variable in entry["env"]:
                if re.search("PASSWORD|TOKEN|KEY|SECRET", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"]
                assert not re.search(r"://[^$@]+:[^$@]+@", variable.get("value", ""))


def test_ray_asks_for_a_token_and_keeps_its_state_in_redis(manifests: tuple[Manifest, ...]) -> None:
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    state = cluster["gcsFaultToleranceOptions"]
    assert "secretKeyRef" in state["redisPassword"]["valueFrom"]
    (entry,) = pods(manifests)["head"]["spec"]["containers"]
    urls = [variable["value"] for variable in entry["env"] if variable["name"] == "SEAMOUNT_REDIS_URL"]
    scheme, address = state["redisAddress"].split("://")
    assert urls == [f"{scheme}://{state['redisUsername']['value']}:$(SEAMOUNT_REDIS_PASSWORD)@{address}/0"]


def test_a_trials_redis_syncs_every_write(manifests: tuple[Manifest, ...]) -> None:
    for owner in of_kind(manifests, "StatefulSet"):
        (entry,) = owner["spec"]["template"]["spec"]["containers"]
        assert "appendonly yes" in entry["args"][0]
        assert "appendfsync always" in entry["args"][0]
        assert "$PASSWORD" in entry["args"][0]


def test_weights_and_disk_caches_are_mounted_where_they_are_used(manifests: tuple[Manifest, ...]) -> None:
    """The head may be on any node: a folder of GPU nodes, or a volume of one zone, would bind it."""
    ranks = {"prefill", "decode"}
    for kind, users in (("weights", {"router", *ranks}), ("disk-cache", ranks)):
        having = {
            name for name, pod in pods(manifests).items() if kind in {one["name"] for one in pod["spec"]["volumes"]}
        }
        assert not having or having == users & pods(manifests).keys()
        for name, pod in pods(manifests).items():
            for entry in pod["spec"]["containers"]:
                assert (kind in {mount["name"] for mount in entry["volumeMounts"]}) == (name in having)
