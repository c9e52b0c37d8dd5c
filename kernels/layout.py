"""Where every byte of the caches lies. A slot is ``physical_page * 64 + offset``.

Each layer has two planes of pages: MLA's latent and the indexer's key. Three layouts (C = kv_lora_rank,
R = qk_rope_head_dim, D = index_head_dim, W = bytes of the compute dtype):

    name    latent, a token's bytes are contiguous                       index key
    fp8     C e4m3 | C / 128 scales float32 | R rotated bfloat16         fp8 page
    bf16    C bfloat16 | R rotated bfloat16                              fp8 page
    exact   C | R, both in the compute dtype                             D in the compute dtype

    fp8 page: the 64 keys of D e4m3 bytes each, then the 64 scales float32.

At V3.2's sizes (512, 64, 128): fp8 has 656 and 132 bytes a token and layer, bf16 1152 and 132.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seamount.kernels.quant import BLOCK_SIZE, decode_e4m3, quantize, wide_dtype

PAGE_SIZE = 64
"""Tokens in a page."""

LayoutName = Literal["fp8", "bf16", "exact"]
PlaneName = Literal["latent", "index"]
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """Byte map of one model's caches; made by ``create``. dtype: the compute dtype of the model that writes them."""

    name: LayoutName
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int
    dtype: torch.dtype

    @staticmethod
    def create(
        name: str, *, kv_lora_rank: int, qk_rope_head_dim: int, index_head_dim: int, dtype: torch.dtype
    ) -> CacheLayout:
        """Raises ValueError for an unknown name or sizes that the layout cannot hold; the message names the field."""
        if name not in ("fp8", "bf16", "exact"):
            raise ValueError(f"layout is {name!r}; it must be 'fp8', 'bf16' or 'exact'")
        if name == "fp8" and kv_lora_rank % BLOCK_SIZE:
            raise ValueError(
                f"kv_lora_rank is {kv_lora_rank}; the fp8 layout needs a multiple of {BLOCK_SIZE}: use bf16 or exact"
            )
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; it must be float32, float64 or bfloat16")
        if qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {qk_rope_head_dim}; it must be even")
        if index_head_dim < 1 or index_head_dim & (index_head_dim - 1):
            raise ValueError(f"index_head_dim is {index_head_dim}; it must be a power of two")
        return CacheLayout(
            name=name,  # type: ignore[arg-type]  # checked above
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            index_head_dim=index_head_dim,
            dtype=dtype,
        )

    @property
    def latent_dim(self) -> int:
        """Channels of a latent row: kv_lora_rank, then qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def latent_bytes_per_token(self) -> int:
        if self.name == "fp8":
            return self.kv_lora_rank + self.kv_lora_rank // BLOCK_SIZE * _SCALE_BYTES + self.qk_rope_head_dim * 2
        return self.latent_dim * self._latent_dtype.itemsize

    @property
    def index_bytes_per_token(self) -> int:
        if self.quantizes_index:
            return self.index_head_dim + _SCALE_BYTES
        return self.index_head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes of both planes for one token and layer."""
        return self.latent_bytes_per_token + self.index_bytes_per_token

    @property
    def quantizes_index(self) -> bool:
        """Whether indexer keys (and so the queries that meet them) are e4m3."""
        return self.name != "exact"

    @property
    def signature(self) -> str:
        """Equal exactly when two ranks may exchange pages: e.g. ``fp8/512/64/128``, ``exact/512/64/128/float32``."""
        sizes = f"{self.name}/{self.kv_lora_rank}/{self.qk_rope_head_dim}/{self.index_head_dim}"
        return f"{sizes}/{str(self.dtype).removeprefix('torch.')}" if self.name == "exact" else sizes

    def page_bytes(self, which: PlaneName) -> int:
        return PAGE_SIZE * (self.latent_bytes_per_token if which == "latent" else self.index_bytes_per_token)

    def allocate(self, num_layers: int, num_pages: int, device: str | torch.device = "cpu") -> CachePlanes:
        """Two planes a layer, ``num_pages`` pages each, zeroed: fresh pages hold no bytes of anybody."""

        def planes(which: PlaneName) -> list[Tensor]:
            shape = (num_pages, self.page_bytes(which))
            return [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(num_layers)]

        return CachePlanes(latent=planes("latent"), index=planes("index"))

    @property
    def _latent_dtype(self) -> torch.dtype:
        return self.dtype if self.name == "exact" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlanes:
    """latent, index: one uint8 tensor a layer, [num_pages, 64 * bytes of a token]."""

    latent: list[Tensor]
    index: list[Tensor]

    def get(self, which: PlaneName) -> list[Tensor]:
        return self.latent if which == "latent" else self.index


