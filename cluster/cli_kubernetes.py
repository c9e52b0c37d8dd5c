"""``seamount k8s``: commands for a Kubernetes cluster. They need a kubeconfig, no Ray and no Redis."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seamount.cluster.cli_output import AsJson, report

if TYPE_CHECKING:  # commands import what they need: --help is quick
    from seamount.cluster.kubernetes.api import KubernetesApi
    from seamount.cluster.kubernetes.preflight import Check

k8s_app = typer.Typer(help="Look at a Kubernetes cluster, and empty its nodes.", no_args_is_help=True)

Kubeconfig = Annotated[
    Path | None, typer.Option(help="Else KUBECONFIG, ~/.kube/config, or in a pod its service account.")
]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig; else its current one.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Of the release; else the context's.")]


@k8s_app.command()
def preflight(
    values: Annotated[
        list[Path] | None, typer.Option("--values", "-f", help="As for helm install; may repeat.")
    ] = None,
    chart: Annotated[Path, typer.Option(help="Folder of the chart, whose own values come first.")] = Path(
        "helm/seamount"
    ),
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """Check that a cluster can take a release, before anything is made. Exit code 1 if a check fails.

    Versions, KubeRay's CRDs, room for each group of pods (resources, labels, taints), storage class, secrets, volume
    claims, and the rights of whoever asks. Affinities are not looked at, nor what runs on the nodes already.

    \b
    Examples:
      seamount k8s preflight
      seamount k8s preflight -f helm/seamount/profiles/h200x8.yaml -f mine.yaml -n models
      seamount k8s preflight -f mine.yaml --json | jq '.checks[] | select(.outcome != "ok")'
    """
    from seamount.cluster.kubernetes.chart_values import read_values
    from seamount.cluster.kubernetes.preflight import Outcome
    from seamount.cluster.kubernetes.preflight import preflight as run_checks

    wanted = read_values(chart, values or ())
    api = _connect(kubeconfig, context)
    with Console().status("asking Kubernetes"):
        checks = list(run_checks(api, wanted, namespace or api.namespace))
    passed = all(check.outcome is not Outcome.FAILED for check in checks)
    found = {"passed": passed, "checks": [asdict(check) for check in checks]}
    report(as_json, found, lambda console: console.print(_table(checks)), passed=passed)


@k8s_app.command()
def status(
    release: Annotated[str | None, typer.Option(help="Else all of the namespace.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """Show the release's Ray services, pods and nodes. Exit code 1 unless all pods are ready and no node is to go.

    \b
    Examples:
      seamount k8s status -n models
      seamount k8s status --release seamount --json | jq '.nodes[] | select(.leaving != "")'
    """
    from seamount.cluster.kubernetes.status import plain, print_tables, read_status

    api = _connect(kubeconfig, context)
    seen = read_status(api, namespace=namespace or api.namespace, release=release)
    report(as_json, plain(seen), lambda console: print_tables(seen, console), passed=seen.complete)


@k8s_app.command()
def drain(
    node: Annotated[str, typer.Argument(help="Kubernetes' name of the node: kubectl get nodes.")],
    timeout: Annotated[float, typer.Option(help="Seconds until it is given up; the node stays cordoned.")] = 900.0,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """Cordon a node and end Seamount's pods there without losing a turn.

    Each pod asks the fleet to empty it before it ends: replacements start where there is room, turns and caches move.
    Budgets of disruption are respected, other pods stay. It takes the rights to patch nodes, list pods and create
    pods/eviction. kubectl uncordon takes the node back.

    \b
    Examples:
      seamount k8s drain gpu-node-7 -n models
      seamount k8s drain gpu-node-7 --timeout 1800 --json
    """
    from seamount.cluster.kubernetes.emptying import Emptying, drain_kubernetes_node
    from seamount.cluster.terminal import StartDisplay

    api = _connect(kubeconfig, context)
    with StartDisplay(Console(stderr=True)) as display:

        def on_progress(progress: Emptying) -> None:
            detail = f"held by a disruption budget: {', '.join(progress.held)}" if progress.held else ""
            display.show(node, progress.num_pods - len(progress.left), progress.num_pods, detail)

        num_pods = drain_kubernetes_node(
            api, node, namespace=namespace or api.namespace, timeout_s=timeout, on_progress=on_progress
        )
    report(
        as_json,
        {"node": node, "cordoned": True, "num_pods": num_pods},
        lambda console: console.print(f"{node} is cordoned and empty; {num_pods} pods are gone", highlight=False),
    )


def _connect(kubeconfig: Path | None, context: str | None) -> KubernetesApi:
    from seamount.cluster.kubernetes.api import KubernetesApi

    return KubernetesApi.connect(kubeconfig=kubeconfig, context=context)


def _table(checks: list[Check]) -> Table:
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table(title="Preflight", title_justify="left")
    for column in ("check", "outcome", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for check in checks:
        outcome = f"[{colours[check.outcome]}]{check.outcome}"
        table.add_row(check.name, outcome, escape(check.detail), escape(check.remedy))
    return table
