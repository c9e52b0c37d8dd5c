"""The model's tokenizer: text to ids without any control id, and ids back to bytes.

Untrusted text and template text are encoded by a variant without added tokens, so ``<｜Assistant｜>`` typed by a user
comes out as ordinary text. Control ids are looked up by content and placed by the encoder alone.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from seamount.wire.errors import InvalidArgument

_UNUSED_ID_BYTES = "\ufffd".encode()


class Control(enum.Enum):
    """The tokens that structure a V3.2 conversation, by content."""

    BOS = "<｜begin▁of▁sentence｜>"
    EOS = "<｜end▁of▁sentence｜>"
    USER = "<｜User｜>"
    ASSISTANT = "<｜Assistant｜>"
    THINK = "<think>"
    END_THINK = "</think>"
    DSML = "｜DSML｜"


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0…255 in a byte-level vocabulary (GPT-2's mapping)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


class Tokenizer:
    """Byte-level BPE from a ``tokenizer.json``. Immutable after loading; safe to share between threads."""

    fingerprint: str
    """SHA-256 of the file, in hex."""
    vocab_size: int
    """One more than the largest id of the file; the model's embedding may have more rows."""

    def __init__(self, text: bytes, *, source: str) -> None:
        definition = _parse(text, source)
        added = {int(token["id"]): str(token["content"]) for token in definition["added_tokens"]}
        definition["added_tokens"] = []
        definition["post_processor"] = None
        try:
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare Exception
            raise _unusable(source, "the tokenizers library refuses it", "replace it") from error
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self._bytes = _token_bytes(definition["model"]["vocab"], added)
        self.vocab_size = len(self._bytes)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        ids = {content: token_id for token_id, content in added.items()}
        for control in Control:
            if control.value not in ids:
                raise _unusable(
                    source, f"the added token {control.value} is missing", "use a checkpoint with V3.2's tokenizer"
                )
        self._control_ids = {control: ids[control.value] for control in Control}
        self._controls = {token_id: control for control, token_id in self._control_ids.items()}
        self._byte_ids = _single_byte_ids(definition["model"]["vocab"], source)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads ``tokenizer.json``, or that file of a checkpoint folder.

        Raises ``InvalidArgument`` TOKENIZER_UNUSABLE: no such file, not a byte-level BPE, or a control token of V3.2
        is missing (named in the message).
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_bytes()
        except OSError as error:
            raise _unusable(str(file), f"it cannot be read ({error.strerror})", "check the checkpoint") from None
        return cls(text, source=str(file))

    @property
    def eos_token_id(self) -> int:
        return self._control_ids[Control.EOS]

    def control_id(self, control: Control) -> int:
        return self._control_ids[control]

    def control(self, token_id: int) -> Control | None:
        """The control token behind an id; None for every other id."""
        return self._controls.get(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text: no control id, no BOS, whatever it spells. Empty for empty text."""
        if not text:
            return []
        # The batch form lets other threads run meanwhile, and computes no offsets; the plain one holds the GIL.
        ids: list[int] = self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, in one go."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Like ``encode`` for the UTF-8 of a text; bytes that are no valid UTF-8 become their single-byte ids."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return [self._byte_ids[byte] for byte in data]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for; an added token's are the UTF-8 of its content, an unused id's U+FFFD's."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else _UNUSED_ID_BYTES

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids, control tokens spelt out; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


def _parse(text: bytes, source: str) -> dict[str, Any]:
    try:
        definition = json.loads(text)
        model = definition["model"]
        if model["type"] != "BPE" or not isinstance(model["vocab"], dict):
            raise _unusable(source, "it is not a BPE tokenizer", "use a checkpoint with V3.2's tokenizer")
        definition["added_tokens"] = definition.get("added_tokens") or []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _unusable(source, "it is not a tokenizer.json", "replace it") from None
    return dict(definition)


def _token_bytes(vocab: dict[str, int], added: dict[int, str]) -> list[bytes]:
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    table = [_UNUSED_ID_BYTES] * (1 + max(*vocab.values(), *added, 0, 0))
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([byte_of[character] for character in token])
        except KeyError:
            table[token_id] = token.encode()
    for token_id, content in added.items():
        table[token_id] = content.encode()
    return table


def _single_byte_ids(vocab: dict[str, int], source: str) -> list[int]:
    alphabet = byte_alphabet()
    missing = sum(character not in vocab for character in alphabet)
    if missing:
        raise _unusable(
            source, f"{missing} of the 256 single-byte tokens are missing", "use a byte-level BPE tokenizer"
        )
    return [vocab[character] for character in alphabet]


def _unusable(source: str, problem: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(f"{source}: {problem}; {remedy}", field="tokenizer.json", reason="TOKENIZER_UNUSABLE")