def gather_slots(plane: Tensor, slots: Tensor, layout: CacheLayout, which: PlaneName) -> Tensor:
    """The bytes of some slots, a token's in one row: [n, bytes of a token] uint8, a copy.

    plane: [num_pages, page bytes] uint8; slots: [n] int64, n may be 0. An index row of an fp8 page is key | scale.
    Raises IndexError for a slot outside the plane.
    """
    if which == "index" and layout.quantizes_index:
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        wide = (_as_wide_integers(part)[0] for part in _index_page_parts(plane, layout))
        return torch.cat([part[page, offset].view(torch.uint8) for part in wide], dim=-1)
    return plane.view(-1, plane.shape[1] // PAGE_SIZE).index_select(0, slots)


def scatter_slots(plane: Tensor, slots: Tensor, rows: Tensor, layout: CacheLayout, which: PlaneName) -> None:
    """The inverse of ``gather_slots``: writes rows [n, bytes of a token] uint8 into distinct slots [n]."""
    if which == "index" and layout.quantizes_index:
        keys, scales = _index_page_parts(plane, layout)
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        for part, values in (
            (keys, rows[:, : layout.index_head_dim]),
            (scales, rows[:, layout.index_head_dim :]),
        ):
            wide_part, wide_values = _as_wide_integers(part, values)
            wide_part[page, offset] = wide_values
    else:
        wide_plane, wide_rows = _as_wide_integers(plane.view(-1, plane.shape[1] // PAGE_SIZE), rows)
        wide_plane.index_copy_(0, slots, wide_rows)


def pack_latent(latent: Tensor, rope_key: Tensor, layout: CacheLayout) -> Tensor:
    """Cache rows of normalised latents [n, C] and rotated shared keys [n, R]: [n, latent_bytes_per_token] uint8."""
    if layout.name == "fp8":
        values, scales = quantize(latent)
        parts = (values, scales, rope_key.to(torch.bfloat16))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    return torch.cat((latent, rope_key), dim=-1).to(layout._latent_dtype).view(torch.uint8)


def unpack_latent(rows: Tensor, layout: CacheLayout) -> Tensor:
    """Latents as the cache stores them: [n, C + R] in float32 (float64 if the layout's dtype is float64).

    rows: [n, latent_bytes_per_token] uint8, contiguous.
    """
    wide = wide_dtype(layout.dtype)
    if layout.name != "fp8":
        return rows.view(layout._latent_dtype).to(wide)
    rank = layout.kv_lora_rank
    scales_end = rank + rank // BLOCK_SIZE * _SCALE_BYTES
    scales = rows[:, rank:scales_end].view(torch.float32)
    out = torch.empty((rows.shape[0], layout.latent_dim), dtype=wide, device=rows.device)
    groups = rank // BLOCK_SIZE
    blocks = decode_e4m3(rows[:, :rank], wide).view(-1, groups, BLOCK_SIZE)
    torch.mul(blocks, scales.unsqueeze(-1), out=out[:, :rank].view(-1, groups, BLOCK_SIZE))
    out[:, rank:] = rows[:, scales_end:].view(torch.bfloat16)
    return out


def pack_index_key(key: Tensor, layout: CacheLayout) -> Tensor:
    """Cache rows of indexer keys [n, D], normalised, rotated and transformed: [n, index_bytes_per_token] uint8."""
    if not layout.quantizes_index:
        return key.to(layout.dtype).contiguous().view(torch.uint8)
    values, scales = quantize(key, block_size=layout.index_head_dim)
    return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), dim=-1)


def unpack_index_pages(pages: Tensor, layout: CacheLayout) -> tuple[Tensor, Tensor | None]:
    """Indexer keys of whole pages, in page order.

    pages: [n, 64 * index_bytes_per_token] uint8, contiguous.
    Returns (keys [n * 64, D] float32 (float64 if the layout's dtype is float64), not yet scaled;
    scales [n * 64] float32, None in ``exact``).
    """
    wide = wide_dtype(layout.dtype)
    if not layout.quantizes_index:
        return pages.view(layout.dtype).view(-1, layout.index_head_dim).to(wide), None
    key_bytes = PAGE_SIZE * layout.index_head_dim
    keys = decode_e4m3(pages[:, :key_bytes], wide).view(-1, layout.index_head_dim)
    return keys, pages[:, key_bytes:].view(torch.float32).reshape(-1)


def _as_wide_integers(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes as int64 or int32 where sizes and alignment allow: bytes one by one take four times as long."""
    for dtype in (torch.int64, torch.int32):
        if all(_is_multiple(tensor, dtype.itemsize) for tensor in tensors):
            return tuple(tensor.view(dtype) for tensor in tensors)
    return tensors


def _is_multiple(tensor: Tensor, size: int) -> bool:
    """Whether a uint8 tensor can be viewed as integers of ``size`` bytes, none of them across two rows."""
    places = (*tensor.stride()[:-1], tensor.shape[-1], tensor.storage_offset(), tensor.data_ptr())
    return tensor.stride(-1) == 1 and all(place % size == 0 for place in places)


def _index_page_parts(plane: Tensor, layout: CacheLayout) -> tuple[Tensor, Tensor]:
    key_bytes = PAGE_SIZE * layout.index_head_dim
    keys = plane[:, :key_bytes].view(-1, PAGE_SIZE, layout.index_head_dim)
    return keys, plane[:, key_bytes:].view(-1, PAGE_SIZE, _SCALE_BYTES)
