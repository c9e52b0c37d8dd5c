"""Who decides how many gangs there are: the system's own ``scaling.decide``, Serve's default policy, or nobody.

Both policies are the real functions. Serve's sees what it would see of a pool: ongoing requests, a mean over
``look_back_period_s``, with its delays, its factors and its rounding to whole gangs; its clock is the virtual one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.gang_scheduling_autoscaling_policy import GangSchedulingAutoscalingPolicy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.simulation.pools import GANG_RANKS, Plant, Pool, State, Wanted
from seamount.cluster.load import GangLoad, History, Slo, Snapshot
from seamount.cluster.scaling import decide
from seamount.workers.spec import PoolName

PAGES_PER_ANSWER = 1_000
"""Only the share of pages in use counts."""


@dataclass(slots=True, kw_only=True)
class Fixed:
    """A static fleet."""

    prefill: int
    decode: int
    every_s: int = 1 << 30

    def first(self) -> Wanted:
        return Wanted(prefill=self.prefill, decode=self.decode)

    def look(self, state: State, plant: Plant) -> Wanted:
        return self.first()


@dataclass(slots=True, kw_only=True)
class Own:
    """``seamount.cluster.scaling``, on what its fleet reads from the directory."""

    slo: Slo
    begins_with: Wanted
    every_s: int = 5
    history: History = field(default_factory=History)

    def first(self) -> Wanted:
        return self.begins_with

    def look(self, state: State, plant: Plant) -> Wanted:
        decision = decide(
            Snapshot(
                now_s=state.now_s,
                gangs=(*_prefill_loads(state, plant), *_decode_loads(state, plant)),
                num_prompt_tokens=round(state.num_prompt_tokens),
                prefill_start_s=plant.start_s,
                decode_start_s=plant.start_s,
                history=self.history,
            ),
            self.slo,
        )
        self.history = decision.history
        return Wanted(prefill=decision.prefill, decode=decision.decode, drain=decision.drain)


def _prefill_loads(state: State, plant: Plant) -> list[GangLoad]:
    pool, share = state.prefill, max(1, state.prefill.num_ready)
    return [
        GangLoad(
            name=gang.name,
            pool="prefill",
            is_ready=gang.ready_at <= state.now_s,
            num_ranks=GANG_RANKS,
            num_running=round(state.num_prefilled / share) if gang.ready_at <= state.now_s else 0,
            num_blocked=round(state.num_queued / share) if gang.ready_at <= state.now_s else 0,
            num_queued_tokens=round(state.queued_tokens / share) if gang.ready_at <= state.now_s else 0,
            prompt_tokens_per_s=plant.prompt_tokens_per_s if gang.ready_at <= state.now_s else 0.0,
        )
        for gang in pool.gangs
    ]


def _decode_loads(state: State, plant: Plant) -> list[GangLoad]:
    """Where there is no prefill gang, what is queued is queued here."""
    share = max(1, state.decode.num_ready)
    num_held = round((state.num_running + state.num_queued) / share * PAGES_PER_ANSWER)
    num_queued_tokens = 0 if state.prefill.num_ready else round(state.queued_tokens / share)
    loads = []
    for gang in state.decode.gangs:
        is_ready = gang.ready_at <= state.now_s
        loads.append(
            GangLoad(
                name=gang.name,
                pool="decode",
                is_ready=is_ready,
                num_ranks=GANG_RANKS,
                num_pages=round(plant.answers_per_gang * PAGES_PER_ANSWER),
                num_held_pages=num_held if is_ready else 0,
                num_running=round(state.num_running / share) if is_ready else 0,
                num_blocked=round(state.num_blocked / share) if is_ready else 0,
                num_queued_tokens=num_queued_tokens if is_ready else 0,
                prompt_tokens_per_s=plant.prompt_tokens_per_s if is_ready else 0.0,
                inter_token_s=state.inter_token_s if is_ready else 0.0,
            )
        )
    return loads


@dataclass(slots=True, kw_only=True)
class ServeDefault:
    """Serve's default policy for each pool. *_target: ongoing requests of a rank."""

    prefill_target: float
    decode_target: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    begins_with: Wanted
    max_gangs: int
    every_s: int = 5
    _pools: dict[PoolName, _ServePool] = field(init=False)

    def __post_init__(self) -> None:
        targets: dict[PoolName, float] = {"prefill": self.prefill_target, "decode": self.decode_target}
        self._pools = {
            name: _ServePool(
                AutoscalingConfig(
                    min_replicas=GANG_RANKS,
                    max_replicas=GANG_RANKS * self.max_gangs,
                    target_ongoing_requests=target,
                    upscale_delay_s=self.upscale_delay_s,
                    downscale_delay_s=self.downscale_delay_s,
                )
            )
            for name, target in targets.items()
        }

    def first(self) -> Wanted:
        return self.begins_with

    def look(self, state: State, plant: Plant) -> Wanted:
        prefill = self._pools["prefill"].wanted(state.prefill, state.num_queued + state.num_prefilled, state.now_s)
        ongoing = state.num_running + state.num_queued + state.num_blocked
        decode = self._pools["decode"].wanted(state.decode, ongoing, state.now_s)
        return Wanted(prefill=prefill, decode=decode)


class _ServePool:
    """One deployment's autoscaling state, as Serve's controller has it."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        default = autoscaling_policy.replica_queue_length_autoscaling_policy
        with_delays = autoscaling_policy._apply_autoscaling_config(default)
        self._policy = GangSchedulingAutoscalingPolicy(with_delays, GANG_RANKS)
        self._state: dict[str, Any] = {}
        self._seen: deque[tuple[float, float]] = deque()

    def wanted(self, pool: Pool, num_ongoing: float, now_s: float) -> int:
        """Gangs."""
        self._seen.append((now_s, num_ongoing))
        while self._seen[0][0] < now_s - self._config.look_back_period_s:
            self._seen.popleft()
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name=pool.name,
            app_name=None,
            current_num_replicas=GANG_RANKS * pool.num_ready,
            target_num_replicas=GANG_RANKS * len(pool.gangs),
            running_replicas=[],
            total_num_requests=sum(seen for _, seen in self._seen) / len(self._seen),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
        with mock.patch.object(autoscaling_policy, "time", SimpleNamespace(time=lambda: now_s)):
            number, self._state = self._policy(context)
        bounded = min(max(number, self._config.min_replicas), self._config.max_replicas)
        return int(bounded) // GANG_RANKS
