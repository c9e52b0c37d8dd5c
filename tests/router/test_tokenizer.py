from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from seamount.router.byte_tokenizer import write_byte_tokenizer
from seamount.router.tokenizer import Control, Tokenizer, byte_alphabet
from seamount.wire.errors import InvalidArgument


@given(text=st.text(st.characters(codec="utf-8")))
def test_text_round_trips(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(data=st.binary(max_size=30))
def test_bytes_round_trip(data: bytes, tokenizer: Tokenizer) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_bytes(data))) == data


@pytest.mark.parametrize("control", list(Control))
def test_control_literals_in_text_are_text(control: Control, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{control.value}b")
    assert not any(tokenizer.control(token_id) for token_id in ids)
    assert tokenizer.decode(ids) == f"a{control.value}b"


@pytest.mark.parametrize("control", list(Control))
def test_control_ids(control: Control, tokenizer: Tokenizer, official_tokenizer: tokenizers.Tokenizer) -> None:
    token_id = tokenizer.control_id(control)
    assert official_tokenizer.encode(control.value, add_special_tokens=False).ids == [token_id]
    assert tokenizer.control(token_id) is control
    assert tokenizer.token_bytes(token_id) == control.value.encode()
    assert tokenizer.decode([token_id]) == control.value


def test_ids_that_stand_for_nothing_are_tolerated(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 1 << 31]) == "\ufffd\ufffd"


def test_size_and_fingerprint(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    file = tokenizer_folder / "tokenizer.json"
    assert tokenizer.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    official = tokenizers.Tokenizer.from_file(str(file))
    assert tokenizer.vocab_size == official.get_vocab_size(with_added_tokens=True)


def test_the_written_file_has_v32s_flags(tmp_path: Path) -> None:
    size = write_byte_tokenizer(tmp_path / "new")
    definition = json.loads((tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["special"] for token in definition["added_tokens"]}
    assert special == {
        "<｜begin▁of▁sentence｜>": True,
        "<｜end▁of▁sentence｜>": True,
        "<｜▁pad▁｜>": True,
        "｜DSML｜": True,
        "<think>": False,
        "</think>": False,
        "<｜User｜>": False,
        "<｜Assistant｜>": False,
    }
    assert [token["id"] for token in definition["added_tokens"][:3]] == [0, 1, 2]
    assert definition["normalizer"] == {"type": "Sequence", "normalizers": []}
    assert all(character in definition["model"]["vocab"] for character in byte_alphabet())
    assert size == Tokenizer.load(tmp_path / "new").vocab_size
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["add_bos_token"] is False
    assert "chat_template" not in config


def test_one_text_has_several_tokenisations(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("hello")) == 1
    assert tokenizer.decode([tokenizer.encode(letter)[0] for letter in "hello"]) == "hello"


@pytest.mark.parametrize("control", list(Control))
def test_a_missing_control_token_is_named(control: Control, tokenizer_folder: Path, tmp_path: Path) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != control.value]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(InvalidArgument, match="is missing") as caught:
        Tokenizer.load(tmp_path)
    assert control.value in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"type": "WordPiece", "vocab": {}}}', '{"model": 3}'])
def test_unusable_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgument) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.reason == "TOKENIZER_UNUSABLE"


def test_missing_bytes_and_missing_files_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Tokenizer.load(tmp_path / "nowhere")
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    del definition["model"]["vocab"]["Ā"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(InvalidArgument, match="1 of the 256"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "1", "é", " a", "<", "\u0301", "a "])
def test_a_long_run_of_one_kind_takes_linear_time(unit: str, tokenizer: Tokenizer) -> None:
    text = unit * (200_000 // len(unit.encode()))
    began = time.perf_counter()
    ids = tokenizer.encode(text)
    elapsed = time.perf_counter() - began
    print(f"{len(text.encode()) / 1e6 / elapsed:.1f} MB/s")
    assert ids
    assert elapsed < 2.0
