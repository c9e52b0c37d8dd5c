"""Float32 references, written from the formulas and from the byte map of the caches; nothing of seamount is used."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_MANTISSA = 2.0**-24


def quantized(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """e4m3 bytes and power-of-two scales of blocks of channels: [n, D] -> [n, D] uint8, [n, D / channels] float32."""
    blocks = x.float().view(x.shape[0], -1, channels)
    scales = torch.exp2((blocks.abs().amax(-1).clamp_min(1e-4) / 448).log2().ceil())
    values = (blocks / scales[..., None]).to(torch.float8_e4m3fn)
    return values.view(x.shape).view(torch.uint8), scales


def latent_rows(latent: Tensor, rope: Tensor, fp8: bool) -> Tensor:
    """The bytes of tokens in a latent page: C e4m3, C / 128 float32, R bfloat16; or C + R bfloat16."""
    if not fp8:
        return torch.cat((latent, rope), 1).bfloat16().view(torch.uint8)
    values, scales = quantized(latent, 128)
    return torch.cat((values, scales.view(torch.uint8), rope.bfloat16().contiguous().view(torch.uint8)), 1)


def latents_of(rows: Tensor, rank: int, fp8: bool) -> Tensor:
    """[n, C + R] float32 from the bytes of tokens."""
    if not fp8:
        return rows.contiguous().view(torch.bfloat16).float()
    groups = rank // 128
    values = rows[:, :rank].contiguous().view(torch.float8_e4m3fn).float().view(-1, groups, 128)
    scales = rows[:, rank : rank + 4 * groups].contiguous().view(torch.float32)
    rope = rows[:, rank + 4 * groups :].contiguous().view(torch.bfloat16).float()
    return torch.cat(((values * scales[..., None]).view(-1, rank), rope), 1)


def sparse_attention(
    q: Tensor, rows: Tensor, slots: Tensor, rank: int, scale: float, fp8: bool
) -> tuple[Tensor, Tensor]:
    """q [B, H, C + R]; rows [slots, bytes]; slots [B, k], -1 for none. float64 inside, float32 results."""
    out = torch.zeros((*q.shape[:2], rank), dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        chosen = slots[b][slots[b] >= 0].long()
        if len(chosen):
            kv = latents_of(rows[chosen], rank, fp8).double()
            scores = q[b].double() @ kv.T * scale
            lse[b] = scores.logsumexp(1).float()
            out[b] = (scores.softmax(1) @ kv[:, :rank]).float()
    return out, lse


def index_pages(keys: Tensor) -> Tensor:
    """[n * 64, D] keys as pages: 64 D bytes of e4m3, then 64 float32 scales: [n, 64 (D + 4)] uint8."""
    values, scales = quantized(keys, keys.shape[1])
    num_pages = keys.shape[0] // 64
    return torch.cat((values.view(num_pages, -1), scales.view(num_pages, 64).view(torch.uint8)), 1)


def paged_logits(q: Tensor, pages: Tensor, weights: Tensor, length: int, table: Tensor) -> Tensor:
    """One query [H, D] float, one sequence: [P * 64] float32."""
    dim = q.shape[1]
    chosen = pages[table.long()]
    keys = chosen[:, : 64 * dim].contiguous().view(torch.float8_e4m3fn).float().view(-1, dim)
    scales = chosen[:, 64 * dim :].contiguous().view(torch.float32).flatten()
    logits = torch.full((keys.shape[0],), float("-inf"), device=q.device)
    sums = (torch.relu(q.double() @ keys[:length].double().T) * weights.double()[:, None]).sum(0)
    logits[:length] = (sums * scales[:length].double()).float()
    return logits


def best(row: Tensor, k: int, length: int) -> Tensor:
    """The indices of the k best of a row, lowest index first among equals, ascending, then -1: [k] int64 on the CPU."""
    scores = row[:length].float().cpu()
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    chosen = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
    return torch.cat((chosen, torch.full((k - len(chosen),), -1)))
