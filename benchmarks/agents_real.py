"""The simulator against the real system: the same sessions through both, on this machine.

Real: a router, Redis and one decode rank as plain processes, a tiny random model on the CPU, a device pool that holds a
few of the sessions and host memory for the rest, so that most turns restore. The simulator gets the lengths and the
think times of these turns, and step times that are measured in the same system before and after the run: fresh prompts
of several lengths, answers of one sequence and of several, and restores. It predicts what is compared below.

    python -m benchmarks.agents_real                the table of docs/performance.md, about 4 minutes
    python -m benchmarks.agents_real --turns 4      a quick look
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import grpc
import typer
from google.rpc import status_pb2
from rich.console import Console

from benchmarks._report import Row, load_average, percentile, publish
from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.scenario import Outcome, Scenario, simulate
from benchmarks.simulation.sessions import IDS_BITS
from benchmarks.simulation.traffic import Plan, Step
from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import Settings, validate
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, session_pb2, session_pb2_grpc
from seamount.wire.errors import from_status
from seamount.wire.hashes import PAGE_SIZE
from seamount.workers.scheduler import EngineLimits

DEVICE_PAGES, MAX_CONTEXT_TOKENS, CHUNK_TOKENS = 136, 8_192, 256
OUTPUT_TOKENS = 16
FIRST_WORDS, NEXT_WORDS = (200, 320), (40, 120)
"""Of four letters; a word and its space are some five tokens."""
THINK_LOG = (1.0, 0.8)
PROBE_WORDS = (20, 300, 700, 1_200)
NUM_TOGETHER = 4
AGREEMENT = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn to be taken: after ``wait_s`` of thinking, with so many words."""

    wait_s: float
    num_words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """How it went. Seconds; ended_at: since the run began."""

    num_prompt: int
    num_cached: int
    num_restored: int
    num_computed: int
    first_token_s: float
    decode_s: float
    ended_at: float


class Sessions:
    """A client of the real router."""

    def __init__(self, address: str, forced: Sequence[int]) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = session_pb2_grpc.SessionServiceStub(self._channel)
        self._metadata = ((FORCED_TOKENS_KEY, ",".join(map(str, forced))),)
        self._keys = itertools.count()
        self._words = random.Random(2)

    async def create(self) -> str:
        request = session_pb2.CreateSessionRequest(thinking_mode=common_pb2.THINKING_MODE_CHAT)
        return (await self._stub.CreateSession(request)).session.id

    async def delete(self, session_id: str) -> None:
        await self._stub.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id))

    async def turn(self, session_id: str, num_words: int, began: float = 0.0) -> Taken:
        request = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key=str(next(self._keys)))
        text = " ".join("".join(self._words.choices("abcdefghij", k=4)) for _ in range(num_words))
        request.messages.add(role=common_pb2.ROLE_USER, content=text)
        request.sampling.max_output_tokens = OUTPUT_TOKENS
        came = time.perf_counter()
        while True:
            attempted = time.perf_counter()
            async for response in self._stub.RunTurn(request, metadata=self._metadata):
                end = response.events[-1]
            if end.HasField("finished"):
                break
            error = from_status(status_pb2.Status.FromString(end.failed.status.SerializeToString()))
            if error.reason != "NO_PAGES":
                raise error
            await asyncio.sleep(error.retry_after_s or 1.0)
        receipt = end.finished.receipt
        return Taken(
            num_prompt=receipt.num_prompt_tokens,
            num_cached=receipt.num_cached_tokens,
            num_restored=receipt.num_host_tokens,
            num_computed=receipt.num_decode_computed_tokens,
            first_token_s=attempted - came + receipt.time_to_first_token.ToNanoseconds() / 1e9,
            decode_s=receipt.decode_time.ToNanoseconds() / 1e9,
            ended_at=time.perf_counter() - began,
        )

    async def close(self) -> None:
        await self._channel.close()


