"""What the router's tests share: a byte-level tokenizer and the same file read as the official encoder would."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from seamount.router.byte_tokenizer import write_byte_tokenizer
from seamount.router.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def official_tokenizer(tokenizer_folder: Path) -> tokenizers.Tokenizer:
    """With added tokens: a control literal anywhere in the text becomes its id."""
    return tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
