"""A tiny model of the real architecture behind a real engine, and a client that collects one request's events."""

from __future__ import annotations

import importlib.util
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seamount.kernels.layout import CacheLayout
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine import Engine
from seamount.workers.events import EngineEvent, Failed, Finished, Progress, TokenLogprobs, Tokens
from seamount.workers.experts.dispatch import ExpertParallel, LocalExperts
from seamount.workers.gang import Gang
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.scheduler import EngineLimits

torch.set_num_threads(1)
WAIT_S = 30.0
SALT = bytes(32)
NEVER_EOS = -1
"""Most tests want to choose where a sequence ends; a random model would end it anywhere."""


def engine_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        index_n_heads=32,
        index_head_dim=16,
        index_topk=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=163840,
        rope_theta=10000.0,
        yarn=None,
        bos_token_id=0,
        eos_token_id=1,
    )


def engine_model(experts: ExpertParallel) -> Transformer:
    """The same random weights for every rank; each gets the experts it owns."""
    config = engine_config()
    parameters: dict[str, torch.Tensor] = {}
    owned = experts.map.owned(experts.rank)
    generator = torch.Generator().manual_seed(20)
    for name, shape in sorted(parameter_shapes(config, range(config.n_routed_experts)).items()):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name in parameter_shapes(config, owned):
            is_norm = name.endswith("norm.weight")
            parameters[name] = 1 + 0.1 * noise if is_norm else noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
    parameters["lm_head.weight"] *= 4  # distinct probabilities
    layout = CacheLayout.create(
        "exact",
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        dtype=torch.float64,
    )
    return Transformer(config, layout, parameters, experts)


@dataclass
class Client:
    """Collects one request's events as its sink."""

    reservation: Reservation
    done: threading.Event = field(default_factory=threading.Event)
    first_token: threading.Event = field(default_factory=threading.Event)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    last: Finished | Failed | None = None
    first_index: int | None = None

    def __call__(self, event: EngineEvent) -> None:
        assert self.last is None, f"{event} after {self.last}"
        self.threads.add(threading.current_thread().name)
        match event:
            case Progress():
                self.progress.append(event.num_computed)
            case Tokens():
                if self.first_index is None:
                    self.first_index = event.first_index
                assert event.first_index == self.first_index + len(self.token_ids)
                self.token_ids.extend(event.token_ids)
                self.logprobs.extend(event.logprobs)
                self.first_token.set()
            case _:
                self.last = event
                self.done.set()

    def finished(self) -> Finished:
        assert self.done.wait(WAIT_S), "the request did not end"
        assert isinstance(self.last, Finished), self.last
        return self.last

    def failed(self) -> Failed:
        assert self.done.wait(WAIT_S), "the request did not end"
        assert isinstance(self.last, Failed), self.last
        return self.last


@dataclass
class Rank:
    """One engine with its caches."""

    engine: Engine
    reservations: Reservations
    salt: int = 0

    def ask(self, prompt: Sequence[int], sampling: SamplingParams | None, **more: Any) -> Client:
        """Reserve and submit. Every prompt has a tenant of its own unless ``share`` is given."""
        self.salt += 1
        salt = SALT if more.pop("share", False) else self.salt.to_bytes(32, "little")
        reservation = self.reservations.reserve(
            session_id="",
            turn_id=f"turn-{self.salt}",
            epoch=1,
            attempt=1,
            salt=salt,
            token_ids=prompt,
            time_to_live_s=30.0,
        )
        client = Client(reservation)
        self.engine.submit(
            EngineRequest(id=reservation.id, reservation=reservation, sampling=sampling, **({"sink": client} | more))
        )
        return client

    def generate(self, prompt: Sequence[int], sampling: SamplingParams, **more: Any) -> list[int]:
        """One request alone, to its end, with its pages given back."""
        client = self.ask(prompt, sampling, **more)
        client.finished()
        self.reservations.release(client.reservation.id)
        return client.token_ids

    def close(self) -> None:
        """Stop, and check that every page is back."""
        self.engine.stop()
        for reservation_id in list(self.reservations._live.by_id):
            self.reservations.release(reservation_id)
        self.reservations.check_invariants()
        state = self.reservations.state()
        assert state.num_reservations == 0
        assert state.num_free + state.num_cached == state.num_pages


def build_rank(
    *,
    model: Transformer | None = None,
    gang: Gang | None = None,
    num_pages: int = 64,
    chunk: int = 64,
    max_batch_tokens: int = 128,
    max_running: int = 16,
    **more: Any,
) -> Rank:
    gang = gang or Gang.alone()
    model = model or engine_model(LocalExperts(engine_config().n_routed_experts))
    planes = model.layout.allocate(model.config.num_hidden_layers, num_pages, model.device)
    for plane in (*planes.latent, *planes.index):
        plane.fill_(0xFF)  # NaN: nobody may depend on what is not written
    reservations = Reservations(num_pages=num_pages, fingerprint="f", layout=model.layout.signature)
    limits = {name: more.pop(name) for name in ("max_waiting", "max_context_tokens") if name in more}
    engine = Engine(
        model=model,
        planes=planes,
        reservations=reservations,
        gang=gang,
        limits=EngineLimits(
            max_batch_tokens=max_batch_tokens, max_running=max_running, prefill_chunk_tokens=chunk, **limits
        ),
        **({"eos_token_id": NEVER_EOS, "vocab_limit": model.config.vocab_size} | more),
    )
    return Rank(engine, reservations)


@pytest.fixture(scope="session")
def layer_reference() -> ModuleType:
    """The float32 layer of ``layer_reference.py`` beside this file."""
    spec = importlib.util.spec_from_file_location("layer_reference", Path(__file__).with_name("layer_reference.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_model() -> Transformer:
    return engine_model(LocalExperts(engine_config().n_routed_experts))


@pytest.fixture
def make_rank(shared_model: Transformer) -> Iterator[Callable[..., Rank]]:
    """Makes started ranks; at the end stops them and checks that every page is back."""
    ranks: list[Rank] = []

    def make(*, start: bool = True, **settings: Any) -> Rank:
        rank = build_rank(**({"model": shared_model} | settings))
        ranks.append(rank)
        if start:
            rank.engine.start()
        return rank

    yield make
    for rank in ranks:
        rank.close()


@pytest.fixture
def rng() -> random.Random:
    """Fresh random inputs; the seed is shown when the test fails."""
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def sharded_model() -> Callable[[ExpertParallel], Transformer]:
    return engine_model


@pytest.fixture
def form_gang() -> Callable[..., list[Gang]]:
    """Makes a gang in threads of this process, the store on a port of its own choice: (size, timeout_s)."""
    return _form_gang


def _form_gang(size: int, timeout_s: float) -> list[Gang]:
    ports: queue.Queue[int] = queue.Queue()

    def announce(port: int) -> None:
        for _ in range(size - 1):
            ports.put(port)

    def member(rank: int) -> Gang:
        return Gang.join(
            store_host="127.0.0.1",
            store_port=0 if rank == 0 else ports.get(timeout=10),
            gang_id="g",
            rank=rank,
            size=size,
            timeout_s=timeout_s,
            host_store=rank == 0,
            on_listening=announce,
        )

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))
