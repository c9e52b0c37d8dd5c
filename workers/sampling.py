"""Counter-based sampling: a token is a pure function of (logits, parameters, seed, output index, stream).

No generator has a state, so the same token comes out on any worker, in any batch, after any preemption or restart.
Probabilities are float64 throughout.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seamount.workers.events import TokenLogprobs
from seamount.workers.requests import SamplingParams

__all__ = ["TOKEN_STREAM", "Draw", "Sampled", "SamplingParams", "sample", "uniform"]

TOKEN_STREAM = 0
"""Of draws that choose a token."""
_ELEMENTS_AT_ONCE = 1 << 17
"""1 MiB of float64: larger temporaries leave the processor's cache and cost several times as much a row."""

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One row's wish. output_index: of the token to choose; forced_token_id: take this one (logprobs still hold)."""

    params: SamplingParams
    output_index: int
    forced_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None


def uniform(seed: int, index: int, stream: int = TOKEN_STREAM) -> float:
    """A number in [0, 1) with 53 random bits: of BLAKE2b-64 over (seed, index, stream), little-endian uint64s.

    seed, index, stream: each in [0, 2^64). A hash, because making a generator for one number takes ten times as long.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, index, stream), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, draws: Sequence[Draw], *, vocab_limit: int) -> list[Sampled | None]:
    """Choose one token a row.

    p = softmax(logits / temperature) over the ids below ``vocab_limit``; the ``top_k`` most likely stay, of these the
    fewest whose share reaches ``top_p`` (at least one); the draw u picks the first id, in ascending order of what is
    left, at which the cumulative share exceeds u. Ties always go to the lower id.

    logits: [N, V] float on the CPU, V >= vocab_limit; N may be 0. draws: N.
    Returns one token a row, None for a row whose largest logit is not finite.
    """
    if not draws:
        return []
    logits = logits[:, :vocab_limit]
    best, greedy_ids = (column.tolist() for column in logits.max(dim=1))
    results: list[Sampled | None] = []
    rows: list[int] = []
    for row, (draw, peak, greedy_id) in enumerate(zip(draws, best, greedy_ids, strict=True)):
        token_id = greedy_id if draw.forced_token_id is None else draw.forced_token_id
        results.append(Sampled(token_id=token_id) if math.isfinite(peak) else None)
        if math.isfinite(peak) and (_is_drawn(draw) or draw.params.num_logprobs >= 0):
            rows.append(row)
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    for start in range(0, len(rows), rows_at_once):
        group = rows[start : start + rows_at_once]
        scaled = logits[group].double().sub_(torch.tensor([best[row] for row in group], dtype=torch.float64)[:, None])
        scaled.div_(torch.tensor([draws[row].params.temperature or 1.0 for row in group], dtype=torch.float64)[:, None])
        weights = scaled.exp()
        for row, token_id in _pick(scaled.numpy(), weights, group, draws):
            results[row] = Sampled(token_id=token_id)
        for index, row in enumerate(group):
            result, num_top = results[row], draws[row].params.num_logprobs
            if result is not None and num_top >= 0:
                logprobs = _logprobs(scaled[index].numpy(), result.token_id, float(weights[index].sum()), num_top)
                results[row] = Sampled(token_id=result.token_id, logprobs=logprobs)
    return results


def _is_drawn(draw: Draw) -> bool:
    return draw.params.temperature > 0 and draw.forced_token_id is None


def _pick(scaled: Array, weights: Tensor, group: Sequence[int], draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """(row, token id) of each drawn row in ``group``. scaled, weights = exp(scaled): [len(group), V] float64."""
    drawn = [(index, row) for index, row in enumerate(group) if _is_drawn(draws[row])]
    whole = [(index, row) for index, row in drawn if not _is_truncated(draws[row].params, weights.shape[1])]
    picked: list[tuple[int, int]] = []
    if whole:
        selection = weights if len(whole) == len(group) else weights[[index for index, _ in whole]]
        cumulative = selection.cumsum(dim=1).numpy()
        picked.extend(
            zip((row for _, row in whole), _places(cumulative, [draws[row] for _, row in whole]), strict=True)
        )
    for index, row in drawn:
        if _is_truncated(draws[row].params, weights.shape[1]):
            shares = weights[index].numpy()
            ids = _truncate(scaled[index], shares, draws[row].params)
            (place,) = _places(np.cumsum(shares[ids])[None], [draws[row]])
            picked.append((row, int(ids[place])))
    return picked


def _is_truncated(params: SamplingParams, num_ids: int) -> bool:
    return params.top_p < 1 or 0 < params.top_k < num_ids


def _places(cumulative: Array, draws: Sequence[Draw]) -> list[int]:
    """Index in each row of the first cumulative share beyond the row's draw. cumulative: [R, K] float64, K >= 1."""
    totals = cumulative[:, -1]
    targets = totals * [uniform(draw.params.seed, draw.output_index) for draw in draws]
    np.minimum(targets, np.nextafter(totals, 0), out=targets)  # never rounded up to the total
    places: list[int] = np.count_nonzero(cumulative <= targets[:, None], axis=1).tolist()
    return places


def _truncate(scaled: Array, weights: Array, params: SamplingParams) -> Ids:
    """Ids that top-k and top-p keep, ascending, at least one. scaled, weights: [V] float64."""
    if 0 < params.top_k < scaled.size:
        ids = _largest(scaled, params.top_k)
        weights = weights[ids]
    else:
        ids = np.arange(scaled.size)
    if params.top_p < 1:
        total = float(weights.sum())
        # All ids below this weight together hold less than 1 - top_p: the nucleus ends before them, so skip the sort.
        candidates = weights[weights >= (1 - params.top_p) * total / weights.size]
        cumulative = np.cumsum(np.sort(candidates)[::-1])
        size = min(int(np.searchsorted(cumulative, params.top_p * total)) + 1, candidates.size)
        ids = ids[_largest(weights, size)]
    return ids


def _largest(values: Array, count: int) -> Ids:
    """Ascending indices of the ``count`` largest values, ties to the lower index. values: [V]; all if count >= V."""
    if count >= values.size:
        return np.arange(values.size)
    threshold = np.partition(values, values.size - count)[values.size - count]
    ids = np.flatnonzero(values >= threshold)
    if ids.size > count:
        tied = np.flatnonzero(values[ids] == threshold)
        ids = np.delete(ids, tied[count - ids.size :])
    return ids


def _logprobs(scaled: Array, token_id: int, total: float, num_top: int) -> TokenLogprobs:
    """scaled: [V] float64 = (logits - max) / temperature; total = sum(exp(scaled))."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        ids = _largest(scaled, num_top)
        ids = ids[np.argsort(-scaled[ids], kind="stable")]
        top = tuple((int(token), float(scaled[token]) - math.log(total)) for token in ids)
    return TokenLogprobs(sampled=float(scaled[token_id]) - math.log(total), top=top)
