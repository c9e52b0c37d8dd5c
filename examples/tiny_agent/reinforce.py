"""The reinforcement stage: tasks attempted in groups, weighed by what their checkers say (GRPO).

    A_i = reward_i - mean of its group's rewards        (not divided by the deviation: arXiv 2512.02556)

Each step samples ``GROUP`` attempts at every one of ``TASKS`` tasks with the model as it is served (bfloat16, selected
tokens, index keys in FP8) and makes one update on what was sampled: PPO's clipped ratio against the probabilities that
the sampling returned, every sampled token weighing the same. The indexers stay as they are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.tiny_agent.config import DENSE_LENGTH
from examples.tiny_agent.data import PADDING
from examples.tiny_agent.episodes import Episode
from examples.tiny_agent.export import checkpoint_views
from examples.tiny_agent.indexing import Rows, SelectedAttention
from examples.tiny_agent.model import Model
from examples.tiny_agent.objectives import policy_loss
from examples.tiny_agent.optimizer import Optimizer
from examples.tiny_agent.parallel import Ranks
from examples.tiny_agent.rollouts import Reply, Rollouts
from examples.tiny_agent.stages import Kind, trained_parameters
from examples.tiny_agent.tasks import make_task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.kernels.layout import CacheLayout
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer

TASKS, GROUP = 128, 8
KINDS: Mapping[TaskKind, float] = MappingProxyType(
    {
        TaskKind.SINGLE: 0.1,
        TaskKind.MULTI: 0.35,
        TaskKind.PARALLEL: 0.1,
        TaskKind.ERRORS: 0.15,
        TaskKind.FOLLOW_UP: 0.15,
        TaskKind.NO_TOOL: 0.05,
        TaskKind.PLAN: 0.1,
    }
)
"""Shares of the tasks; needles are left out."""
MAX_NEW = 256
"""Tokens of one reply; gold ones have up to about 220."""
ROWS = 16
"""Sequences of ``DENSE_LENGTH`` tokens in one backward pass."""
MATRIX_LR, OTHER_LR = 2e-4, 2e-4
"""At the first step; they fall linearly to 0 behind the last one."""
INVALID_CALL_COST = 0.2
STEPS = 40
"""Of the whole stage."""


class Attempt(Protocol):
    """An attempt at a task, as ``episodes.Episode`` makes them."""

    done: bool

    def prompt(self) -> Sequence[int]:
        """All tokens up to the assistant's next reply."""

    def take(self, token_ids: Sequence[int]) -> None:
        """What the assistant said to that, EOS included where it came."""


Tried = TypeVar("Tried", bound=Attempt)


@dataclass(slots=True)
class Transcript:
    """Tokens of one context. drawn: each sampled one's log-probability, NaN for the others."""

    token_ids: list[int] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)

    def extend(self, prompt: Sequence[int], reply: Reply) -> bool:
        """Append what the prompt has beyond this context, and the reply; False if it does not continue it."""
        known = len(self.token_ids)
        if list(prompt[:known]) != self.token_ids:
            return False
        self.token_ids += [*prompt[known:], *reply.token_ids]
        self.drawn += [*[float("nan")] * (len(prompt) - known), *reply.logprobs]
        return True


def attempt(
    attempts: Sequence[Attempt], rollouts: Rollouts, *, generator: torch.Generator, temperature: float = 1.0
) -> list[list[Transcript]]:
    """Run all attempts to their end, side by side, each at its own pace; what the contexts of each held.

    One whose prompt leaves no room in a context of ``rollouts`` stays undone.
    """
    transcripts: list[list[Transcript]] = [[] for _ in attempts]
    prompts: dict[int, Sequence[int]] = {}

    def ask(number: int) -> None:
        prompt = attempts[number].prompt()
        if len(prompt) < rollouts.max_tokens:
            prompts[number] = prompt
            rollouts.ask(number, prompt)

    for number in range(len(attempts)):
        ask(number)
    while rollouts.is_busy:
        replies = rollouts.step(max_new=MAX_NEW, temperature=temperature, generator=generator)
        for number, reply in replies.items():
            contexts = transcripts[number]
            if not contexts or not contexts[-1].extend(prompts[number], reply):
                contexts.append(Transcript())
                contexts[-1].extend(prompts[number], reply)
            attempts[number].take(reply.token_ids)
            if not attempts[number].done:
                ask(number)
    return transcripts


def advantages(rewards: Sequence[float], group: int) -> list[float]:
    """Each reward minus its group's mean; groups are consecutive."""
    groups = np.asarray(rewards, np.float64).reshape(-1, group)
    return [float(value) for value in (groups - groups.mean(1, keepdims=True)).reshape(-1)]


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


