"""The reinforcement stage: tasks attempted in groups, weighed by what their checkers say (GRPO).

Processes sample with the model as it is served (``samplers.py``) and tell what became of each group of attempts; those
whose rewards differ are learnt from, ``GROUPS`` of them in an update: PPO's clipped ratio against the probabilities
that sampling returned, every sampled token weighing the same. The trainer attends to what the indexers select, as the
served model does. The indexers, the multi-token prediction layer, the embeddings and the head stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.tiny_agent.attempts import KINDS, Transcript
from examples.tiny_agent.config import DENSE_LENGTH
from examples.tiny_agent.data import PADDING
from examples.tiny_agent.indexing import Rows, SelectedAttention
from examples.tiny_agent.model import Model
from examples.tiny_agent.objectives import policy_loss
from examples.tiny_agent.optimizer import Optimizer
from examples.tiny_agent.parallel import Ranks
from examples.tiny_agent.progress import OnMetrics
from examples.tiny_agent.samplers import Samplers
from examples.tiny_agent.sampling import Measure, Result, Sample, Sizes
from examples.tiny_agent.stages import Kind, trained_parameters

GROUP = 8
"""Attempts at one task."""
GROUPS = 32
"""Of an update: those with different rewards."""
MOST_GROUPS = 8
"""For each of these so many are waited for, whatever their rewards."""
SAMPLERS = 8
"""Processes at the most that sample on one device."""
CONVERSATIONS = 192
"""Of one sampling process at one time."""
MAX_NEW = 352
"""Tokens of one reply; gold ones have up to about 315."""
ROWS = 16
"""Sequences of ``DENSE_LENGTH`` tokens in one backward pass."""
LR = 1e-3
"""Of both optimisers, at the first step; it falls linearly to 0."""
STEPS = 120
"""Of the whole stage, at the most."""
MEASURED = 128
"""Tasks of each kind that are attempted greedily before and after; none of them is learnt from."""
_MEASURED_SEED = 7_000_003
MEASURING_S = 14.0
"""Kept free at the end for the second measurement."""
STAGE, MEASURED_STAGE = "reinforce", "reinforce, measured"
"""Names of its lines of metrics."""


@dataclass(frozen=True, slots=True)
class Packed:
    """[ROWS, T] tensors. advantages: 0 where nothing was sampled."""

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor
    advantages: Tensor
    drawn: Tensor


def packed(samples: Sequence[tuple[Transcript, float]], length: int, device: torch.device) -> Iterator[Packed]:
    """Transcripts of at most ``length`` tokens with their advantages, the longest first, each into the first row that
    has room."""
    rows: list[list[tuple[Transcript, float]]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample[0].token_ids)):
        size = len(sample[0].token_ids)
        fitting = (row for row in rows if sum(len(other.token_ids) for other, _ in row) + size <= length)
        row = next(fitting, None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    for start in range(0, len(rows), ROWS):
        yield _packed_block(rows[start : start + ROWS], length, device)


def _packed_block(rows: Sequence[Sequence[tuple[Transcript, float]]], length: int, device: torch.device) -> Packed:
    tokens, positions = np.zeros((ROWS, length), np.int64), np.zeros((ROWS, length), np.int64)
    ids = np.full((ROWS, length), PADDING, np.int64)
    weights, drawn = np.zeros((ROWS, length), np.float32), np.zeros((ROWS, length), np.float32)
    for b, row in enumerate(rows):
        at = 0
        for number, (transcript, advantage) in enumerate(row):
            own = slice(at, at + len(transcript.token_ids))
            logprobs = np.asarray(transcript.drawn, np.float32)
            sampled = ~np.isnan(logprobs)
            tokens[b, own], ids[b, own] = transcript.token_ids, number
            positions[b, own] = np.arange(len(transcript.token_ids))
            weights[b, own] = np.where(sampled, advantage, 0.0)
            drawn[b, own] = np.where(sampled, logprobs, 0.0)
            at = own.stop
    arrays: tuple[npt.NDArray[Any], ...] = (tokens, ids, positions, weights, drawn)
    return Packed(*(torch.from_numpy(array).to(device) for array in arrays))


class Learner:
    """model: on the device where it trains. ranks: each learns from groups of its own."""

    def __init__(self, model: Model, *, ranks: Ranks | None = None) -> None:
        self.model, self._ranks = model, ranks or Ranks()
        self._device = model.embed_tokens.device
        trained = trained_parameters(model, Kind.DENSE, mtp=False)
        # AdamW moves a token that hardly occurs as far as the others, and a few hundred attempts show few of them.
        for parameter in (model.embed_tokens, model.lm_head):
            parameter.requires_grad_(False)
        others = [parameter for parameter in trained.others if parameter.requires_grad]
        self._trained = [*trained.matrices, *others]
        self._optimizer = Optimizer(trained.matrices, others, weight_decay=0.0)

    def warm_up(self) -> None:
        """Compile what an update runs; nothing changes."""
        transcript = Transcript([0] * DENSE_LENGTH, [float("nan"), *[0.0] * (DENSE_LENGTH - 1)])
        for block in packed([(transcript, 1.0)], DENSE_LENGTH, self._device):
            policy_gradient(self.model, block, 1.0)
        for parameter in self._trained:
            parameter.grad = None

    def saved(self) -> list[Tensor]:
        """Copies of what is trained."""
        return [parameter.detach().clone() for parameter in self._trained]

    @torch.no_grad()
    def restore(self, saved: Sequence[Tensor]) -> None:
        """Put back what ``saved`` returned."""
        for parameter, value in zip(self._trained, saved, strict=True):
            parameter.copy_(value)

    def update(self, samples: Sequence[tuple[Transcript, float]], lr_factor: float = 1.0) -> dict[str, float]:
        """One step on contexts with their advantages; returns figures over all ranks. lr_factor: of ``LR``."""
        (num_sampled,) = self._ranks.totals(sum(int((~np.isnan(one.drawn)).sum()) for one, _ in samples))
        loss, seen = torch.zeros((), device=self._device), torch.zeros(2, device=self._device)
        for block in packed(samples, DENSE_LENGTH, self._device):
            part, some = policy_gradient(self.model, block, num_sampled)
            loss, seen = loss + part, seen + some
        loss_sum, clipped, apart = self._ranks.totals(float(loss), *seen.tolist())
        count = max(1.0, num_sampled)
        lr = lr_factor * LR
        if num_sampled:
            self._ranks.sum_gradients(self._trained)
            self._optimizer.step(lr, lr)
        return {
            "loss": loss_sum,
            "clipped": clipped / count,
            "divergence": apart / count,
            "learnt_tokens": num_sampled,
            "lr": lr,
        }


def policy_gradient(model: Model, block: Packed, num_sampled: float) -> tuple[Tensor, Tensor]:
    """Add the gradient of the policy loss over ``num_sampled``; returns this block's part of it, and clipped tokens."""
    attend = SelectedAttention(
        Rows(block.document_ids, block.positions), model.config.index_topk, model.config.softmax_scale, None
    )
    hidden, _ = model(block.tokens, model.angles(block.positions), attend)
    rows = model.head_input(hidden).flatten(0, 1)
    # The row before a token predicts it; nothing is sampled at the first token of a row, so the last predicts nothing.
    columns = (values.roll(-1, 1).flatten() for values in (block.tokens, block.advantages, block.drawn))
    sums = policy_loss(rows, model.lm_head, *columns)
    (sums.loss / num_sampled).backward()
    return sums.loss.detach() / num_sampled, sums.seen


