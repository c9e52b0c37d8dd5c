"""Loads a rank's share of a Hugging Face checkpoint: safetensors only, tensor by tensor, never a second copy.

A rank touches only the experts that it owns: names and shapes come from the files' headers, bytes are read of the
tensors that are needed. Block-scaled FP8 projections keep their form and are read into their place in merged
parameters (``parameters.place_of``); only kv_b_proj, which is used as floats, is dequantised here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from seamount.kernels.layout import CacheLayout
from seamount.kernels.quant import BLOCK_SIZE, dequantize_blocks
from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.dispatch import ExpertParallel, LocalExperts
from seamount.workers.model.checkpoint_files import find_tensors, open_tensors
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import (
    SCALE_SUFFIX,
    Place,
    Shape,
    block_counts,
    fits_blocks,
    kept_shapes,
    parameter_dtype,
    parameter_shapes,
    place_of,
    stays_block_scaled,
)
from seamount.workers.model.transformer import Transformer

Progress = Callable[[str, int, int], None]
"""(name of the parameter just loaded, bytes read so far, bytes to read in all)."""

_FLOATS: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where a parameter is stored; ``scale_shape`` is None where it is not block-scaled."""

    file: Path
    shape: Shape
    scale_file: Path | None
    num_bytes: int


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    layout_name: str,
    experts: ExpertParallel | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """A rank's model from a checkpoint folder; its caches use ``CacheLayout.create(layout_name, ...)``.

    experts: this rank's share of the routed experts; None = all of them here.
    Raises ``InvalidArgument`` as ``ModelConfig.from_json`` and ``load_weights`` do, and for a layout (field ``layout``)
    that is unknown or cannot hold this model.
    """
    config = ModelConfig.from_json(path)
    experts = LocalExperts(config.n_routed_experts) if experts is None else experts
    try:
        layout = CacheLayout.create(
            layout_name,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            index_head_dim=config.index_head_dim,
            dtype=dtype,
        )
    except ValueError as error:
        raise InvalidArgument(str(error), field="layout") from error
    owned = experts.map.owned(experts.rank)
    weights = load_weights(path, config, owned_experts=owned, dtype=dtype, device=device, progress=progress)
    return Transformer(config, layout, weights, experts)


def load_weights(
    path: Path,
    config: ModelConfig,
    *,
    owned_experts: Sequence[int],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Every parameter of one rank by its name, each in ``parameter_dtype(name, dtype)``, FP8 ones as stored.

    Projections stored as e4m3 with block scales stay so, under the names and in the shapes of ``kept_shapes``, their
    float32 scales as ``*_scale_inv`` beside them.

    path: folder with ``model.safetensors`` or shards and their index. owned_experts: global ids of routed experts.
    Memory: the result and one tensor as stored. Every header is checked before the first byte of data is read.

    Raises ``InvalidArgument`` (field ``model_path``) with reason MISSING_TENSOR, WRONG_SHAPE (names the tensor and both
    shapes), WRONG_DTYPE, BLOCKS_DO_NOT_FIT (an FP8 projection whose sides are no multiples of 128), UNEXPECTED_TENSOR
    (neither of this architecture, nor an MTP layer or a copy that is known to be unused) or BAD_CHECKPOINT (no or
    malformed files).
    """
    _check_quantization(path)
    wanted = parameter_shapes(config, owned_experts)
    with ExitStack() as stack:
        where = find_tensors(path)
        _refuse_unexpected(where, config)
        files = {file: open_tensors(stack, file) for file in sorted(_files_of(wanted, where))}
        sources = {name: _check(name, shape, where, files) for name, shape in wanted.items()}
        scaled = {name for name, source in sources.items() if source.scale_file and stays_block_scaled(name)}
        _check_mlps(wanted, scaled)
        kept = kept_shapes(config, owned_experts, scaled)
        num_bytes_total = sum(source.num_bytes for source in sources.values())
        num_bytes_done = 0
        weights: dict[str, Tensor] = {}

        def parameter(name: str, dtype: torch.dtype) -> Tensor:
            if name not in weights:
                weights[name] = torch.empty(kept[name], dtype=dtype, device=device)
            return weights[name]

        for name, source in sources.items():
            if name in scaled:
                place = place_of(name, source.shape, owned_experts)
                values = parameter(place.name, torch.float8_e4m3fn)
                scales = parameter(place.name + SCALE_SUFFIX, torch.float32)
                _read_blocks(values, scales, place, name, source, files)
            else:
                _read_into(parameter(name, parameter_dtype(name, dtype)), name, source, files)
            num_bytes_done += source.num_bytes
            if progress is not None:
                progress(name, num_bytes_done, num_bytes_total)
        return weights


# ---- what is where


def _refuse_unexpected(where: Mapping[str, Path], config: ModelConfig) -> None:
    known = parameter_shapes(config, range(config.n_routed_experts))
    for name in where:
        base = name.removesuffix(SCALE_SUFFIX)
        if base in known or _is_unused(name, config):
            continue
        raise InvalidArgument(
            f"{name} in {where[name].name} is no tensor of this architecture with the sizes in config.json; "
            "check that both belong together",
            field="model_path",
            reason="UNEXPECTED_TENSOR",
        )


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Layers after the last are for multi-token prediction (with copies of embedding and head); rotary tables repeat
    what config.json says."""
    parts = name.split(".")
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return parts[:2] == ["model", "layers"] and parts[2].isdecimal() and int(parts[2]) >= config.num_hidden_layers


def _files_of(wanted: Collection[str], where: Mapping[str, Path]) -> set[Path]:
    return {where[stored] for name in wanted for stored in (name, name + SCALE_SUFFIX) if stored in where}


# ---- checking one parameter


def _check_quantization(path: Path) -> None:
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))  # ModelConfig has read it: it is well-formed
    quantization = raw.get("quantization_config") or {}
    blocks = [BLOCK_SIZE, BLOCK_SIZE]
    method, size = quantization.get("quant_method", "fp8"), quantization.get("weight_block_size", blocks)
    if method != "fp8" or size != blocks:
        raise InvalidArgument(
            f"quantization_config in config.json has method {method!r} and blocks {size!r}; only fp8 with blocks "
            f"{blocks} is read",
            field="quantization_config",
        )


