"""Writes the tokenizer of random checkpoints: byte-level, with V3.2's control tokens and their flags.

256 single bytes and a few merges (so that one text has several tokenisations, as with a real vocabulary) take the
place of V3.2's 128,000 entries; everything else is as in V3.2's file: BOS 0, EOS 1, pad 2, the pre-tokenizer, no
normaliser, ``｜DSML｜`` special, the think, user and assistant tokens not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seamount.router.tokenizer import Control, byte_alphabet

_PAD = "<｜▁pad▁｜>"
_MERGES = (
    "< /",
    "Ċ Ċ",
    "Ġ t",
    "h e",
    "Ġt he",
    "i n",
    "e r",
    "o n",
    "a n",
    "r e",
    "Ġ a",
    '" >',
    "l l",
    "he ll",
    "hell o",
)
# The characters between which V3.2 never merges: three digits at most, CJK runs, words, punctuation, white space.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_MODEL_MAX_LENGTH = 131_072


def write_byte_tokenizer(folder: Path) -> int:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; returns the vocabulary's size."""
    base = [Control.BOS.value, Control.EOS.value, _PAD]
    tokens = [*base, *byte_alphabet(), *(merge.replace(" ", "") for merge in _MERGES)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    added = [_added_token(token_id, token, special=True) for token_id, token in enumerate(base)]
    for control in (Control.DSML, Control.THINK, Control.END_THINK, Control.USER, Control.ASSISTANT):
        added.append(_added_token(len(vocab) + len(added) - len(base), control.value, special=control is Control.DSML))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in _SPLITS
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": list(_MERGES),
        },
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": Control.BOS.value,
        "eos_token": Control.EOS.value,
        "pad_token": _PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _MODEL_MAX_LENGTH,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", definition)
    _write_json(folder / "tokenizer_config.json", config)
    return len(vocab) + len(added) - len(base)


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
