"""Several clients talk while processes die, stop and lose each other at random. Judged by what the clients were told,
against a calm system that is told the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from harness.recording import Event, RecordingClient, said
from harness.system import FaultSystem
from seamount.router.client import Sampling, user
from seamount.wire.errors import SeamountError

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

NUM_CLIENTS = 5
FAULTS_FOR_S = 12.0
PATIENCE_S = 60.0
FAIR = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What a call may end with while things die; never INTERNAL, DATA_LOSS or NOT_FOUND."""


@dataclass(slots=True, kw_only=True)
class Conversation:
    """One client's session: the prompts that were answered, in order, and the answers as they were told."""

    session_id: str
    prompts: list[str] = field(default_factory=list)
    answers: list[list[Event]] = field(default_factory=list)
    num_failures: int = 0


def sampling(number: int) -> Sampling:
    return Sampling(max_output_tokens=24, temperature=0.8, seed=number)


async def talk(system: FaultSystem, rng: random.Random, is_over: Callable[[], bool]) -> Conversation:
    """Turn after turn, each under its key until its outcome is known; some callers ask twice, some leave and resume."""
    conversation = Conversation(session_id=await made(system, rng))
    while not is_over():
        number = len(conversation.prompts)
        prompt = f"{conversation.session_id} {number}: what next?"
        told = await outcome(system, rng, conversation, prompt, number)
        conversation.prompts.append(prompt)
        conversation.answers.append(told)
    return conversation


async def made(system: FaultSystem, rng: random.Random) -> str:
    key = f"session {rng.random()}"

    async def make(client: RecordingClient) -> str:
        return (await client.create_session(idempotency_key=key)).id

    return await until_done(system, rng, make)


async def outcome(
    system: FaultSystem, rng: random.Random, conversation: Conversation, prompt: str, number: int
) -> list[Event]:
    """All events of one turn, the same for all who ask for it."""

    async def run(client: RecordingClient) -> list[Event]:
        stream = client.run_turn(
            conversation.session_id,
            [user(prompt)],
            sampling=sampling(number),
            idempotency_key=str(number),
            expected_head=number,
        )
        if rng.random() < 0.3:  # it hears some of it, leaves, and comes back elsewhere
            for _ in range(rng.randrange(1, 10)):
                await anext(stream, None)
            await stream.aclose()
            turn_id = client.told.events[0].turn_id
            stream = client.resume_turn(conversation.session_id, turn_id, after_sequence=len(client.told.events))
        async for _ in stream:
            pass
        return client.told.events

    async def ask() -> list[Event]:
        return await until_done(system, rng, run, conversation)

    if rng.random() < 0.3:
        first, second = await asyncio.gather(ask(), ask())
        assert first == second, "one outcome a key"
        return first
    return await ask()


async def until_done(
    system: FaultSystem,
    rng: random.Random,
    call: Callable[[RecordingClient], Awaitable[list[Event]]] | Callable[[RecordingClient], Awaitable[str]],
    conversation: Conversation | None = None,
) -> object:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            addresses = system.addresses().split(",")
            rng.shuffle(addresses)
            try:
                async with RecordingClient(",".join(addresses)) as client:
                    return await call(client)
            except SeamountError as error:
                if error.code not in FAIR:
                    raise
                if conversation is not None:
                    conversation.num_failures += 1
                await asyncio.sleep(0.1)


async def disturb(system: FaultSystem, rng: random.Random, is_over: Callable[[], bool]) -> list[str]:
    """One fault after the other; those who died are replaced. Returns what was done."""
    done: list[str] = []
    while not is_over():
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        fault = rng.choice(("kill rank", "kill router", "stop", "cut", "kill redis", "cut off"))
        names = sorted(system.cluster.processes)
        ranks = [name for name in names if not name.startswith("router")]
        done.append(fault)
        match fault:
            case "kill rank":
                await system.kill(system.cluster.processes[rng.choice(ranks)].pid)
            case "kill router":
                await system.kill(system.cluster.processes["router-0"].pid)
            case "stop":
                process = system.cluster.processes[rng.choice(names)]
                async with system.stopped(process.pid):
                    await asyncio.sleep(rng.uniform(0.5, 7.0))
            case "cut":
                system.proxies[f"router-{rng.randrange(2)}"].cut()
            case "kill redis":
                await system.kill_redis()
            case "cut off":
                proxy = system.proxies[f"router-{rng.randrange(2)}"]
                proxy.pause()
                await asyncio.sleep(rng.uniform(0.5, 5.0))
                proxy.go_on()
        await system.restore()
    return done


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
async def test_what_clients_were_told(system: FaultSystem, seed: int) -> None:
    until = asyncio.get_running_loop().time() + FAULTS_FOR_S
    rng = random.Random(seed)

    def is_over() -> bool:
        return asyncio.get_running_loop().time() > until

    async with asyncio.TaskGroup() as tasks:
        talking = [
            tasks.create_task(talk(system, random.Random(f"{seed}/{number}"), is_over)) for number in range(NUM_CLIENTS)
        ]
        disturbing = tasks.create_task(disturb(system, rng, is_over))
    conversations, faults = [task.result() for task in talking], disturbing.result()
    num_turns = sum(len(c.prompts) for c in conversations)
    print(f"{num_turns} turns, {sum(c.num_failures for c in conversations)} failed calls; {', '.join(faults)}")
    for conversation in conversations:
        await check(system, conversation)


async def check(system: FaultSystem, conversation: Conversation) -> None:
    """Every acknowledged turn is there, in order, once; and a calm system says the same."""
    async with RecordingClient(system.addresses()) as client:
        history = await client.get_history(conversation.session_id)
        assert history.session.head == len(conversation.prompts)
        assert [message.content for message in history.messages[::2]] == conversation.prompts
        for told in conversation.answers:
            again = [event async for event in client.resume_turn(conversation.session_id, told[0].turn_id)]
            assert again == told
    async with RecordingClient(system.calm) as calm:
        session = await calm.create_session()
        for number, prompt in enumerate(conversation.prompts):
            calm.told.calls.clear()
            await calm.run_turn(session.id, [user(prompt)], sampling=sampling(number)).result()
            assert said(calm.told.events) == said(conversation.answers[number])
