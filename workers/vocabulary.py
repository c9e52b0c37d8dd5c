"""How many ids of the model's head are tokens: the rest is padding that must never be sampled."""

from __future__ import annotations

import json
from pathlib import Path

from seamount.wire.errors import InvalidArgument


def vocabulary_size(model_path: Path) -> int:
    """One more than the highest id in ``tokenizer.json``, added tokens included. Raises ``InvalidArgument``."""
    path = model_path / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
        return max(map(int, ids)) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(
            f"model.path: {path} is missing or no byte-level BPE of the tokenizers library ({type(error).__name__})",
            field="model.path",
            reason="BAD_TOKENIZER",
        ) from None
