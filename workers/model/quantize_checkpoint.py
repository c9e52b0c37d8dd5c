"""The FP8 form of a checkpoint: projections as e4m3 with a scale a block of 128 x 128, the rest unchanged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from torch import Tensor

from seamount.kernels.quant import BLOCK_SIZE, quantize_blocks
from seamount.wire.errors import InvalidArgument
from seamount.workers.model.checkpoint_files import (
    INDEX,
    find_tensors,
    new_checkpoint,
    open_tensors,
    write_json,
    write_tensors,
)
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import SCALE_SUFFIX, Shape, fits_blocks, is_projection, parameter_shapes

Progress = Callable[[str, int, int], None]
"""(name of the tensor just converted, bytes read so far, bytes to read in all)."""

_FLOATS: Final = ("F64", "F32", "F16", "BF16")


def is_stored_in_blocks(name: str, shape: Shape) -> bool:
    """Whether the FP8 form block-scales this tensor: a projection whose sides fit."""
    return is_projection(name, shape) and fits_blocks(name, shape)


def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A projection as stored: itself in float8_e4m3fn, and ``*_scale_inv`` float32."""
    values, scales = quantize_blocks(weight)
    return {name: values, name + SCALE_SUFFIX: scales}


def quantization_config(config: ModelConfig) -> dict[str, object]:
    """``quantization_config`` of ``config.json``; modules_to_not_convert names the linear layers that stay floats."""
    shapes = parameter_shapes(config, range(config.n_routed_experts))
    misfits = [name for name, shape in shapes.items() if is_projection(name, shape) and not fits_blocks(name, shape)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head", "indexer.weights_proj"]
        + [name.removesuffix(".weight") for name in misfits],
    }


def quantize_checkpoint(
    source: Path, target: Path, *, max_shard_bytes: int = 4 << 30, progress: Progress | None = None
) -> None:
    """Write the FP8 form of a float checkpoint to a new folder, all or nothing; other files are copied.

    Projections that do not fit (``parameters.fits_blocks``) stay as they are. Memory: one shard.
    Raises ``InvalidArgument`` for a source that is malformed, quantised already or of another architecture,
    ``AlreadyExists`` if ``target`` exists.
    """
    config = ModelConfig.from_json(source)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if raw.get("quantization_config"):
        raise InvalidArgument(
            f"{source} is quantised already (quantization_config in config.json); give one in bfloat16 or float32",
            field="source",
        )
    where = find_tensors(source)
    with new_checkpoint(target) as draft, ExitStack() as stack:
        files = {file: open_tensors(stack, file) for file in sorted(set(where.values()))}
        slices = {name: files[file].get_slice(name) for name, file in sorted(where.items())}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        sizes = {name: math.prod(shape) * _item_bytes(slices[name].get_dtype()) for name, shape in shapes.items()}
        done = 0

        def tensors_of(name: str) -> dict[str, Tensor]:
            nonlocal done
            tensor: Tensor = files[where[name]].get_tensor(name)
            blocks = slices[name].get_dtype() in _FLOATS and is_stored_in_blocks(name, shapes[name])
            stored = in_blocks(name, tensor) if blocks else {name: tensor}
            done += sizes[name]
            if progress is not None:
                progress(name, done, sum(sizes.values()))
            return stored

        write_tensors(draft, sizes, tensors_of, max_shard_bytes)
        write_json(draft / "config.json", raw | {"quantization_config": quantization_config(config)})
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, draft / file.name)


def _item_bytes(kind: str) -> int:
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    return sizes.get(kind, 1)
