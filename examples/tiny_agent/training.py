"""One run of one stage: batches in, parameters moved, metrics out, until the steps or the minutes are used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from examples.tiny_agent.attention import DenseAttention
from examples.tiny_agent.costs import H100_BF16_FLOPS, training_flops
from examples.tiny_agent.data import Batch
from examples.tiny_agent.feeding import Fed, Targets, feed
from examples.tiny_agent.indexing import IndexerWarmUp, Rows, SelectedAttention
from examples.tiny_agent.model import Angles, Attend, Model, MoE
from examples.tiny_agent.objectives import HeadSums, cross_entropy
from examples.tiny_agent.optimizer import Optimizer
from examples.tiny_agent.parallel import Ranks
from examples.tiny_agent.stages import BALANCE_SPEED, Kind, Stage, trained_parameters

LOG_EVERY = 10


@dataclass(slots=True)
class Sums:
    """This rank's, over the steps since the last line of metrics; tensors stay on the device until then."""

    totals: dict[str, Tensor | float] = field(default_factory=dict)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self.totals[name] = self.totals.get(name, 0.0) + kept

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Those of all ranks."""
        totals = ranks.totals(*(float(value) for value in self.totals.values()))
        taken = dict(zip(self.totals, totals, strict=True))
        self.totals.clear()
        return taken


class Training:
    """model: on the device where it trains, in float32. step: of the stage, where an earlier run stopped. ranks: those
    that train together; each is given its own sequences."""

    def __init__(self, model: Model, stage: Stage, *, seed: int, step: int = 0, ranks: Ranks | None = None) -> None:
        self.model, self.stage, self.step = model, stage, step
        self._device = model.embed_tokens.device
        self._first_step = step
        self._ranks = ranks or Ranks()
        mtp = stage.kind is Kind.INDEXER or stage.mtp_weight > 0
        trained = trained_parameters(model, stage.kind, mtp=mtp)
        self._trained = [*trained.matrices, *trained.others]
        self._optimizer = Optimizer(trained.matrices, trained.others)
        # The rows that the indexer learns from depend on the step alone, not on where runs were cut.
        self._generator = torch.Generator(device=self._device)
        self._seed = seed
        self._sums = Sums()
        self.done = step >= stage.steps

    def run(
        self,
        batches: Iterator[Batch],
        *,
        deadline: float,
        max_steps: int | None = None,
        end: float | None = None,
        on_metrics: Callable[[dict[str, Any]], None],
    ) -> None:
        """Train until the stage is done, ``max_steps`` were made, or ``time.monotonic()`` reaches ``deadline``.

        end: when the stage is to be done; one that is too slow for its steps is done after fewer, its learning rates
        fallen as if they had been all. Its first step, which compiles, is not counted.
        """
        began: float | None = None
        last = self.stage.steps if max_steps is None else min(self.stage.steps, self.step + max_steps)
        logged = time.monotonic()
        while self.step < last:
            now = time.monotonic()
            progress, over = self._ranks.first(self._progress(now, began, end), float(now >= deadline))
            self.done = progress >= 1
            if self.done or over:
                break
            self.train(feed(next(batches), self._device), progress)
            if began is None:
                began = self._finished()
            if self.step % LOG_EVERY == 0:
                on_metrics(self._metrics(logged))
                logged = time.monotonic()
        if self._sums.totals:
            on_metrics(self._metrics(logged))
        self.done = self.done or self.step == self.stage.steps

    def _progress(self, now: float, began: float | None, end: float | None) -> float:
        by_steps = self.step / self.stage.steps
        if began is None or end is None:
            return by_steps
        return max(by_steps, (now - began) / (end - began) if end > began else 1.0)

    def _finished(self) -> float:
        """When the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def train(self, batch: Fed, progress: float | None = None) -> None:
        """One step. progress: share of the stage that is behind; None for that of its steps."""
        self._generator.manual_seed(self._seed * 1_000_003 + self.step)
        angles = self.model.angles(batch.positions)
        if self.stage.kind is Kind.INDEXER:
            self._train_indexer(batch, angles)
        else:
            self._train_model(batch, angles)
        self._ranks.sum_gradients(self._trained)
        share = self.step / self.stage.steps if progress is None else progress
        factor = self.stage.lr_factor(share, self.step - self._first_step)
        self._optimizer.step(factor * self.stage.matrix_lr, factor * self.stage.other_lr)
        flops = training_flops(self.model.config, self.stage.kind, batch)
        self._sums.add(lr=factor * self.stage.matrix_lr / self._ranks.size)
        self._sums.add(steps=1.0 / self._ranks.size, tokens=float(batch.num_tokens), flops=flops)
        self.step += 1

    def _train_indexer(self, batch: Fed, angles: Angles) -> None:
        rows = self._rows(batch)
        scale = self.model.config.softmax_scale
        attend = IndexerWarmUp(rows, DenseAttention(batch.document_ids, scale), scale, self._generator)
        with torch.no_grad():
            x, _ = self.model(batch.tokens, angles, attend)
            self.model.forward_mtp(x, batch.tokens.roll(-1, 1), angles, attend)
        self._sums.add(divergence=attend.divergence)

    def _train_model(self, batch: Fed, angles: Angles) -> None:
        attend = self._attend(batch)
        hidden, loads = self.model(batch.tokens, angles, attend)
        own = self._predict(self.model.head_input(hidden), batch.next_tokens)
        count, count_ahead = self._ranks.totals(batch.next_tokens.count, batch.after_next.count)
        total = loss = own.loss / max(1.0, count)
        if self.stage.mtp_weight:
            merged, load = self.model.forward_mtp(hidden, batch.tokens.roll(-1, 1), angles, attend)
            mtp_loss = self._predict(merged, batch.after_next).loss / max(1.0, count_ahead)
            total = loss + self.stage.mtp_weight * mtp_loss
            self._sums.add(mtp_loss=mtp_loss)
            loads.append(load)
        total.backward()
        self._ranks.sum(loads)
        imbalance = balance(self.model, loads) / self._ranks.size
        self._sums.add(loss=loss, imbalance=imbalance, accuracy=own.seen / max(1.0, count))
        if isinstance(attend, SelectedAttention):
            self._sums.add(divergence=attend.divergence)

    def _attend(self, batch: Fed) -> Attend:
        scale = self.model.config.softmax_scale
        if self.stage.kind is Kind.DENSE:
            return DenseAttention(batch.document_ids, scale)
        rows = self._rows(batch)
        return SelectedAttention(rows, self.model.config.index_topk, scale, self._generator)

    def _rows(self, batch: Fed) -> Rows:
        return Rows(batch.document_ids, batch.positions, self._ranks.totals(batch.num_tokens)[0])

    def _predict(self, hidden: Tensor, targets: Targets) -> HeadSums:
        rows = hidden.flatten(0, 1).index_select(0, targets.rows)
        return cross_entropy(rows, self.model.lm_head, targets.tokens, targets.weights)

    def _metrics(self, since: float) -> dict[str, Any]:
        """Of all ranks' steps since a time; waits for the device."""
        sums = self._sums.take(self._ranks)
        seconds = time.monotonic() - since
        steps, tokens, flops = (sums.pop(name) for name in ("steps", "tokens", "flops"))
        means = {name: value / steps for name, value in sums.items()}
        if "divergence" in means:
            means["divergence"] /= sum(1 for _ in self.model.all_layers())
        on_gpu = self._device.type == "cuda"
        return {
            "stage": self.stage.name,
            "step": self.step,
            **{name: round(value, 7 if name == "lr" else 5) for name, value in means.items()},
            "tokens_per_s": round(tokens / seconds),
            "mfu": round(flops / seconds / (self._ranks.size * H100_BF16_FLOPS), 4),
            "seconds": round(seconds, 3),
            **({"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)} if on_gpu else {}),
        }


@torch.no_grad()
def balance(model: Model, loads: list[Tensor]) -> Tensor:
    """Move each gate's bias by ``BALANCE_SPEED`` towards equal loads; loads: [E] tokens of each MoE layer in order, the
    multi-token prediction layer's last or left out.

    Returns the mean over layers of the largest load over the mean load.
    """
    gates = [layer.mlp for layer in model.all_layers() if isinstance(layer.mlp, MoE)]
    worst = loads[0].new_zeros(())
    for gate, load in zip(gates, loads, strict=False):
        gate.gate_bias += BALANCE_SPEED * torch.sign(load.mean() - load)
        worst += load.max() / load.mean()
    return worst / len(loads)
