"""The lightning indexer's scores: how much each cached token matters to each query.

    I[t, s] = k_scale[s] * sum_h w[t, h] * ReLU(q[t, h] . k[s])        (DeepSeek-V3.2, equation 1)

w may be negative. With e4m3 queries, their scales are folded into w: scales are positive, so ReLU lets them through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_plane, check_tensor
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, unpack_index_pages

# Elements of the [rows, heads, keys] scores, or of the decoded keys, that exist at one time. Few enough to stay in a
# core's cache: larger tiles are slower (fresh memory for every temporary).
_TILE_ELEMENTS = 1 << 19
_TILE_ROWS = 8


def mqa_logits(q: Tensor, k: Tensor, weights: Tensor, lengths: Tensor, k_scales: Tensor | None = None) -> Tensor:
    """Indexer scores of the rows of one sequence against its contiguous keys.

    q: [T, H, D] float32 or float64; k: [L, D], the same dtype; weights: [T, H]; k_scales: [L] or None for 1.
    lengths: [T] int64: row t sees keys [0, lengths[t]). T and L may be 0.
    Returns [T, L] in q's dtype; -inf at s >= lengths[t], whatever the unused keys hold.
    """
    num_rows, heads, _ = q.shape
    num_keys = k.shape[0]
    logits = torch.empty((num_rows, num_keys), dtype=q.dtype, device=q.device)
    weights = weights.unsqueeze(1).to(q.dtype)
    tile_rows = max(1, min(num_rows, _TILE_ROWS))
    tile_keys = max(1, _TILE_ELEMENTS // (heads * tile_rows))
    for first_key in range(0, num_keys, tile_keys):
        keys = slice(first_key, first_key + tile_keys)
        for start in range(0, num_rows, tile_rows):
            rows = slice(start, start + tile_rows)
            scores = (q[rows].flatten(0, 1) @ k[keys].T).relu_().view(-1, heads, k[keys].shape[0])
            logits[rows, keys] = torch.bmm(weights[rows], scores).squeeze(1)
    if k_scales is not None:
        logits *= k_scales
    unseen = torch.arange(num_keys, device=q.device) >= lengths.unsqueeze(1)
    return logits.masked_fill_(unseen, float("-inf"))


def paged_mqa_logits(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout
) -> Tensor:
    """Indexer scores of one query, or N successive ones, per sequence against its paged keys.

    q: [B, H, D] or [B, N, H, D], float32 or float64; plane: an index plane [num_pages, page bytes] uint8; weights:
    q's shape without D. context_lens: [B] or [B, N] int64 tokens that a query sees; page_tables: [B, P] int64 physical
    pages, any valid page number beyond the context. B, N and P may be 0.
    Returns [B, P * 64] or [B, N, P * 64] in q's dtype; -inf at s >= context_lens[b], whatever the unused slots hold.

    On CUDA with an e4m3 index plane: q is e4m3, or holds e4m3 numbers in a wider dtype (others are rounded); the result
    is float32; lengths and page tables may be int32. Raises ValueError for other shapes, dtypes, strides or devices.
    """
    if q.is_cuda and layout.quantizes_index and layout.index_head_dim >= 32:
        _check_paged(q, plane, weights, context_lens, page_tables, layout)
        from seamount.kernels.triton import indexer

        if q.dim() == 4:
            return indexer.paged_mqa_logits(q, plane, weights, context_lens, page_tables, layout)
        one = (q.unsqueeze(1), plane, weights.unsqueeze(1), context_lens.unsqueeze(1), page_tables, layout)
        return indexer.paged_mqa_logits(*one).squeeze(1)
    if q.dim() == 4:
        rows = (q.flatten(0, 1), plane, weights.flatten(0, 1), context_lens.flatten())
        logits = _paged_reference(*rows, page_tables.repeat_interleave(q.shape[1], 0), layout)
        return logits.view(*q.shape[:2], logits.shape[1])
    return _paged_reference(q, plane, weights, context_lens, page_tables, layout)


def _check_paged(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout
) -> None:
    if q.dim() not in (3, 4) or q.shape[-1] != layout.index_head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be [B, H, D] or [B, N, H, D], D {layout.index_head_dim}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}; it must be float8_e4m3fn or a wider float")
    check_plane(plane, layout, "index", q.device)
    check_tensor("weights", weights, q.shape[:-1], q.device)
    check_tensor("context_lens", context_lens, q.shape[:-2], q.device, INTEGERS)
    check_tensor("page_tables", page_tables, (q.shape[0], page_tables.shape[-1]), q.device, INTEGERS)
    if page_tables.shape[1] and page_tables.stride(1) != 1:
        raise ValueError("page_tables has strided columns; the pages of a sequence must be adjacent")


def _paged_reference(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout
) -> Tensor:
    batch, heads, dim = q.shape
    logits = torch.full((batch, page_tables.shape[1] * PAGE_SIZE), float("-inf"), dtype=q.dtype, device=q.device)
    for rows, num_pages in _similar_lengths(context_lens.tolist()):
        group = torch.tensor(rows, device=q.device)
        group_q, group_weights = q[group], weights[group].unsqueeze(1).to(q.dtype)
        pages = page_tables[group, :num_pages]
        group_logits = logits.new_empty((len(rows), num_pages * PAGE_SIZE))
        tile = max(1, _TILE_ELEMENTS // (len(rows) * PAGE_SIZE * max(heads, dim)))
        for start in range(0, num_pages, tile):
            tile_pages = pages[:, start : start + tile]
            keys, scales = unpack_index_pages(plane.index_select(0, tile_pages.flatten()), layout)
            scores = torch.bmm(group_q, keys.view(len(rows), -1, dim).transpose(1, 2)).relu_()
            sums = torch.bmm(group_weights, scores).squeeze(1)
            if scales is not None:
                sums *= scales.view(sums.shape)
            group_logits[:, start * PAGE_SIZE : (start + tile) * PAGE_SIZE] = sums
        unseen = torch.arange(num_pages * PAGE_SIZE, device=q.device) >= context_lens[group].unsqueeze(1)
        logits[group, : num_pages * PAGE_SIZE] = group_logits.masked_fill_(unseen, float("-inf"))
    return logits


def _similar_lengths(context_lens: list[int]) -> list[tuple[list[int], int]]:
    """Groups of rows, each with the pages of its longest, at most twice its shortest: little padding, few calls."""
    longest_first = sorted(range(len(context_lens)), key=lambda row: -context_lens[row])
    groups: list[tuple[list[int], int]] = []
    for row in longest_first:
        pages = -(-context_lens[row] // PAGE_SIZE)
        if groups and 2 * pages >= groups[-1][1]:
            groups[-1][0].append(row)
        elif pages:
            groups.append(([row], pages))
    return groups
