"""Training documents: conversations as token ids, with the assistant's tokens marked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from seamount.router.encoding import render
from seamount.router.messages import Message, Role, ThinkingMode
from seamount.router.tokenizer import Control, Tokenizer

TOKENIZER = Path(__file__).parent / "tokenizer"


@dataclass(frozen=True, slots=True)
class Document:
    token_ids: npt.NDArray[np.uint16]
    """[n], from BOS to the last EOS."""
    loss_mask: npt.NDArray[np.bool_]
    """[n], True at the assistant's tokens."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """name: of the mixture."""

    name: str


SHORT = Mixture("short")
LONG = Mixture("long")


class DocumentSource:
    """Makes documents with one tokenizer."""

    _shared: ClassVar[DocumentSource | None] = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def shared(cls) -> DocumentSource:
        """This process's own, with the recipe's tokenizer."""
        if cls._shared is None:
            cls._shared = cls(Tokenizer.load(TOKENIZER))
        return cls._shared

    def documents(self, mixture: Mixture, *, seed: tuple[int, ...], max_tokens: int) -> Iterator[Document]:
        """Endless documents of at most ``max_tokens`` tokens each, a function of the arguments alone."""
        rng = random.Random(repr((mixture.name, seed)))
        while True:
            text = "".join(rng.choices("abcdefgh 0123456789", k=rng.randint(4, max_tokens // 4)))
            ids: list[int] = []
            mask: list[bool] = []
            conversation = [
                Message(role=Role.USER, content=f"Repeat {text}"),
                Message(role=Role.ASSISTANT, reasoning_content="Copy it.", content=text),
            ]
            own = False
            for piece in render(conversation, mode=ThinkingMode.THINKING).pieces():
                new = (
                    [self._tokenizer.control_id(piece)]
                    if isinstance(piece, Control)
                    else self._tokenizer.encode(str(piece))
                )
                ids.extend(new)
                mask.extend([own] * len(new))
                own = own or piece is Control.THINK
            if len(ids) <= max_tokens:
                yield Document(np.array(ids, np.uint16), np.array(mask, np.bool_))
