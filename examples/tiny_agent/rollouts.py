"""Many conversations continued side by side by the serving model, in one process.

Each conversation owns the pages of one longest context. What it has in the cache stays there between replies, so that a
tool's results cost a prefill of their own tokens and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.transformer import Transformer

PREFILL_TOKENS = 32768
"""New tokens in one step at the most."""


@dataclass(slots=True)
class Reply:
    """token_ids: what was sampled, EOS included where it came. logprobs: of each under the distribution it was drawn
    from."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Rollouts:
    """model: the served one. max_tokens: of a conversation's context. Conversations are numbered from 0."""

    def __init__(self, model: Transformer, *, num_conversations: int, max_tokens: int) -> None:
        self._model, self._max_tokens = model, max_tokens
        pages = -(-max_tokens // PAGE_SIZE)
        self._planes = model.layout.allocate(
            model.config.num_hidden_layers, num_conversations * pages, device=model.device
        )
        self._pages = [list(range(i * pages, (i + 1) * pages)) for i in range(num_conversations)]
        self._cached: list[list[int]] = [[] for _ in range(num_conversations)]
        """The tokens whose cache entries are there."""

    def use(self, model: Transformer) -> None:
        """Go on with other parameters of the same shapes; nothing cached is valid any more."""
        self._model = model
        self._cached = [[] for _ in self._cached]

    @torch.inference_mode()
    def replies(
        self, prompts: dict[int, Sequence[int]], *, max_new: int, temperature: float, generator: torch.Generator
    ) -> dict[int, Reply]:
        """Continue conversations until EOS, ``max_new`` tokens or a full context.

        prompts: by conversation, all tokens of each, at least one. temperature: 0 takes the likeliest token.
        """
        replies = {number: Reply() for number in prompts}
        logits = self._prefill(prompts)
        running = [number for number in prompts if len(prompts[number]) < self._max_tokens]
        rows = {number: row for row, number in enumerate(prompts)}
        logits = logits[[rows[number] for number in running]]
        while running:
            ids, logprobs = draw(logits, temperature, generator)
            for number, token_id, logprob in zip(running, ids.tolist(), logprobs.tolist(), strict=True):
                replies[number].token_ids.append(token_id)
                replies[number].logprobs.append(logprob)
            running = [number for number in running if not self._ended(number, replies[number], max_new)]
            if running:
                logits = self._step([(number, replies[number].token_ids[-1:]) for number in running])
        return replies

    def _ended(self, number: int, reply: Reply, max_new: int) -> bool:
        if reply.token_ids[-1] == self._model.config.eos_token_id:
            return True
        return len(reply.token_ids) == max_new or len(self._cached[number]) == self._max_tokens

    def _prefill(self, prompts: dict[int, Sequence[int]]) -> Tensor:
        """The logits behind every prompt, in order: [N, vocab]."""
        parts: list[Tensor] = []
        step: list[tuple[int, Sequence[int]]] = []
        num_tokens = 0
        for number, prompt in prompts.items():
            kept = min(_common_length(self._cached[number], prompt), len(prompt) - 1)
            del self._cached[number][kept:]
            if step and num_tokens + len(prompt) - kept > PREFILL_TOKENS:
                parts.append(self._step(step))
                step, num_tokens = [], 0
            step.append((number, prompt[kept:]))
            num_tokens += len(prompt) - kept
        return torch.cat([*parts, self._step(step)])

    def _step(self, new: list[tuple[int, Sequence[int]]]) -> Tensor:
        """The logits behind the new tokens of each conversation: [len(new), vocab]."""
        sequences = [(token_ids, len(self._cached[number]), self._pages[number]) for number, token_ids in new]
        logits = self._model.forward(ForwardBatch.create(sequences), self._planes)
        for number, token_ids in new:
            self._cached[number].extend(token_ids)
        return logits


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability: [N] int64, [N] float32."""
    if temperature == 0:
        logprobs, ids = logits.float().log_softmax(-1).max(-1)
        return ids, logprobs
    logprobs = (logits.float() / temperature).log_softmax(-1)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_min(1e-20)
    ids = (logprobs - (-uniform.log()).log()).argmax(-1)
    return ids, logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))
