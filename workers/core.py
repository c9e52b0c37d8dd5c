"""What a rank computes with: gang, model, caches and engine, put together in order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from seamount.kernels.layout import CachePlanes
from seamount.wire.errors import InvalidArgument, SeamountError
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier
from seamount.workers.engine import Engine
from seamount.workers.engine_counts import StepKind
from seamount.workers.experts.dispatch import ExpertParallel, GangExperts, LocalExperts
from seamount.workers.gang import Gang
from seamount.workers.loading import LoadingProgress, OnLoading
from seamount.workers.model.checkpoint_files import model_fingerprint
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.transformer import Transformer
from seamount.workers.model.weights import load_model
from seamount.workers.scheduler import EngineLimits
from seamount.workers.spec import RankSpec
from seamount.workers.tiers.mover import Mover
from seamount.workers.tiers.opening import open_tiers
from seamount.workers.vocabulary import vocabulary_size
from seamount.workers.warmup import warm_up

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where a gang meets. Rank 0 opens the store and tells ``on_listening`` its port; the others know host and port."""

    host: str
    port: int = 0
    on_listening: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCore:
    """Of one rank, when made: the mover runs, the engine does not yet."""

    model: Transformer
    planes: CachePlanes
    fingerprint: str
    reservations: Reservations
    engine: Engine
    mover: Mover


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHooks:
    """on_loading: told how far the weights are read, at each percent; on_warm: called once every kernel has been
    launched, on a GPU; on_fatal, on_step: as of ``Engine``."""

    on_loading: OnLoading | None
    on_warm: Callable[[], None]
    on_fatal: Callable[[SeamountError], None]
    on_step: Callable[[StepKind, float], None]


def build_core(spec: RankSpec, rendezvous: Rendezvous, hooks: RankHooks, *, deleted: Collection[str]) -> RankCore:
    """Meet the gang, load the model, warm it up. Blocks for seconds or minutes: not on the event loop.

    deleted: sessions of which nothing is taken over from disk. Raises typed errors for an unusable checkpoint or a gang
    that does not form.
    """
    torch.set_num_threads(spec.num_threads)
    gang = Gang.join(
        store_host=rendezvous.host,
        store_port=rendezvous.port,
        gang_id=spec.gang_id,
        rank=spec.gang_rank,
        size=spec.gang_size,
        timeout_s=spec.step_timeout_s,
        host_store=spec.gang_rank == 0,
        bind_host=spec.host,
        on_listening=rendezvous.on_listening,
    )
    try:
        return _built(spec, gang, hooks, deleted)
    except BaseException:
        gang.close()
        raise


def _built(spec: RankSpec, gang: Gang, hooks: RankHooks, deleted: Collection[str]) -> RankCore:
    config = ModelConfig.from_json(spec.model_path)
    device = _device(spec)
    model = load_model(
        spec.model_path,
        dtype=DTYPES[spec.dtype],
        layout_name=spec.layout,
        experts=_experts(config, gang),
        progress=LoadingProgress(hooks.on_loading),
        device=device,
    )
    fingerprint = model_fingerprint(spec.model_path)
    planes = model.layout.allocate(config.num_hidden_layers, spec.num_pages, device)
    host, disk = open_tiers(spec, planes, fingerprint=fingerprint, layout=model.layout.signature)
    reservations = Reservations(
        num_pages=spec.num_pages,
        fingerprint=fingerprint,
        layout=model.layout.signature,
        num_below={
            Tier.HOST: 0 if host is None else host.num_pages,
            Tier.DISK: 0 if disk is None else disk.num_pages,
        },
    )
    engine_limits = EngineLimits(
        max_batch_tokens=spec.max_batch_tokens,
        max_running=spec.max_running,
        prefill_chunk_tokens=spec.prefill_chunk_tokens,
        max_context_tokens=spec.max_context_tokens,
    )
    if device.type == "cuda":
        warm_up(model, planes, gang, engine_limits, topk=config.index_topk, num_pages=spec.num_pages)
        hooks.on_warm()
    mover = Mover(reservations.tiers, planes, host=host, disk=disk)
    mover.start(deleted)
    engine = Engine(
        model=model,
        planes=planes,
        reservations=reservations,
        gang=gang,
        eos_token_id=config.eos_token_id,
        vocab_limit=min(vocabulary_size(spec.model_path), config.vocab_size),
        limits=engine_limits,
        health_timeout_s=spec.step_timeout_s,
        on_fatal=hooks.on_fatal,
        on_step=hooks.on_step,
    )
    return RankCore(
        model=model,
        planes=planes,
        fingerprint=fingerprint,
        reservations=reservations,
        engine=engine,
        mover=mover,
    )


def _device(spec: RankSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(
            "engine.device is cuda, and this process sees no CUDA device; give the rank one, or choose cpu",
            field="engine.device",
        )
    return torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")


def _experts(config: ModelConfig, gang: Gang) -> ExpertParallel:
    if gang.size == 1:
        return LocalExperts(config.n_routed_experts)
    assert gang.group is not None
    return GangExperts(gang.group, config.n_routed_experts)