def _check_mlps(wanted: Mapping[str, Shape], scaled: Collection[str]) -> None:
    """One form for the three projections of an MLP, and for all of a layer's routed experts: products are shared."""
    forms: dict[str, tuple[bool, str]] = {}
    for name in wanted:
        unit = name.rsplit(".", 2)[0]
        if ".mlp." not in name or ".mlp.gate." in name:
            continue
        unit = unit.rsplit(".", 1)[0] if ".experts." in name else unit
        is_scaled, first = forms.setdefault(unit, (name in scaled, name))
        if is_scaled != (name in scaled):
            raise InvalidArgument(
                f"{name} and {first} must both have block scales, or neither: quantise the whole of {unit}",
                field="model_path",
                reason="WRONG_DTYPE",
            )


def _check(name: str, shape: Shape, where: Mapping[str, Path], files: Mapping[Path, Any]) -> _Source:
    kind, found = _stored_kind(name, where, files)
    if found != shape:
        raise _wrong_shape(name, found, shape)
    num_bytes = math.prod(shape) * _FLOATS[kind].itemsize
    scaled = name + SCALE_SUFFIX in where
    if scaled != (kind == "F8_E4M3"):
        told = "has block scales beside it" if scaled else f"lacks {name}{SCALE_SUFFIX}"
        raise InvalidArgument(f"{name} is stored as {kind} but {told}", field="model_path", reason="WRONG_DTYPE")
    if not scaled:
        return _Source(file=where[name], shape=shape, scale_file=None, num_bytes=num_bytes)
    scale_kind, scale_found = _stored_kind(name + SCALE_SUFFIX, where, files)
    scale_shape = block_counts(shape) if len(shape) == 2 else ()
    if scale_found != scale_shape:
        raise _wrong_shape(name + SCALE_SUFFIX, scale_found, scale_shape)
    if not fits_blocks(name, shape):
        raise InvalidArgument(
            f"{name} {list(shape)} is stored in FP8; its products need sides that are multiples of {BLOCK_SIZE}. "
            "Store it as bfloat16 without scales (seamount checkpoint quantize leaves such tensors out)",
            field="model_path",
            reason="BLOCKS_DO_NOT_FIT",
            metadata={"tensor": name},
        )
    num_bytes += math.prod(scale_shape) * _FLOATS[scale_kind].itemsize
    return _Source(file=where[name], shape=shape, scale_file=where[name + SCALE_SUFFIX], num_bytes=num_bytes)


def _stored_kind(name: str, where: Mapping[str, Path], files: Mapping[Path, Any]) -> tuple[str, Shape]:
    try:
        view = files[where[name]].get_slice(name)
    except (KeyError, SafetensorError) as error:
        raise InvalidArgument(
            f"the checkpoint has no tensor {name}; config.json says that it must",
            field="model_path",
            reason="MISSING_TENSOR",
        ) from error
    kind = str(view.get_dtype())
    if kind not in _FLOATS:
        raise InvalidArgument(
            f"{name} is stored as {kind}; it must be one of {sorted(_FLOATS)}", field="model_path", reason="WRONG_DTYPE"
        )
    return kind, tuple(view.get_shape())


def _wrong_shape(name: str, found: Shape, expected: Shape) -> InvalidArgument:
    return InvalidArgument(
        f"{name} is stored with shape {list(found)}; config.json says {list(expected)}",
        field="model_path",
        reason="WRONG_SHAPE",
        metadata={"tensor": name, "found": str(list(found)), "expected": str(list(expected))},
    )


# ---- reading one parameter


def _read_into(target: Tensor, name: str, source: _Source, files: Mapping[Path, Any]) -> None:
    stored: Tensor = files[source.file].get_tensor(name)
    if source.scale_file is None:
        target.copy_(stored)  # a copy on purpose: the file may be replaced while the model serves
        return
    scale_inv: Tensor = files[source.scale_file].get_tensor(name + SCALE_SUFFIX)
    dequantize_blocks(stored, scale_inv, target.dtype, out=target)


def _read_blocks(
    values: Tensor, scales: Tensor, place: Place, name: str, source: _Source, files: Mapping[Path, Any]
) -> None:
    if place.expert is not None:
        values, scales = values[place.expert], scales[place.expert]
    assert source.scale_file is not None
    values[place.first_row : place.first_row + source.shape[0]] = files[source.file].get_tensor(name)
    first_block = place.first_row // BLOCK_SIZE
    blocks = slice(first_block, first_block + block_counts(source.shape)[0])
    scales[blocks] = files[source.scale_file].get_tensor(name + SCALE_SUFFIX)
