"""``seamount demo``: three turns of a conversation with a tool call, over gRPC, each checked by its receipt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from seamount.cluster.chat import print_turn, receipt_line
from seamount.cluster.settings import Settings, validate
from seamount.router.client import (
    Client,
    Message,
    Role,
    Sampling,
    ThinkingMode,
    Tool,
    ToolCall,
    Turn,
    system,
    tool_result,
    user,
)
from seamount.v1 import admin_pb2, common_pb2, events_pb2, session_pb2, worker_pb2

WEATHER = Tool(
    function_json=json.dumps(
        {
            "name": "get_weather",
            "description": "The weather of a city, now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        }
    )
)
CALL = ToolCall(id="call-1", name="get_weather", arguments_json='{"city": "Lisbon"}')
STATE_TIMEOUT_S = 5.0
SAMPLING = Sampling(temperature=1.0, seed=7, max_output_tokens=24)


def demo_settings(*, cuda: bool = False) -> Settings:
    """The default deployment, beside whatever else runs here: any free port, files in ``./.demo``, its own Redis.

    cuda: all ranks share one GPU, with fp8 caches and a bfloat16 model.
    """
    chosen: dict[str, object] = {
        "cluster_name": "demo",
        "run_dir": ".demo",
        "redis": {"data_dir": ".demo/redis"},
        "router": {"port": 0},
    }
    if cuda:
        chosen |= {"engine": {"device": "cuda"}, "cache": {"layout": "fp8", "dtype": "bfloat16"}}
    return validate(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was to hold, whether it did, and the figures."""

    claim: str
    holds: bool
    figures: str


def hold_conversation(client: Client, console: Console) -> list[Check]:
    """Run the conversation, printing it; returns the checks in order. Raises the typed error of a call that failed."""
    checks = list(_conversation(client, console))
    for check in checks:
        mark = "[green]✓" if check.holds else "[red]✗"
        console.print(f"{mark}[/] {check.claim} [dim]({check.figures})", highlight=False)
    return checks


def _conversation(client: Client, console: Console) -> Iterator[Check]:
    session = client.create_session(thinking_mode=ThinkingMode.CHAT)
    say = _Narrator(client, session.id, console)

    say.heading("Turn 1: a question, with a tool at hand")
    opening = [system("You are a helpful assistant. Call a tool where one helps.", tools=[WEATHER])]
    first = say.turn([*opening, user("Hello! I am going to Lisbon tomorrow.")], "demo-1")
    yield check_receipt(
        "turn 1 goes to a prefill rank and computes its whole prompt", first.receipt, num_cached=0, remote=True
    )
    again = client.run_turn(
        session.id,
        [*opening, user("Hello! I am going to Lisbon tomorrow.")],
        sampling=SAMPLING,
        idempotency_key="demo-1",
    ).result()
    yield Check(
        claim="the same turn sent again gets the first result",
        holds=(again.content, again.turn_id, again.receipt) == (first.content, first.turn_id, first.receipt),
        figures=f"turn {first.turn_id}",
    )

    say.heading("Turn 2: a tool call")
    console.print(
        "The model is random and calls no tool by itself: its call is imported, as any history could be.",
        style="yellow",
    )
    call = Message(role=Role.ASSISTANT, tool_calls=(CALL,))
    recorded = say.turn([user("What is the weather there?"), call], "demo-2")
    waiting = client.get_session(session.id)
    yield Check(
        claim="the session waits for the tool's result",
        holds=recorded.finish_reason == common_pb2.FINISH_REASON_RECORDED
        and waiting.state == session_pb2.SESSION_STATE_WAITING_FOR_TOOLS
        and [pending.id for pending in waiting.pending_tool_calls] == [CALL.id],
        figures=f"{len(waiting.pending_tool_calls)} call pending",
    )
    second = say.turn([tool_result(CALL, '{"sky": "clear", "celsius": 21}')], "demo-3")
    yield check_receipt("turn 2 computes only what is new", second.receipt, num_cached=_known(first))

    say.heading("Turn 3: one more question")
    third = say.turn([user("Thank you! What should I pack?")], "demo-4")
    yield check_receipt("turn 3 computes only what is new", third.receipt, num_cached=_known(second))
    yield _history_check(client, session.id)
    client.delete_session(session.id)
    yield _pages_check(client)


