"""Many conversations continued side by side by the serving model, in one process.

Batching is continuous: a step takes one token of every conversation that is being answered and the prompts of those
that were asked since. Each conversation owns the pages of one longest context. What it has in the cache stays there
between replies, so that a tool's results cost a prefill of their own tokens and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.tiny_agent.captured import CapturedDecode
from seamount.kernels.layout import PAGE_SIZE
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.transformer import Transformer

PREFILL_TOKENS = 32768
"""New tokens of prompts in one step at the most; a longer prompt has a step of its own."""
SHORT_CHUNK = 128
"""So many new tokens of a conversation, or fewer, are attended as if each were a conversation of its own."""


@dataclass(slots=True)
class Reply:
    """token_ids: what was sampled, EOS included where it came. logprobs: of each under the distribution it was drawn
    from."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Work:
    """What was computed: steps of the model, prompt tokens that were not cached, tokens sampled."""

    num_steps: int = 0
    num_prefilled: int = 0
    num_sampled: int = 0


class Rollouts:
    """model: the served one. max_tokens: of a conversation's context. Conversations are numbered from 0.

    admit_at: so many must have been asked before a step computes their prompts, unless nobody is being answered.
    captured: replies come from ``CapturedDecode``, which asks for a model with ``EveryExpert``.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_conversations: int,
        max_tokens: int,
        admit_at: int = 1,
        captured: bool = False,
    ) -> None:
        self.num_conversations, self.max_tokens = num_conversations, max_tokens
        self.work = Work()
        self._model, self._admit_at = model, admit_at
        pages = -(-max_tokens // PAGE_SIZE)
        self._planes = model.layout.allocate(
            model.config.num_hidden_layers, num_conversations * pages, device=model.device
        )
        self._pages = [list(range(i * pages, (i + 1) * pages)) for i in range(num_conversations)]
        self._cached: list[list[int]] = [[] for _ in range(num_conversations)]
        """The tokens whose cache entries are there."""
        self._asked: dict[int, Sequence[int]] = {}
        self._like: dict[int, int] = {}
        """Of those that were asked: whose cache entries they will copy."""
        self._running: dict[int, Reply] = {}
        self._decode: CapturedDecode | None = None
        if captured:
            self._decode = CapturedDecode(model, self._planes, num_conversations=num_conversations, num_pages=pages)

    def drop(self) -> None:
        """Forget everyone that was asked or is being answered, and all that is cached."""
        self._asked.clear()
        self._like.clear()
        self._running.clear()
        self._cached = [[] for _ in self._cached]

    def forget(self, number: int) -> None:
        """Nothing that is cached of a conversation will be used again."""
        self._cached[number] = []

    def use(self, model: Transformer) -> None:
        """Go on with other parameters of the same shapes; nothing cached is valid any more, nobody may be running."""
        assert not self.is_busy, "a reply cannot change its model"
        self._model = model
        self._cached = [[] for _ in self._cached]

    @property
    def is_busy(self) -> bool:
        return bool(self._asked or self._running)

    def ask(self, number: int, prompt: Sequence[int], *, like: int | None = None) -> None:
        """Let a conversation go on from here; ``step`` will return its reply.

        prompt: all its tokens, at least one. like: a conversation that was asked the same before; what it has cached
        by then is copied. Raises ValueError where the prompt leaves no room for a reply.
        """
        if not 0 < len(prompt) < self.max_tokens:
            raise ValueError(f"a prompt of {len(prompt)} tokens; a context has {self.max_tokens}")
        assert number not in {**self._asked, **self._running}, "it has not yet replied"
        self._asked[number] = prompt
        if like is not None:
            self._like[number] = like

    @torch.inference_mode()
    def step(self, *, max_new: int, temperature: float, generator: torch.Generator) -> dict[int, Reply]:
        """Sample a token for everyone that was asked, if prefill has come to it; returns the replies that are complete.

        They end with EOS, ``max_new`` tokens or a full context. temperature: 0 takes the likeliest token.
        """
        new = {number: reply.token_ids[-1:] for number, reply in self._running.items()} | self._alike()
        if not new or len(self._asked) - len(self._like) >= self._admit_at:
            new |= self._admitted()
        if not new:
            return {}
        ids, logprobs = draw(self._logits(new), temperature, generator)
        finished = {}
        for (number, token_ids), token_id, logprob in zip(new.items(), ids.tolist(), logprobs.tolist(), strict=True):
            self._cached[number].extend(token_ids)
            reply = self._running.setdefault(number, Reply())
            reply.token_ids.append(token_id)
            reply.logprobs.append(logprob)
            if self._is_complete(number, reply, max_new):
                finished[number] = self._running.pop(number)
        self.work.num_steps += 1
        self.work.num_sampled += len(new)
        return finished

    def replies(
        self, prompts: dict[int, Sequence[int]], *, max_new: int, temperature: float, generator: torch.Generator
    ) -> dict[int, Reply]:
        """``ask`` all and ``step`` until all are complete. prompts: by conversation."""
        for number, prompt in prompts.items():
            self.ask(number, prompt)
        finished: dict[int, Reply] = {}
        while self.is_busy:
            finished |= self.step(max_new=max_new, temperature=temperature, generator=generator)
        return {number: finished[number] for number in prompts}

    def _logits(self, new: dict[int, Sequence[int]]) -> Tensor:
        """[N, vocab] float32: of the last new token of each conversation, in their order."""
        if self._decode is None:
            return self._model.forward(self._batch(new), self._planes)
        going_on = {number: token_ids[0] for number, token_ids in new.items() if len(token_ids) == 1}
        others = {number: token_ids for number, token_ids in new.items() if number not in going_on}
        parts = []
        # First: what this step writes for those that do not go on is overwritten by the others' prompts.
        if going_on:
            last = self.max_tokens - 1
            tokens = [going_on.get(number, 0) for number in range(self.num_conversations)]
            logits = self._decode.forward(tokens, [min(len(cached), last) for cached in self._cached])
            parts.append(logits[torch.tensor(list(going_on), device=logits.device)])
        if others:
            parts.append(self._model.forward(self._batch(others), self._planes))
        order = {number: at for at, number in enumerate((*going_on, *others))}
        if list(order) == list(new):
            return torch.cat(parts)
        return torch.cat(parts)[torch.tensor([order[number] for number in new], device=self._model.device)]

    def _alike(self) -> dict[int, Sequence[int]]:
        """What is left to compute of prompts that another conversation has cached by now."""
        new: dict[int, Sequence[int]] = {}
        sources: list[int] = []
        targets: list[int] = []
        for number, like in list(self._like.items()):
            if like in self._asked:
                continue
            del self._like[number]
            prompt = self._asked[number]
            kept = min(_common_length(self._cached[like], prompt), len(prompt) - 1)
            if kept < len(prompt) - 1:
                continue  # it has gone on to something else: this prompt is computed as any other
            num_pages = -(-kept // PAGE_SIZE)
            sources += self._pages[like][:num_pages]
            targets += self._pages[number][:num_pages]
            self._cached[number] = list(prompt[:kept])
            new[number] = prompt[kept:]
            del self._asked[number]
        if sources:
            pages = torch.tensor([sources, targets], device=self._model.device)
            for plane in (*self._planes.latent, *self._planes.index):
                plane[pages[1]] = plane[pages[0]]
        return new

    def _is_complete(self, number: int, reply: Reply, max_new: int) -> bool:
        if reply.token_ids[-1] == self._model.config.eos_token_id:
            return True
        return len(reply.token_ids) == max_new or len(self._cached[number]) == self.max_tokens

    def _admitted(self) -> dict[int, Sequence[int]]:
        """What is new of the prompts that this step computes, in the order of asking."""
        new: dict[int, Sequence[int]] = {}
        num_tokens = 0
        for number, prompt in self._asked.items():
            if number in self._like:
                continue
            kept = min(_common_length(self._cached[number], prompt), len(prompt) - 1)
            if new and num_tokens + len(prompt) - kept > PREFILL_TOKENS:
                break
            del self._cached[number][kept:]
            new[number] = prompt[kept:]
            num_tokens += len(prompt) - kept
        for number in new:
            del self._asked[number]
        self.work.num_prefilled += num_tokens
        return new

    def _batch(self, new: dict[int, Sequence[int]]) -> ForwardBatch:
        """Logits for the last new token of each conversation.

        A few tokens behind a cached context, as a tool's results are, become as many sequences of one token: all of a
        step's entries are written before a layer attends, so each sees those before it, and one launch attends them
        all. Launches, not arithmetic, are what a chunk of its own would cost.
        """
        sequences: list[tuple[Sequence[int], int, Sequence[int]]] = []
        last_rows: list[int] = []
        num_rows = 0
        for number, token_ids in new.items():
            first = len(self._cached[number])
            pages = self._pages[number][: -(-(first + len(token_ids)) // PAGE_SIZE)]
            if len(token_ids) <= SHORT_CHUNK:
                sequences += [([token_id], at, pages) for at, token_id in enumerate(token_ids, first)]
            else:
                sequences.append((token_ids, first, pages))
            num_rows += len(token_ids)
            last_rows.append(num_rows - 1)
        return ForwardBatch.create(sequences, last_rows)


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
