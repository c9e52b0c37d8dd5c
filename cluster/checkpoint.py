"""The checkpoint to serve: that it is there, and random ones with a tokenizer for tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

from seamount.cluster.settings import Settings
from seamount.wire.errors import FailedPrecondition, InvalidArgument


def init_checkpoint(path: Path, *, seed: int, geometry: str, dtype: str = "bfloat16", fp8: bool = False) -> None:
    """Write a random model and its byte-level tokenizer to a new folder, all or nothing.

    The same arguments give the same bytes. dtype: bfloat16 or float32; fp8: projections as e4m3 with block scales.
    Raises ``InvalidArgument`` for an unknown geometry or dtype, ``AlreadyExists`` if ``path`` exists.
    """
    import torch  # slow to import: other commands do without

    from seamount.router.byte_tokenizer import write_byte_tokenizer
    from seamount.router.tokenizer import Control, Tokenizer
    from seamount.workers.model.random_checkpoint import write_random_checkpoint

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise InvalidArgument(f"dtype {dtype!r} is unknown; choose one of {sorted(dtypes)}", field="dtype")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = write_byte_tokenizer(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        write_random_checkpoint(
            path,
            seed=seed,
            geometry=geometry,
            vocab_size=vocab_size,
            bos_token_id=tokenizer.control_id(Control.BOS),
            eos_token_id=tokenizer.control_id(Control.EOS),
            dtype=dtypes[dtype],
            fp8=fp8,
            extra_files={file.name: file.read_bytes() for file in folder.iterdir()},
        )


def require_checkpoint(settings: Settings) -> None:
    """Raises ``FailedPrecondition`` where there is no model: nobody wants random weights in its place."""
    path = settings.model.path
    if not (path / "config.json").is_file():
        raise FailedPrecondition(
            f"model.path: there is no config.json in {path}; give the folder of a checkpoint (the repository has "
            "checkpoints/tiny-agent), or make a random one with: seamount checkpoint init PATH",
            reason="NO_CHECKPOINT",
        )
