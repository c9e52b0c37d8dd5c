"""Counter-based sampling: a token is a pure function of (logits, parameters, seed, output index, stream).

No generator has a state, so the same token comes out on any worker, in any batch, after any preemption or restart.
Probabilities are float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seamount.workers.events import TokenLogprobs
from seamount.workers.requests import SamplingParams

__all__ = ["TOKEN_STREAM", "Draw", "Sampled", "SamplingParams", "sample", "uniform"]

TOKEN_STREAM = 0
"""Of draws that choose a token."""
_FIRST_CANDIDATES = 256


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
    """A number in [0, 1) with 53 random bits: Philox4x64-10 with key (seed, stream) and counter index.

    seed, index, stream: each in [0, 2^64). Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    philox = np.random.Philox(key=seed | stream << 64, counter=index)
    return int(philox.random_raw() >> 11) * 2.0**-53


def sample(logits: Tensor, draws: Sequence[Draw], *, vocab_limit: int) -> list[Sampled | None]:
    """Choose one token a row.

    p = softmax(logits / temperature) over ids below ``vocab_limit``; the ``top_k`` most likely stay, of these the
    fewest whose share reaches ``top_p`` (at least one); the draw u picks the first id, in ascending order if nothing is
    cut and else most likely first, at which the cumulative share exceeds u. Ties always go to the lower id.

    logits: [N, V] float, V >= vocab_limit; N may be 0. draws: N. Rows of ids from ``vocab_limit`` on are never chosen.
    Returns one token a row, None for a row whose largest logit is not finite.
    """
    logits = logits[:, :vocab_limit]
    if not draws:
        return []
    best, greedy_ids = (column.tolist() for column in logits.max(dim=1))
    token_ids = [greedy if d.forced_token_id is None else d.forced_token_id for d, greedy in zip(draws, greedy_ids)]
    rows = [row for row, draw in enumerate(draws) if _needs_shares(draw) and math.isfinite(best[row])]
    logprobs: dict[int, TokenLogprobs] = {}
    if rows:
        chosen = [draws[row] for row in rows]
        scaled = logits[rows].double() - torch.tensor([best[row] for row in rows], dtype=torch.float64)[:, None]
        scaled /= torch.tensor([d.params.temperature or 1.0 for d in chosen], dtype=torch.float64)[:, None]
        weights = scaled.exp()
        for row, token_id in _pick(scaled, weights, chosen):
            token_ids[rows[row]] = token_id
        totals = weights.sum(dim=1).tolist()
        for row, draw in enumerate(chosen):
            if draw.params.num_logprobs >= 0:
                token_id, log_total = token_ids[rows[row]], math.log(totals[row])
                logprobs[rows[row]] = _logprobs(scaled[row], token_id, log_total, draw.params.num_logprobs)
    return [
        Sampled(token_id=token_id, logprobs=logprobs.get(row)) if math.isfinite(best[row]) else None
        for row, token_id in enumerate(token_ids)
    ]


def _needs_shares(draw: Draw) -> bool:
    return draw.params.num_logprobs >= 0 or _is_drawn(draw)


def _is_drawn(draw: Draw) -> bool:
    return draw.params.temperature > 0 and draw.forced_token_id is None


def _pick(scaled: Tensor, weights: Tensor, draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """(row, token id) of every row that is drawn at random. scaled, weights: [R, V] float64, weights = exp(scaled)."""
    num_ids = scaled.shape[1]
    drawn = [row for row, draw in enumerate(draws) if _is_drawn(draw)]
    whole = [row for row in drawn if draws[row].params.top_p >= 1 and not 0 < draws[row].params.top_k < num_ids]
    picked: list[tuple[int, int]] = []
    if whole:
        places = [uniform(draws[row].params.seed, draws[row].output_index) for row in whole]
        selection = weights if len(whole) == len(draws) else weights[whole]
        picked.extend(zip(whole, _first_beyond(selection.cumsum(dim=1), places)))
    for row in sorted(set(drawn) - set(whole)):
        params = draws[row].params
        ids = _truncate(scaled[row], weights[row], params)
        place = uniform(params.seed, draws[row].output_index)
        picked.append((row, int(ids[_first_beyond(weights[row, ids].cumsum(dim=0)[None], [place])[0]])))
    return picked


def _first_beyond(cumulative: Tensor, places: Sequence[float]) -> list[int]:
    """Index in each row of the first cumulative share that exceeds the row's place. cumulative: [R, K] float64."""
    totals = cumulative[:, -1]
    targets = torch.tensor(places, dtype=torch.float64) * totals
    targets = torch.minimum(targets, totals.nextafter(torch.zeros_like(totals)))  # rounded up, it might reach the total
    found: list[int] = torch.searchsorted(cumulative, targets[:, None], right=True).flatten().tolist()
    return found


def _truncate(scaled: Tensor, weights: Tensor, params: SamplingParams) -> Tensor:
    """Ids that top-k and top-p keep, most likely first. scaled, weights: [V] float64. Returns [K] int64, K >= 1."""
    num_ids = scaled.numel()
    if params.top_k > 0:
        ids = _most_likely(scaled, params.top_k)
        if params.top_p >= 1:
            return ids
        cumulative = weights[ids].cumsum(dim=0)
        return ids[: _nucleus_size(cumulative, params.top_p * float(cumulative[-1]))]
    mass = params.top_p * float(weights.sum())
    num_candidates = _FIRST_CANDIDATES  # nearly always enough, and far cheaper than sorting the whole vocabulary
    while True:
        ids = _most_likely(scaled, num_candidates)
        cumulative = weights[ids].cumsum(dim=0)
        if num_candidates >= num_ids or float(cumulative[-1]) >= mass:
            return ids[: _nucleus_size(cumulative, mass)]
        num_candidates *= 16


def _nucleus_size(cumulative: Tensor, mass: float) -> int:
    """Fewest leading entries whose sum reaches ``mass``; all if rounding keeps them below it."""
    return min(int(torch.searchsorted(cumulative, mass)) + 1, cumulative.numel())


def _most_likely(scaled: Tensor, count: int) -> Tensor:
    """The ``count`` ids of the largest values, largest first, ties to the lower id. scaled: [V]; all if count >= V."""
    if count >= scaled.numel():
        return torch.sort(scaled, descending=True, stable=True).indices
    threshold = torch.topk(scaled, count, sorted=False).values.min()
    ids = torch.nonzero(scaled >= threshold).flatten()  # ascending, with every tie of the last one
    return ids[torch.sort(scaled[ids], descending=True, stable=True).indices[:count]]


def _logprobs(scaled: Tensor, token_id: int, log_total: float, num_top: int) -> TokenLogprobs:
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        ids = _most_likely(scaled, num_top)
        top = tuple((int(i), float(value) - log_total) for i, value in zip(ids.tolist(), scaled[ids].tolist()))
    return TokenLogprobs(sampled=float(scaled[token_id]) - log_total, top=top)