class _Narrator:
    """Says what is going on while it runs turns of one session."""

    def __init__(self, client: Client, session_id: str, console: Console) -> None:
        self._client = client
        self._session_id = session_id
        self._console = console

    def heading(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}")

    def turn(self, messages: list[Message], key: str) -> Turn:
        for message in messages:
            what = message.content or " ".join(f"→ {call.name} {call.arguments_json}" for call in message.tool_calls)
            self._console.print(f"[bold]{message.role.name.lower()}>[/]", end=" ")
            self._console.out(what, highlight=False)
        if messages[-1].role is Role.ASSISTANT:
            return self._client.run_turn(self._session_id, messages, idempotency_key=key).result()
        self._console.print("[bold]assistant>[/]", end=" ")
        with self._client.run_turn(self._session_id, messages, sampling=SAMPLING, idempotency_key=key) as stream:
            turn = print_turn(stream, self._console)
        self._console.print(receipt_line(turn.receipt), style="dim", markup=False, highlight=False, soft_wrap=True)
        return turn


def _known(before: Turn) -> int:
    """Tokens whose entries an earlier turn left behind: all but the last, which was sampled and never read."""
    return before.receipt.num_prompt_tokens + before.receipt.num_output_tokens - 1


def check_receipt(claim: str, receipt: events_pb2.Receipt, *, num_cached: int, remote: bool | None = None) -> Check:
    """Whether a turn found ``num_cached`` tokens and computed exactly the others, once.

    remote: True = on a prefill rank, all but the last token; None = wherever placement put it.
    """
    computed = receipt.num_decode_computed_tokens + receipt.num_prefill_computed_tokens
    was_remote = receipt.path == events_pb2.PREFILL_PATH_REMOTE
    where = "on a prefill rank, all but the last token" if was_remote else "on the decode rank"
    return Check(
        claim=claim,
        holds=receipt.num_cached_tokens == num_cached
        and computed == receipt.num_prompt_tokens - num_cached
        and (not was_remote or receipt.num_decode_computed_tokens == 1)
        and remote in (None, was_remote),
        figures=f"{receipt.num_prompt_tokens} prompt = {num_cached} cached + {computed} computed {where}"
        if receipt.num_cached_tokens == num_cached
        else f"{receipt.num_cached_tokens} cached instead of {num_cached}",
    )


def _history_check(client: Client, session_id: str) -> Check:
    roles = [message.role.name.lower() for message in client.get_history(session_id).messages]
    expected = ["system", "user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant"]
    return Check(
        claim="the history holds every message in order", holds=roles == expected, figures=f"{len(roles)} messages"
    )


def _pages_check(client: Client) -> Check:
    deadline = time.monotonic() + STATE_TIMEOUT_S
    while not all(map(_is_idle, ranks := client.list_ranks())) and time.monotonic() < deadline:
        time.sleep(0.1)  # a router hears of a rank's state at least once a second
    pools = [worker_pb2.Pool.Name(rank.state.pool).removeprefix("POOL_").lower() for rank in ranks]
    return Check(
        claim="all ranks are healthy and every page is back",
        holds=all(map(_is_idle, ranks)) and {"decode", "prefill"} <= set(pools),
        figures="ranks: " + ", ".join(f"{pools.count(pool)} {pool}" for pool in sorted(set(pools))),
    )


def _is_idle(rank: admin_pb2.Rank) -> bool:
    state = rank.state
    pages_are_back = state.num_free_pages + state.num_cached_pages == state.num_pages
    return rank.alive and state.healthy and state.num_reservations == 0 and pages_are_back