class Reinforcement:
    """The stage on one rank. model: after the sparse stage, on the device where it trains. num_workers: processes that
    may share this device, ``SAMPLERS`` of them at the most."""

    def __init__(self, model: Model, *, seed: int, num_workers: int, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._learner = Learner(model, ranks=self._ranks)
        self._seed = seed
        sizes = Sizes(num_conversations=CONVERSATIONS, max_tokens=DENSE_LENGTH, max_new=MAX_NEW, group=GROUP)
        count = max(1, min(SAMPLERS, num_workers))
        self._samplers = Samplers(model, sizes, count=count, seed=seed * self._ranks.size + self._ranks.rank)

    def run(self, step: int, *, max_steps: int, deadline: float, end: float, on_metrics: OnMetrics) -> tuple[int, bool]:
        """From ``step`` of the stage on; returns the step reached and whether it is done.

        Success is measured before and after; where it fell, the weights are as they were before.

        max_steps: in this run; deadline: of ``time.monotonic``, when to be over with this run; end: when to be done
        with the stage, after fewer steps if need be.
        """
        last = min(STEPS, step + max_steps)
        with self._samplers:
            self._learner.warm_up()  # while the processes start
            before, saved = self._measured(), self._learner.saved()
            on_metrics({"stage": MEASURED_STAGE, "step": step, **before})
            began, stop, in_time = time.monotonic(), min(deadline, end) - MEASURING_S, True
            self._samplers.begin(Sample(step * 1_000_000 + self._ranks.rank * 500_000, self._seed))
            while step < last and in_time:
                by_time = (time.monotonic() - began) / max(1e-3, end - MEASURING_S - began)
                (progress,) = self._ranks.first(max(step / STEPS, by_time))
                figures = self._step(1 - progress, stop) if progress < 1 else None
                in_time = figures is not None
                if figures is not None:
                    step += 1
                    on_metrics({"stage": STAGE, "step": step, **figures})
            self._samplers.end()
            after = self._measured()
            kept = after["success"] >= before["success"]
            on_metrics({"stage": MEASURED_STAGE, "step": step, **after, "kept": kept})
            if not kept:
                self._learner.restore(saved)
        return step, step == STEPS or (not in_time and end <= deadline)

    def _measured(self) -> dict[str, Any]:
        """Success of greedy attempts at training tasks that nothing is learnt from: of all, and by kind."""
        results = self._samplers.measure(Measure(self._ranks.share(MEASURED), _MEASURED_SEED + self._ranks.rank))
        by_kind = {kind.value: [result.succeeded[0] for result in results if result.kind is kind] for kind in KINDS}
        sums = self._ranks.totals(*(value for many in by_kind.values() for value in (sum(many), len(many))))
        rates = {kind: a / b for kind, a, b in zip(by_kind, sums[::2], sums[1::2], strict=True)}
        return {"success": sum(rates.values()) / len(rates), "success_by_kind": rates}

    def _step(self, lr_factor: float, stop: float) -> dict[str, Any] | None:
        """Wait for groups, learn from them, pass the weights on; None where they had not come when it was to stop."""
        began = time.monotonic()
        results = self._collected(self._ranks.share(GROUPS), stop)
        (missing,) = self._ranks.totals(float(results is None))
        if missing or results is None:
            return None
        collected = time.monotonic()
        version = self._samplers.weights.version
        self._samplers.pause()
        figures = self._learner.update([sample for result in results for sample in result.samples], lr_factor)
        learnt = time.monotonic()
        self._samplers.weights.write(self._learner.model)
        self._samplers.resume()
        seconds = {"sampling_s": collected - began, "learning_s": learnt - collected}
        seconds |= {"seconds": time.monotonic() - began}
        figures |= self._told(results, version)
        return {name: round(value, 7) for name, value in (figures | seconds).items()}

    def _collected(self, count: int, stop: float) -> list[Result] | None:
        """Until ``count`` groups are mixed, or so many came that they hardly will be."""
        results: list[Result] = []
        missing = count
        while missing and len(results) < MOST_GROUPS * count:
            if time.monotonic() >= stop:
                return None
            result = self._samplers.next(timeout=1.0)
            if result is not None:
                results.append(result)
                missing -= bool(result.samples)
        return results

    def _told(self, results: Sequence[Result], version: int) -> dict[str, float]:
        mixed = [result for result in results if result.samples]
        reward, attempts, succeeded, groups, learnt, lag, sampled, tokens = self._ranks.totals(
            sum(sum(result.rewards) for result in results),
            sum(len(result.rewards) for result in results),
            sum(sum(result.succeeded) for result in results),
            len(results),
            len(mixed),
            sum(version - result.version for result in mixed),
            sum(result.num_sampled for result in results),
            sum(result.num_tokens for result in results),
        )
        return {
            "reward": reward / attempts,
            "succeeded": succeeded / attempts,
            "attempts": attempts,
            "mixed_groups": learnt / groups,
            "lag": lag / max(1.0, learnt),
            "sampled_tokens": sampled,
            "context_tokens": tokens,
        }
