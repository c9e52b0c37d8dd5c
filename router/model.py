"""The model as the router knows it: its name, tokenizer, limits and fingerprint. No weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from seamount.router.history import History, session_fingerprint
from seamount.router.tokenizer import Tokenizer
from seamount.wire.errors import InvalidArgument, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """vocab_size: rows of the head, padding included; ids from requests must be below it."""

    name: str
    tokenizer: Tokenizer
    history: History
    vocab_size: int
    max_context_tokens: int

    @property
    def fingerprint(self) -> str:
        """Of model, tokenizer and encoder: token ids are valid under the one that they were made with."""
        return self.history.fingerprint

    def check_name(self, model: str) -> None:
        """Raise ``NotFound`` for any model but this one; empty means this one."""
        if model not in ("", self.name):
            raise NotFound(
                "there is no such model here; ListModels names those there are", reason="MODEL_NOT_FOUND", field="model"
            )

    @staticmethod
    def load(path: Path, *, name: str, max_context_tokens: int) -> ServedModel:
        """From a checkpoint folder's ``config.json`` and tokenizer files. Raises ``InvalidArgument``."""
        config_path = path / "config.json"
        try:
            stored = config_path.read_bytes()
            vocab_size = int(json.loads(stored)["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(
                f"model.path: {config_path} is missing or no model configuration ({type(error).__name__}); make a "
                "checkpoint with 'seamount checkpoint init'",
                field="model.path",
                reason="BAD_CHECKPOINT",
            ) from None
        tokenizer = Tokenizer.load(path)
        fingerprint = session_fingerprint(hashlib.sha256(stored).hexdigest(), tokenizer)
        return ServedModel(
            name=name,
            tokenizer=tokenizer,
            history=History(tokenizer, fingerprint),
            vocab_size=vocab_size,
            max_context_tokens=max_context_tokens,
        )
