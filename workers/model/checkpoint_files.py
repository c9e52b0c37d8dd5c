"""The files of a Hugging Face checkpoint: which tensor is in which, what identifies them, how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seamount.wire.errors import AlreadyExists, InvalidArgument

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_MAX_HEADER_BYTES: Final = 100 << 20


def find_tensors(path: Path) -> dict[str, Path]:
    """The file of every stored tensor, from the index or, for a single file, from its header.

    Raises ``InvalidArgument`` (BAD_CHECKPOINT) where files are missing or malformed.
    """
    index = path / INDEX
    if not index.exists():
        return dict.fromkeys(_header_names(path / SINGLE), path / SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_checkpoint(f"{index} is not a safetensors index: {error!r}") from error
    for file_name in sorted(set(pairs.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise bad_checkpoint(
                f"{index} names the shard {file_name!r}; it must be a .safetensors file in the same folder"
            )
        if not (path / file_name).exists():
            raise bad_checkpoint(f"{index} names the shard {file_name}, which is not in {path}: fetch it again")
    return {name: path / file_name for name, file_name in pairs.items()}


def _header_names(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            header = json.loads(_read_header_bytes(opened.read(8), opened.read, file))
    except (OSError, ValueError) as error:
        raise bad_checkpoint(f"cannot read {file}: {error}; give a folder with safetensors") from error
    return [name for name in header if name != "__metadata__"]


def _read_header_bytes(length: bytes, read: Callable[[int], bytes], file: Path) -> bytes:
    num_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or num_bytes > _MAX_HEADER_BYTES:
        raise bad_checkpoint(f"{file} is not a safetensors file: its header would have {num_bytes} bytes")
    header = read(num_bytes)
    if len(header) < num_bytes:
        raise bad_checkpoint(f"{file} is cut off inside its header: fetch it again")
    return header


def open_tensors(stack: ExitStack, file: Path) -> Any:
    """A safetensors file, open as long as ``stack``. Raises ``InvalidArgument`` (BAD_CHECKPOINT)."""
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise bad_checkpoint(f"cannot read {file}: {error}; fetch it again") from error


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
        for file in sorted(set(find_tensors(path).values())):
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
        raise bad_checkpoint(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


@contextmanager
def new_checkpoint(path: Path) -> Iterator[Path]:
    """A folder to write into; it becomes ``path`` at the end, or vanishes with an error: all or nothing.

    Raises ``AlreadyExists`` if ``path`` exists.
    """
    if path.exists():
        raise AlreadyExists(f"{path} exists; choose another folder or remove it", reason="CHECKPOINT_EXISTS")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft.chmod(0o755)
        yield draft
        os.rename(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_tensors(
    folder: Path, num_bytes: Mapping[str, int], tensors_of: Callable[[str], Mapping[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write safetensors, with an index where there is more than one file; one shard is in memory at a time.

    num_bytes: of each name, in the order of writing, about what it will store; tensors_of: what is stored for it.
    max_shard_bytes: beyond it a new shard begins.
    """
    shards = list(_shards(num_bytes, max_shard_bytes))
    if len(shards) == 1:
        files = [SINGLE]
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, names in zip(files, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= tensors_of(name)
        # One metadata key: safetensors writes several in no fixed order, and equal tensors shall give equal files.
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def bad_checkpoint(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="model_path", reason="BAD_CHECKPOINT")


def _shards(num_bytes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    shard_bytes = 0
    for name, size in num_bytes.items():
        if shard and shard_bytes + size > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(name)
        shard_bytes += size
    yield shard
