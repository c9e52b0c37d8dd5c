"""The models that an evaluation asks: in this process, many conversations side by side, or served over gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from examples.tiny_agent.rollouts import Rollouts
from seamount.kernels.layout import CacheLayout
from seamount.router.client import Client, Sampling
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.transformer import Transformer
from seamount.workers.model.weights import load_weights

EVERY_TOKEN = 1 << 20
"""As ``index_topk``: beyond every context, so nothing is selected and attention is dense."""


def load_transformer(
    checkpoint: Path,
    *,
    layout_name: str,
    dtype: torch.dtype,
    device: str,
    index_topk: int | None = None,
) -> Transformer:
    """The served model of a checkpoint. index_topk: in place of the checkpoint's."""
    config = ModelConfig.from_json(checkpoint)
    if index_topk is not None:
        config = replace(config, index_topk=index_topk)
    layout = CacheLayout.create(
        layout_name,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        dtype=dtype,
    )
    experts = LocalExperts(config.n_routed_experts)
    weights = load_weights(
        checkpoint, config, owned_experts=experts.map.owned(experts.rank), dtype=dtype, device=device
    )
    return Transformer(config, layout, weights, experts)


class LocalInference:
    """The served model in this process, greedy.

    num_conversations: most at a time; max_tokens: of a context; a prompt that leaves no room in it gets no output.
    """

    def __init__(self, model: Transformer, *, num_conversations: int, max_tokens: int) -> None:
        self._rollouts = Rollouts(model, num_conversations=num_conversations, max_tokens=max_tokens)
        self._max_tokens = max_tokens
        self._generator = torch.Generator(device=model.device)

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        """See ``episodes.Inference``."""
        fitting = {number: prompt for number, prompt in prompts.items() if len(prompt) < self._max_tokens}
        outputs: dict[int, list[int]] = {number: [] for number in prompts}
        if fitting:
            replies = self._rollouts.replies(
                fitting, max_new=max_output_tokens, temperature=0.0, generator=self._generator
            )
            outputs |= {number: reply.token_ids for number, reply in replies.items()}
        return outputs


class ServedInference:
    """A running system, greedy, over the client's ``generate``; close it at the end. num_streams: at one time."""

    def __init__(self, address: str, *, api_key: str | None = None, num_streams: int = 8) -> None:
        self._client = Client(address, api_key=api_key)
        self._threads = ThreadPoolExecutor(num_streams, thread_name_prefix="evaluation")

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        """See ``episodes.Inference``. Raises the typed error of the first call that failed."""
        sampling = Sampling(temperature=0.0, max_output_tokens=max_output_tokens)

        def one(prompt: Sequence[int]) -> list[int]:
            return list(self._client.generate(list(prompt), sampling=sampling).result().token_ids)

        return dict(zip(prompts, self._threads.map(one, prompts.values()), strict=True))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()
