"""Loads a rank's share of a Hugging Face checkpoint: safetensors only, tensor by tensor, never a second copy.

A rank touches only the experts that it owns: names and shapes come from the files' headers, bytes are read of the
tensors that are needed. FP8 block-scaled projections are dequantised here, 128 rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seamount.kernels.layout import CacheLayout
from seamount.kernels.quant import dequantize_blocks
from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.dispatch import ExpertParallel, LocalExperts
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import Shape, parameter_dtype, parameter_shapes
from seamount.workers.model.transformer import Transformer

Progress = Callable[[str, int, int], None]
"""(name of the parameter just loaded, bytes read so far, bytes to read in all)."""

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_SCALE: Final = "_scale_inv"
_MAX_HEADER_BYTES: Final = 100 << 20
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
    owned_experts: Collection[int],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Every parameter of one rank by its checkpoint name, each in ``parameter_dtype(name, dtype)``.

    path: folder with ``model.safetensors`` or shards and their index. owned_experts: global ids of routed experts.
    Memory: the result and one tensor as stored. Every header is checked before the first byte of data is read.

    Raises ``InvalidArgument`` (field ``model_path``) with reason MISSING_TENSOR, WRONG_SHAPE (names the tensor and both
    shapes), WRONG_DTYPE, UNEXPECTED_TENSOR (neither of this architecture, nor an MTP layer or a copy that is known to
    be unused) or BAD_CHECKPOINT (no or malformed files).
    """
    block = _block_shape(path)
    wanted = parameter_shapes(config, owned_experts)
    with ExitStack() as stack:
        where = _find_tensors(path)
        _refuse_unexpected(where, config)
        files = {file: _open(stack, file) for file in sorted(_files_of(wanted, where))}
        sources = {name: _check(name, shape, where, files, block) for name, shape in wanted.items()}
        num_bytes_total = sum(source.num_bytes for source in sources.values())
        num_bytes_done = 0
        weights: dict[str, Tensor] = {}
        for name, source in sources.items():
            target = torch.empty(source.shape, dtype=parameter_dtype(name, dtype), device=device)
            _read_into(target, name, source, files, block)
            weights[name] = target
            num_bytes_done += source.num_bytes
            if progress is not None:
                progress(name, num_bytes_done, num_bytes_total)
        return weights


def model_fingerprint(path: Path) -> str:
    """SHA-256 (hex) that tells models apart without reading all of a large one.

    Over ``config.json``, and for each safetensors file in name order its name, size, header and 16 blocks of 4 KiB at
    even distances of its data: training changes every tensor, so samples see it. A change of single values between
    the samples goes unseen. Raises ``InvalidArgument`` (BAD_CHECKPOINT) where files are missing or malformed.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    try:
        add((path / "config.json").read_bytes())
        for file in sorted(set(_find_tensors(path).values())):
            size = file.stat().st_size
            add(file.name.encode())
            add(size.to_bytes(8, "little"))
            with file.open("rb") as opened:
                header = _read_header_bytes(opened.read(8), opened.read, file)
                add(header)
                start = 8 + len(header)
                for i in range(16):
                    opened.seek(start + (size - start) * i // 16)
                    add(opened.read(4096))
    except OSError as error:
        raise _bad(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


# ---- what is where


def _find_tensors(path: Path) -> dict[str, Path]:
    """The file of every stored tensor, from the index or, for a single file, from its header."""
    index = path / _INDEX
    if not index.exists():
        return dict.fromkeys(_header_names(path / _SINGLE), path / _SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(f"{index} is not a safetensors index: {error!r}") from error
    for file_name in sorted(set(pairs.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise _bad(f"{index} names the shard {file_name!r}; it must be a .safetensors file in the same folder")
        if not (path / file_name).exists():
            raise _bad(f"{index} names the shard {file_name}, which is not in {path}: fetch it again")
    return {name: path / file_name for name, file_name in pairs.items()}


def _header_names(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            header = json.loads(_read_header_bytes(opened.read(8), opened.read, file))
    except (OSError, ValueError) as error:
        raise _bad(f"cannot read {file}: {error}; give a folder with safetensors") from error
    return [name for name in header if name != "__metadata__"]


def _read_header_bytes(length: bytes, read: Callable[[int], bytes], file: Path) -> bytes:
    num_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or num_bytes > _MAX_HEADER_BYTES:
        raise _bad(f"{file} is not a safetensors file: its header would have {num_bytes} bytes")
    header = read(num_bytes)
    if len(header) < num_bytes:
        raise _bad(f"{file} is cut off inside its header: fetch it again")
    return header


def _refuse_unexpected(where: Mapping[str, Path], config: ModelConfig) -> None:
    known = parameter_shapes(config, range(config.n_routed_experts))
    for name in where:
        base = name.removesuffix(_SCALE)
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
    return {where[stored] for name in wanted for stored in (name, name + _SCALE) if stored in where}


def _open(stack: ExitStack, file: Path) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise _bad(f"cannot read {file}: {error}; fetch it again") from error


# ---- checking one parameter


def _block_shape(path: Path) -> tuple[int, int]:
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))  # ModelConfig has read it: it is well-formed
    quantization = raw.get("quantization_config") or {}
    method = quantization.get("quant_method", "fp8")
    size = quantization.get("weight_block_size", [128, 128])
    valid = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if method != "fp8" or not valid:
        raise InvalidArgument(
            f"quantization_config in config.json has method {method!r} and blocks {size!r}; only fp8 with two positive "
            "block sizes is read",
            field="quantization_config",
        )
    return size[0], size[1]


def _check(
    name: str, shape: Shape, where: Mapping[str, Path], files: Mapping[Path, Any], block: tuple[int, int]
) -> _Source:
    kind, found = _stored_kind(name, where, files)
    if found != shape:
        raise _wrong_shape(name, found, shape)
    num_bytes = math.prod(shape) * _FLOATS[kind].itemsize
    scaled = name + _SCALE in where
    if scaled != (kind == "F8_E4M3"):
        told = "has block scales beside it" if scaled else f"lacks {name}{_SCALE}"
        raise InvalidArgument(f"{name} is stored as {kind} but {told}", field="model_path", reason="WRONG_DTYPE")
    if not scaled:
        return _Source(file=where[name], shape=shape, scale_file=None, num_bytes=num_bytes)
    scale_kind, scale_found = _stored_kind(name + _SCALE, where, files)
    scale_shape = (-(-shape[0] // block[0]), -(-shape[1] // block[1])) if len(shape) == 2 else ()
    if scale_found != scale_shape:
        raise _wrong_shape(name + _SCALE, scale_found, scale_shape)
    num_bytes += math.prod(scale_shape) * _FLOATS[scale_kind].itemsize
    return _Source(file=where[name], shape=shape, scale_file=where[name + _SCALE], num_bytes=num_bytes)


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


def _bad(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="model_path", reason="BAD_CHECKPOINT")


# ---- reading one parameter


def _read_into(target: Tensor, name: str, source: _Source, files: Mapping[Path, Any], block: tuple[int, int]) -> None:
    stored: Tensor = files[source.file].get_tensor(name)
    if source.scale_file is None:
        target.copy_(stored)  # a copy on purpose: the file may be replaced while the model serves
        return
    scale_inv: Tensor = files[source.scale_file].get_tensor(name + _SCALE)
    dequantize_blocks(stored, scale_inv, target.dtype, block, out=target)