def draw_attempts(step: int, *, seed: int, tokenizer: Tokenizer, ranks: Ranks) -> list[Episode]:
    """``GROUP`` episodes of each task of a step that is this rank's, groups together."""
    history = History(tokenizer, "reinforcement")
    kinds = random.Random(repr((seed, step))).choices(list(KINDS), list(KINDS.values()), k=TASKS)
    own = ranks.share(TASKS)
    tasks = [
        make_task(kinds[i], split=Split.TRAINING, seed=seed, index=step * TASKS + i)
        for i in range(ranks.rank * own, (ranks.rank + 1) * own)
    ]
    return [Episode(task, tokenizer, history) for task in tasks for _ in range(GROUP)]


def reward(episode: Episode) -> float:
    """1 for a task that was done; a part of each call that its tool could not take is lost."""
    if not episode.done:
        return 0.0
    outcome = episode.outcome()
    invalid = (outcome.num_calls - outcome.num_valid_calls) / max(1, outcome.num_calls)
    return float(outcome.succeeded) - INVALID_CALL_COST * invalid


class Reinforcement:
    """model: on the device where it trains, after the sparse stage. ranks: each attempts tasks of its own."""

    def __init__(self, model: Model, *, seed: int, ranks: Ranks | None = None) -> None:
        self.model, self._ranks = model, ranks or Ranks()
        self._device = model.embed_tokens.device
        trained = trained_parameters(model, Kind.DENSE, mtp=False)
        self._trained = [*trained.matrices, *trained.others]
        self._optimizer = Optimizer(trained.matrices, trained.others, weight_decay=0.0)
        # Ranks draw differently.
        self._generator = torch.Generator(device=self._device).manual_seed(seed * self._ranks.size + self._ranks.rank)
        served = served_model(model)
        conversations = self._ranks.share(TASKS) * GROUP
        self._rollouts = Rollouts(served, num_conversations=conversations, max_tokens=DENSE_LENGTH)

    def step(
        self, attempts: Sequence[Tried], judge: Callable[[Tried], float], *, lr_factor: float = 1.0
    ) -> dict[str, float]:
        """Sample, judge, update; returns figures over all ranks.

        attempts: this rank's groups one after the other; judge: the reward of one that is over; lr_factor: of the
        learning rates.
        """
        began = time.monotonic()
        transcripts = attempt(attempts, self._rollouts, generator=self._generator)
        rewards = [judge(tried) for tried in attempts]
        weights = advantages(rewards, GROUP)
        samples = [(one, weight) for many, weight in zip(transcripts, weights, strict=True) for one in many]
        mixed = float(np.asarray(weights).reshape(-1, GROUP).any(1).sum())
        sampled_s = time.monotonic() - began
        loss, clipped, num_sampled = self._update([sample for sample in samples if sample[1] != 0], lr_factor)
        self._rollouts.use(served_model(self.model))
        total, count, mixed, loss, clipped = self._ranks.totals(sum(rewards), len(rewards), mixed, loss, clipped)
        return {
            "reward": total / count,
            "mixed_groups": mixed * GROUP / count,
            "loss": loss,
            "clipped": clipped / max(1.0, num_sampled),
            "learnt_tokens": num_sampled,
            "sampling_s": round(sampled_s, 2),
        }

    def _update(self, samples: Sequence[tuple[Transcript, float]], lr_factor: float) -> tuple[float, float, float]:
        """Returns this rank's part of the loss, its clipped tokens, and the sampled tokens of all ranks."""
        (num_sampled,) = self._ranks.totals(sum(int((~np.isnan(one.drawn)).sum()) for one, _ in samples))
        loss, clipped = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        for block in packed(samples, DENSE_LENGTH, self._device):
            part, some = policy_gradient(self.model, block, num_sampled)
            loss, clipped = loss + part, clipped + some
        if num_sampled:
            self._ranks.sum_gradients(self._trained)
            self._optimizer.step(lr_factor * MATRIX_LR, lr_factor * OTHER_LR)
        return float(loss), float(clipped), num_sampled


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


def served_model(model: Model) -> Transformer:
    """The serving engine's model with the parameters as they are now, in the activations' dtype."""
    config = model.config
    layout = CacheLayout.create(
        "bf16" if model.dtype == torch.bfloat16 else "exact",
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        dtype=model.dtype,
    )
    views = checkpoint_views(model)
    names = parameter_shapes(config, range(config.n_routed_experts))
    # Copies: what the model keeps in float32 must not change while it samples.
    return Transformer(
        config, layout, {name: views[name].clone() for name in names}, LocalExperts(config.n_routed_experts)
    )
