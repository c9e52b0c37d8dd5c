"""The lightning indexer's scores: how much each cached token matters to each query.

    I[t, s] = k_scale[s] * sum_h w[t, h] * ReLU(q[t, h] . k[s])        (DeepSeek-V3.2, equation 1)

w may be negative. With e4m3 queries, their scales are folded into w: scales are positive, so ReLU lets them through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_plane, check_tensor
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, unpack_index_pages
from seamount.kernels.topk import MAX_CUDA_K, topk_indices

# Elements of the [rows, heads, keys] scores, or of the decoded keys, that exist at one time. Few enough to stay in a
# core's cache: larger tiles are slower (fresh memory for every temporary).
_TILE_ELEMENTS = 1 << 19
_TILE_ROWS = 8
# Scores of a prefill chunk that exist at one time before the best are selected.
_CPU_TILE_SCORES = 16 << 20
_GPU_TILE_SCORES = 128 << 20


def mqa_logits(
    q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, layout: CacheLayout
) -> Tensor:
    """Indexer scores of many rows of one sequence, as prefill has them, against its paged keys.

    q: [T, H, D] float32 or float64; plane: an index plane [num_pages, page bytes] uint8; weights: [T, H].
    lengths: [T] int64: row t sees keys [0, lengths[t]); pages: [P] int64, the sequence's physical pages. T and P may
    be 0.
    Returns [T, P * 64] in q's dtype; -inf at s >= lengths[t], whatever the unused slots hold.

    On CUDA with an e4m3 index plane: q is e4m3, or holds e4m3 numbers in a wider dtype (others are rounded); the result
    is float32; lengths and pages may be int32. Raises ValueError for other shapes, dtypes, strides or devices.
    """
    num_rows, width = q.shape[0], pages.shape[0] * PAGE_SIZE
    if multiplies_e4m3(q, layout):
        _check_rows(q, plane, weights, lengths, pages, layout)
        logits = torch.full((num_rows, width), float("-inf"), dtype=torch.float32, device=q.device)
        _write_logits(q.to(torch.float8_e4m3fn), plane, weights, lengths, pages, layout, logits)
        return logits
    keys, scales = unpack_index_pages(plane.index_select(0, pages), layout)
    return _rows_reference(q, keys, weights, lengths, scales)


def mqa_topk_indices(
    q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, layout: CacheLayout, k: int
) -> Tensor:
    """``topk_indices`` of ``mqa_logits``: [T, k] int64. Few rows' scores exist at one time.

    Arguments, and what is raised, as for the two. Returns the positions of the min(k, lengths[t]) best keys, ascending,
    then -1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    num_rows, width = q.shape[0], pages.shape[0] * PAGE_SIZE
    selected = torch.empty((num_rows, k), dtype=torch.int64, device=q.device)
    if on_gpu := multiplies_e4m3(q, layout):
        _check_rows(q, plane, weights, lengths, pages, layout)
        q, weights, tile = q.to(torch.float8_e4m3fn), weights.float().contiguous(), _GPU_TILE_SCORES
    else:
        keys, scales = unpack_index_pages(plane.index_select(0, pages), layout)
        tile = _CPU_TILE_SCORES
    tile = max(8, tile // max(1, width) // 8 * 8)
    for start in range(0, num_rows, tile):
        rows = slice(start, start + tile)
        if on_gpu:
            # Scores beyond a row's length stay unwritten: the selection does not read them.
            logits = torch.empty((q[rows].shape[0], width), dtype=torch.float32, device=q.device)
            _write_logits(q[rows], plane, weights[rows], lengths[rows], pages, layout, logits)
        else:
            logits = _rows_reference(q[rows], keys, weights[rows], lengths[rows], scales)
        selected[rows] = topk_indices(logits, k, lengths[rows])
    return selected


def multiplies_e4m3(q: Tensor, layout: CacheLayout) -> bool:
    """Whether the functions here take e4m3 queries as they are, where q lies and with keys of this layout."""
    return q.is_cuda and layout.quantizes_index and layout.index_head_dim >= 32


def _write_logits(
    q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, layout: CacheLayout, logits: Tensor
) -> None:
    """Writes logits[t, s] for s < lengths[t]; elsewhere -inf or nothing. q: e4m3."""
    from seamount.kernels.triton import indexer, prefill_logits

    if prefill_logits.is_supported(q, layout):
        prefill_logits.write_logits(
            q.contiguous(), plane, weights.float().contiguous(), lengths.contiguous(), pages.contiguous(), logits
        )
    elif logits.numel():
        # Other sizes: every row as a sequence of its own.
        tables = pages.contiguous().expand(q.shape[0], -1)
        rows = (q.unsqueeze(1), plane, weights.unsqueeze(1), lengths.unsqueeze(1), tables, layout)
        logits.copy_(indexer.paged_mqa_logits(*rows).squeeze(1))


def _check_rows(q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, layout: CacheLayout) -> None:
    if q.dim() != 3 or q.shape[2] != layout.index_head_dim:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [T, H, {layout.index_head_dim}]")
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}; it must be float8_e4m3fn or a wider float")
    check_plane(plane, layout, "index", q.device)
    check_tensor("weights", weights, q.shape[:2], q.device)
    check_tensor("lengths", lengths, q.shape[:1], q.device, INTEGERS)
    check_tensor("pages", pages, (pages.numel(),), q.device, INTEGERS)


def _rows_reference(q: Tensor, k: Tensor, weights: Tensor, lengths: Tensor, k_scales: Tensor | None) -> Tensor:
    """k: [L, D] contiguous keys in q's dtype; k_scales: [L] or None for 1. Returns [T, L]."""
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
    if multiplies_e4m3(q, layout):
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


def paged_topk_indices(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout, k: int
) -> Tensor:
    """The k cached tokens that each query scores highest: ``topk_indices`` of the rows of ``paged_mqa_logits``.

    Arguments, and what is raised, as there; k >= 1, ValueError otherwise.
    Returns [B, k] or [B, N, k] int64: min(k, context_lens) positions in ascending order, then -1.
    On CUDA two launches: scores come with the samples that the selection begins with.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if multiplies_e4m3(q, layout) and k <= MAX_CUDA_K:
        _check_paged(q, plane, weights, context_lens, page_tables, layout)
        from seamount.kernels.triton import indexer

        if q.dim() == 4:
            return indexer.paged_topk_indices(q, plane, weights, context_lens, page_tables, layout, k)
        one = (q.unsqueeze(1), plane, weights.unsqueeze(1), context_lens.unsqueeze(1), page_tables, layout)
        return indexer.paged_topk_indices(*one, k).squeeze(1)
    logits = paged_mqa_logits(q, plane, weights, context_lens, page_tables, layout)
    rows = topk_indices(logits.view(context_lens.numel(), logits.shape[-1]), k, context_lens.flatten())
    return rows.view(*context_lens.shape, k)


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
