"""The commands that are clients of a router: ``seamount status`` and ``seamount chat``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from seamount.cluster.cli_output import AsJson, Config, report
from seamount.cluster.environment import ADDRESS_VARIABLE, client_environment
from seamount.cluster.settings import client_address, load_settings
from seamount.wire.errors import InvalidArgument

if TYPE_CHECKING:  # commands import what they need: --help is quick
    from seamount.router.client import Client


class ContextChoice(StrEnum):
    ERROR = "error"
    DISCARD_TOOL_RESULTS = "discard-tool-results"
    DISCARD_ALL = "discard-all"


Address = Annotated[
    str | None,
    typer.Option("--address", "-a", help=f"host:port of a router; else {ADDRESS_VARIABLE}, else the settings'."),
]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authorities of the router's certificate; given = TLS.")]
TlsCertificate = Annotated[Path | None, typer.Option(help="PEM certificate to show, where the router asks for one.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of that certificate.")]


def status(
    config: Config = None,
    address: Address = None,
    as_json: AsJson = False,
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
    from seamount.cluster.status import plain, print_tables, read_status

    with _connect(config, address, tls_ca, tls_certificate, tls_key) as client:
        seen = read_status(client)
    report(as_json, plain(seen), lambda console: print_tables(seen, console), passed=seen.complete)


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
