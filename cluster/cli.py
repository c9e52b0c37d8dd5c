"""``seamount``: the commands. Each is a few lines here; what it does stands in the module of its name."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from seamount.cluster.cli_checkpoint import checkpoint_app
from seamount.cluster.cli_client import chat, status
from seamount.cluster.cli_kubernetes import k8s_app
from seamount.cluster.cli_output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, AsJson, Config, report
from seamount.cluster.settings import load_settings
from seamount.wire.errors import InvalidArgument, SeamountError, Unavailable

app = typer.Typer(
    name="seamount",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(k8s_app, name="k8s")

Plain = Annotated[bool, typer.Option("--plain", help="Plain processes of this machine instead of Ray Serve.")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 used wrongly (settings included), 130 interrupted."""
    try:
        app(arguments)
    except InvalidArgument as error:
        _die(error, EXIT_USAGE)
    except SeamountError as error:
        _die(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _die(error: SeamountError, code: int) -> None:
    Console(stderr=True).print(f"[red]error:[/] {error.reason}:", end=" ")
    print(error.message, file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"seamount {version('seamount')}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Serve DeepSeek-V3.2-class models to long-running agents.

    \b
    seamount demo     see all of it work
    seamount up       serve until Ctrl-C; then, elsewhere: seamount chat
    """


@app.command()
def up(config: Config = None, plain: Plain = False) -> None:
    """Start everything and serve until Ctrl-C.

    \b
    Examples:
      seamount up
      seamount up --config serving.yaml
      seamount up --plain
    """
    from seamount.cluster.checkpoint import require_checkpoint
    from seamount.cluster.running import running
    from seamount.cluster.terminal import StartDisplay

    settings = load_settings(config)
    console = Console()
    console.print(settings.to_yaml(), style="dim", markup=False, highlight=False)
    require_checkpoint(settings)
    with StartDisplay(console) as display, running(settings, plain=plain, show=display.show) as system:
        display.stop()
        console.print(f"[bold green]serving[/] on [bold]{system.address}[/]; Ctrl-C stops", highlight=False)
        try:
            system.wait()
        except KeyboardInterrupt:
            console.print("stopping ...")


@app.command()
def demo(
    plain: Plain = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="All ranks on this machine's GPU; with --plain.")] = False,
) -> None:
    """Start everything, talk to tiny-agent, run the tools that it calls, check it all, stop. Exit code 0 if all holds.

    It has settings of its own: one router, one prefill rank, one decode gang of two, everything on loopback, files in
    ./.demo.

    \b
    Examples:
      seamount demo
      seamount demo --plain
      seamount demo --plain --cuda
    """
    from seamount.cluster.checkpoint import require_checkpoint
    from seamount.cluster.demo import demo_settings, hold_conversation
    from seamount.cluster.running import running
    from seamount.cluster.terminal import StartDisplay
    from seamount.router.client import Client

    if cuda and not plain:
        raise InvalidArgument("--cuda goes with --plain: Ray would give each rank a GPU of its own", field="--cuda")
    settings = demo_settings(cuda=cuda)
    console = Console()
    require_checkpoint(settings)
    with StartDisplay(console) as display, running(settings, plain=plain, show=display.show) as system:
        display.stop()
        with Client(system.address) as client:
            checks = hold_conversation(client, console)
        console.print("\nstopping ...")
    if not all(check.holds for check in checks):
        console.print("[bold red]the demo failed")
        raise typer.Exit(EXIT_FAILED)
    console.print("[bold green]the demo passed")


app.command()(status)


@app.command()
def drain(
    node: Annotated[str | None, typer.Argument(help="Ray node: its id, address or host name.")] = None,
    this_node: Annotated[bool, typer.Option("--this-node", help="The one this runs on, as a pod's preStop.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds; what is still there then goes without waiting.")] = 240.0,
    ray_address: Annotated[str | None, typer.Option(help="Of Ray's GCS; else as Ray finds it.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Empty a Ray node, then close it: gangs and routers there are replaced where there is room, and hand over first.

    Exit code 1 where it is not empty in time; asked again, it goes on. With --this-node, 0 where no fleet answers:
    there is nobody to hand over to.

    \b
    Examples:
      seamount drain 10.0.3.17
      seamount drain 7c0e... --deadline 600 --json
      seamount drain --this-node --deadline 240
    """
    import socket

    from seamount.cluster.node_closing import close_node, drain_requests, empty_node
    from seamount.cluster.terminal import StartDisplay, show_drain

    if (node is None) != this_node:
        raise InvalidArgument("name one node, or give --this-node", field="node")
    wanted = node or socket.gethostname()
    drains = drain_requests(load_settings(config))
    cause = "seamount drain --this-node" if this_node else "seamount drain"
    try:
        with StartDisplay(Console(stderr=True)) as display:
            emptied = empty_node(drains, wanted, deadline_s=deadline, cause=cause, on_status=show_drain(display))
    except Unavailable as error:
        if not this_node:
            raise
        print(f"not drained: {error.message}", file=sys.stderr)
        return
    close_node(emptied.node_id, message=cause, address=ray_address)
    report(
        as_json,
        {"node": wanted, "node_id": emptied.node_id, "phase": emptied.phase.value},
        lambda console: console.print(f"{wanted} is empty and closed", markup=False, highlight=False),
    )


app.command()(chat)


@app.command()
def settings(config: Config = None) -> None:
    """Print every setting in force, with its meaning: a serving.yaml to start from.

    \b
    Examples:
      seamount settings > serving.yaml
      seamount settings --config serving.yaml
    """
    print(load_settings(config).to_yaml(explained=True), end="")


@app.command()
def key(
    tenant: Annotated[str, typer.Argument(help="Who will call with it.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also see pools, ranks and where sessions are.")] = False,
    file: Annotated[Path | None, typer.Option(help="Key file to add it to; else the line is printed.")] = None,
) -> None:
    """Make an API key. It is shown once; the key file holds its hash only.

    \b
    Examples:
      seamount key acme --file keys
      seamount key operations --admin --file keys
    """
    from seamount.cluster.keys import append_line
    from seamount.router.tenants import new_key

    secret, line = new_key(tenant, admin=admin)
    if file is None:
        print(f"line for router.api_key_file:\n{line}", file=sys.stderr)
    else:
        append_line(file, line)
    print(secret)


if __name__ == "__main__":
    main()