@dataclass(slots=True)
class Probes:
    """What was measured of single parts. alone: fresh prompts; together: decode seconds a token of several at once;
    again: a short turn of a session on the device; restored: of one that had left it."""

    alone: list[Taken]
    together: list[float]
    again: list[Taken]
    restored: list[Taken]

    def costs(self) -> StepCosts:
        """Sums as in ``StepCosts``, from medians."""
        probed = [self.alone[index :: len(PROBE_WORDS)] for index in range(len(PROBE_WORDS))]
        by_length = {round(mean(one.num_prompt for one in found)): found for found in probed}
        points = [(length, median(one.first_token_s for one in found)) for length, found in sorted(by_length.items())]
        prefill = tuple(
            ((low + high) / 2, max(1e-6, (late - early) / (high - low)))
            for (low, early), (high, late) in itertools.pairwise(points)
        )
        decode = [
            (float(length), median(one.decode_s for one in found) / (OUTPUT_TOKENS - 1))
            for length, found in sorted(by_length.items())
        ]
        each_s = max(0.0, (median(self.together) - decode[0][1]) / (NUM_TOGETHER - 1))
        again_s = median(one.first_token_s - one.num_computed * prefill[0][1] for one in self.again)
        assert any(one.num_restored for one in self.restored), "nothing had to be restored: more must fill the device"
        restores = [(one.num_restored, one.first_token_s - one.num_computed * prefill[0][1]) for one in self.restored]
        tokens_per_s = sum(num for num, _ in restores) / max(1e-3, sum(took - again_s for _, took in restores))
        return StepCosts(
            base_s=0.0,
            decode_base_s=max(0.0, decode[0][1] - each_s),
            decode=tuple((length, each_s + took - decode[0][1]) for length, took in decode),
            prefill=prefill,
            kv_bytes_per_token=1,
            turn_s=max(0.0, again_s),
            host_tokens_per_s=max(1.0, tokens_per_s),
        )


async def probe(sessions: Sessions, rounds: int) -> Probes:
    """Measure the parts, one after the other, with sessions that are deleted afterwards."""
    probes = Probes([], [], [], [])
    for _ in range(rounds):
        made = [await sessions.create() for _ in PROBE_WORDS]
        for session_id, num_words in zip(made, PROBE_WORDS, strict=True):
            probes.alone.append(await sessions.turn(session_id, num_words))
        probes.again.append(await sessions.turn(made[-1], 4))
        fillers = [await sessions.create() for _ in range(2)]
        for filler in fillers:
            await sessions.turn(filler, PROBE_WORDS[-1])
        probes.restored.append(await sessions.turn(made[-1], 4))
        few = [await sessions.create() for _ in range(NUM_TOGETHER)]
        taken = await asyncio.gather(*(sessions.turn(one, PROBE_WORDS[0]) for one in few))
        probes.together += [one.decode_s / (OUTPUT_TOKENS - 1) for one in taken]
        for session_id in (*made, *fillers, *few):
            await sessions.delete(session_id)
    return probes


def workload(num_sessions: int, num_turns: int, seed: int) -> list[list[Turn]]:
    rng = random.Random(seed)
    return [
        [
            Turn(wait_s=rng.lognormvariate(*THINK_LOG), num_words=rng.randint(*(NEXT_WORDS if turn else FIRST_WORDS)))
            for turn in range(num_turns)
        ]
        for _ in range(num_sessions)
    ]


async def take(sessions: Sessions, turns: Sequence[Turn], began: float) -> list[Taken]:
    session_id, taken = await sessions.create(), list[Taken]()
    for turn in turns:
        await asyncio.sleep(turn.wait_s)
        taken.append(await sessions.turn(session_id, turn.num_words, began))
    return taken


async def real_run(settings: Settings, work: list[list[Turn]], rounds: int) -> tuple[list[list[Taken]], StepCosts]:
    letters = Tokenizer.load(settings.model.path).encode("abcdefghijklmnopqrstuvwxyz")
    forced = [letters[index % len(letters)] for index in range(OUTPUT_TOKENS)]
    async with LocalCluster(settings=settings, allow_forced_tokens=True) as cluster:
        sessions = Sessions(cluster.address, forced)
        await probe(sessions, 1)  # warm
        probes = await probe(sessions, rounds)
        began = time.perf_counter()
        taken = await asyncio.gather(*(take(sessions, turns, began) for turns in work))
        after = await probe(sessions, rounds)
        await sessions.close()
    for name in ("alone", "together", "again", "restored"):
        getattr(probes, name).extend(getattr(after, name))
    return list(taken), probes.costs()


