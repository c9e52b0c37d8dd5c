"""``seamount``: the commands. Each is a few lines here; what it does stands in the module of its name."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from seamount.cluster.cli_kubernetes import k8s_app
from seamount.cluster.environment import ADDRESS_VARIABLE, CONFIG_VARIABLE, client_environment
from seamount.cluster.settings import client_address, load_settings
from seamount.wire.errors import InvalidArgument, SeamountError, Unavailable

if TYPE_CHECKING:  # commands import what they need: --help is quick
    from seamount.router.client import Client


class ContextChoice(StrEnum):
    ERROR = "error"
    DISCARD_TOOL_RESULTS = "discard-tool-results"
    DISCARD_ALL = "discard-all"


EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="seamount",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
checkpoint_app = typer.Typer(help="Make checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(k8s_app, name="k8s")

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help=f"serving.yaml; else {CONFIG_VARIABLE}, else ./serving.yaml, else the defaults."
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Plain processes of this machine instead of Ray Serve.")]
Address = Annotated[
    str | None,
    typer.Option("--address", "-a", help=f"host:port of a router; else {ADDRESS_VARIABLE}, else the settings'."),
]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authorities of the router's certificate; given = TLS.")]
TlsCertificate = Annotated[Path | None, typer.Option(help="PEM certificate to show, where the router asks for one.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of that certificate.")]


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


@app.command()
def status(
    config: Config = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
) -> None:
    """Show pools and ranks as a router sees them. Exit code 1 unless all are healthy. Needs the admin role.

    \b
    Examples:
      seamount status
      seamount status --json | jq '.ranks[].state.num_free_pages'
      SEAMOUNT_API_KEY=... seamount status --address router.example:7411 --tls-ca ca.pem
    """
    from seamount.cluster.status import print_tables, read_status, to_json

    with _connect(config, address, tls_ca, tls_certificate, tls_key) as client:
        seen = read_status(client)
    if as_json:
        print(to_json(seen))
    else:
        print_tables(seen, Console())
    if not seen.complete:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def drain(
    node: Annotated[str | None, typer.Argument(help="Ray node: its id, address or host name.")] = None,
    this_node: Annotated[bool, typer.Option("--this-node", help="The one this runs on, as a pod's preStop.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds; what is still there then goes without waiting.")] = 240.0,
    ray_address: Annotated[str | None, typer.Option(help="Of Ray's GCS; else as Ray finds it.")] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
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
            status = empty_node(drains, wanted, deadline_s=deadline, cause=cause, on_status=show_drain(display))
    except Unavailable as error:
        if not this_node:
            raise
        print(f"not drained: {error.message}", file=sys.stderr)
        return
    close_node(status.node_id, message=cause, address=ray_address)
    if as_json:
        print(json.dumps({"node": wanted, "node_id": status.node_id, "phase": status.phase.value}))
    else:
        Console().print(f"{wanted} is empty and closed", markup=False, highlight=False)


@app.command()
def chat(
    config: Config = None,
    address: Address = None,
    session: Annotated[str | None, typer.Option(help="Go on with this session instead of a new one.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON list of functions that the model may call.")] = None,
    context_policy: Annotated[
        ContextChoice | None,
        typer.Option(help="When the prompt fills 80% of the context: error, or discard results or all calls of tools."),
    ] = None,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy; absent = the deployment's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same one gives the same answers.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Of one turn; absent = the deployment's.")] = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
) -> None:
    """Talk to the model in the terminal. Ctrl-C cancels a turn, /quit or Ctrl-D leaves; the session stays.

    Reasoning is dimmed. Where the model calls a tool, type the tool's result.

    \b
    Examples:
      seamount chat
      seamount chat --tools tools.json --temperature 0
      seamount chat --session SESSION_ID
      seamount chat --session SESSION_ID --context-policy discard-all
    """
    from seamount.cluster.chat import Chat, read_tools
    from seamount.router.client import ContextPolicy, Sampling, ThinkingMode

    first = [] if tools is None else [read_tools(tools)]
    if first and session is not None:
        raise InvalidArgument("--tools are part of a new session: leave out --session", field="tools")
    sampling = Sampling(temperature=temperature, seed=seed, max_output_tokens=max_output_tokens)
    console = Console()
    with _connect(config, address, tls_ca, tls_certificate, tls_key) as client:
        mode = ThinkingMode.THINKING if thinking else ThinkingMode.CHAT
        policy = ContextPolicy[context_policy.name] if context_policy is not None else ContextPolicy.ERROR
        if session is None:
            session_id = client.create_session(thinking_mode=mode, context_policy=policy).id
        else:
            session_id = session
            if context_policy is not None:
                client.update_session(session_id, context_policy=policy)
        console.print(f"session {session_id}; /quit leaves, and --session comes back", style="dim", highlight=False)
        Chat(client, session_id, console, input, sampling).run(first)


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


@checkpoint_app.command("init")
def checkpoint_init(
    path: Annotated[Path, typer.Argument(help="New folder.")],
    seed: Annotated[int, typer.Option(help="The same one gives the same bytes.")] = 0,
    geometry: Annotated[str, typer.Option(help="demo (sizes that GPU kernels fit) or test (smaller).")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    fp8: Annotated[bool, typer.Option("--fp8", help="Projections in FP8 with block scales.")] = False,
) -> None:
    """Write a tiny random model with a byte-level tokenizer, in the format of the real checkpoint.

    \b
    Examples:
      seamount checkpoint init checkpoints/mine --seed 1
      seamount checkpoint init /tmp/small --geometry test --dtype float32
    """
    from seamount.cluster.checkpoint import init_checkpoint

    console = Console()
    with console.status(f"writing {path}"):
        init_checkpoint(path, seed=seed, geometry=geometry, dtype=dtype, fp8=fp8)
    console.print(f"wrote {path}", markup=False, highlight=False)


@checkpoint_app.command("quantize")
def checkpoint_quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a bfloat16 or float32 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a checkpoint's FP8 form: projections as e4m3 with a power-of-two scale a block of 128 x 128.

    Embedding, head, gate, norms and projections that are no whole blocks stay as they are; other files are copied.

    \b
    Examples:
      seamount checkpoint quantize checkpoints/mine checkpoints/mine-fp8
    """
    from seamount.cluster.terminal import ReadingBar
    from seamount.workers.model.quantize_checkpoint import quantize_checkpoint

    console = Console()
    with ReadingBar(console, f"quantising {source}") as bar:
        quantize_checkpoint(source, target, progress=bar.show)
    console.print(f"wrote {target}", markup=False, highlight=False)


def _connect(
    config: Path | None, address: str | None, ca_file: Path | None, certificate_file: Path | None, key_file: Path | None
) -> Client:
    from seamount.router.client import Client, Retries, Tls

    environment = client_environment()
    where = address or environment.address or client_address(load_settings(config))
    given = any(file is not None for file in (ca_file, certificate_file, key_file))
    return Client(
        where,
        api_key=environment.api_key.get_secret_value() if environment.api_key else None,
        tls=Tls(ca_file=ca_file, certificate_file=certificate_file, key_file=key_file) if given else None,
        retries=Retries(max_attempts=2),
    )


if __name__ == "__main__":
    main()