def plan_of(number: int, turns: Sequence[Turn], taken: Sequence[Taken]) -> Plan:
    """The same turns for the simulator: prompts of the lengths that they had, each beginning with the one before and
    its answer."""
    sampled, text = number << IDS_BITS, array("I")
    fresh = itertools.count((number << IDS_BITS) + (1 << (IDS_BITS - 1)))
    steps: list[Step] = []
    for index, (turn, one) in enumerate(zip(turns, taken, strict=True)):
        if index:
            text = text + array("I", range(sampled, sampled + OUTPUT_TOKENS))
            sampled += OUTPUT_TOKENS
        num_new = one.num_prompt - len(text)
        text = text + array("I", itertools.islice(fresh, num_new))
        num_new += bool(index)  # the answer's last token was never fed back
        steps.append(
            Step(
                tool="", wait_s=turn.wait_s, num_appended=num_new, num_reasoning=0, num_output=OUTPUT_TOKENS, text=text
            )
        )
    return Plan(agent=0, steps=tuple(steps), starts_after_s=turns[0].wait_s)


def simulated(work: list[list[Turn]], taken: list[list[Taken]], costs: StepCosts) -> Outcome:
    plans = [plan_of(number, *one) for number, one in enumerate(zip(work, taken, strict=True), start=1)]
    scenario = Scenario(
        costs=replace(costs, restore_s=0.0),
        page_size=PAGE_SIZE,
        device_pages=DEVICE_PAGES,
        host_pages=1 << 14,
        limits=EngineLimits(max_batch_tokens=512, max_running=64, prefill_chunk_tokens=CHUNK_TOKENS),
        leases=False,
        until_s=24 * 3600.0,
        warm_s=0.0,
        start_within_s=0.0,
    )
    return simulate(scenario, [iter([plan]) for plan in plans])


def compared(taken: Sequence[Taken], outcome: Outcome) -> list[Row]:
    """One row a quantity."""
    turns = outcome.turns
    first = [one.first_token_s for one in taken]
    virtual = [one.first_token_s for one in turns]
    pairs = {
        "turns": (len(taken), len(turns)),
        "turns that restored": (sum(one.num_restored > 0 for one in taken), sum(one.num_restored > 0 for one in turns)),
        "restored tokens": (sum(one.num_restored for one in taken), sum(one.num_restored for one in turns)),
        "computed tokens": (sum(one.num_computed for one in taken), sum(one.num_computed for one in turns)),
        "first token ms, mean": (1e3 * mean(first), 1e3 * mean(virtual)),
        "first token ms, p50": (1e3 * percentile(first, 0.5), 1e3 * percentile(virtual, 0.5)),
        "first token ms, p90": (1e3 * percentile(first, 0.9), 1e3 * percentile(virtual, 0.9)),
        "whole run s": (max(one.ended_at for one in taken), max(one.ended_at for one in turns)),
    }
    return [
        {"quantity": name, "real": float(real), "simulated": float(guess), "ratio": guess / real}
        for name, (real, guess) in pairs.items()
    ]


def main(
    sessions: Annotated[int, typer.Option(min=1, help="At the same time.")] = 8,
    turns: Annotated[int, typer.Option(min=1, max=12, help="Of each session.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Of the probes, before the run and after it.")] = 3,
    seed: Annotated[int, typer.Option(help="Of lengths and think times.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Run the same sessions through the real system and the simulator.

    Examples: python -m benchmarks.agents_real --turns 4 · python -m benchmarks.agents_real --seed 2 --json
    """
    load = load_average()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    work = workload(sessions, turns, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init_checkpoint(folder / "checkpoint", seed=1, geometry="test")
        settings = validate(
            {
                "run_dir": str(folder / "run"),
                "redis": {"data_dir": str(folder / "redis")},
                "model": {"path": str(folder / "checkpoint")},
                "router": {"port": 0, "cut_ahead": False},
                "placement": {"path": "local"},
                "pools": {"prefill": {"gangs": 0}, "decode": {"gangs": 1, "expert_parallel": 1}},
                "engine": {
                    "max_context_tokens": MAX_CONTEXT_TOKENS,
                    "prefill_chunk_tokens": CHUNK_TOKENS,
                    "step_timeout_s": 60,
                },
                "cache": {"num_pages": DEVICE_PAGES},
            }
        )
        taken, costs = asyncio.run(real_run(settings, work, rounds))
    rows = compared([one for session in taken for one in session], simulated(work, taken, costs))
    publish("agents_real", rows, as_json=json, load=load)
    worst = max(abs(float(row["ratio"]) - 1) for row in rows)
    verdict = "agrees" if worst <= AGREEMENT else "DOES NOT AGREE"
    Console(stderr=True).print(costs, highlight=False)
    Console(stderr=True).print(f"furthest ratio off by {worst:.0%}: {verdict} within {AGREEMENT:.0%}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
