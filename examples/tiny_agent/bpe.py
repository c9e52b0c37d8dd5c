"""Trains the tokenizer: byte-level BPE over generated text, with V3.2's control tokens and their flags.

What a small model needs of it is that a word, a number or an identifier is the same tokens wherever it stands, in
running text, in JSON or in a tool's name, so that using it means copying. Hence:

- a blank before a word is a token of its own, except before the small words of the templates;
- every digit is a token, and every capital letter that begins no word: a number that never occurred in training is made
  of tokens that did (groups of three digits would be tokens never seen);
- the vocabulary is learnt from invented words: no noun has a token of its own, neither in training nor later.

What is always the same (the tools' preamble, the frames of schemas and calls) is cut out whole, so that it becomes few
tokens: the preamble takes 81.

    python -m examples.tiny_agent.bpe
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import typer
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from examples.tiny_agent.conversation import marked_pieces
from examples.tiny_agent.documents import SHORT, TOKENIZER, conversation
from examples.tiny_agent.long_documents import make_long_document
from seamount.router.encoding import render
from seamount.router.messages import Message, Role, ThinkingMode
from seamount.router.messages import Tool as ToolSchema
from seamount.router.tokenizer import Control, byte_alphabet

VOCAB_SIZE = 4096
PAD = "<｜▁pad▁｜>"
_BASE = (Control.BOS.value, Control.EOS.value, PAD)
_LAST = (Control.DSML, Control.THINK, Control.END_THINK, Control.USER, Control.ASSISTANT)
_FRAMES = (
    r'\.?", "parameters": \{"type": "object", "properties": \{"',
    r'": \{"type": "array", "items": \{"type": "string", "enum": \["',
    r'": \{"type": "array", "items": \{"type": "(?:string|number)"\}',
    r'": \{"type": "object", "properties": \{"',
    r'": \{"type": "string", "enum": \["',
    r'": \{"type": "(?:string|integer|number|boolean)"',
    r'\.?", "description": "',
    r'["\]}]*, "(?:description": |required": \[)"',
    r'\{"name": "',
    r'" string="(?:true|false)">',
    r"(?:invoke|parameter) name=\"",
    r"</?function_results>",
    r"</?result>",
    r"function_calls>|parameter>|invoke>",
)
"""What schemas, calls and results are framed in, as regular expressions, longer ones first."""
_SMALL_WORD_SHARE = 0.004
"""A word in this share of conversations, all nouns being invented, belongs to the templates."""


def train(num_conversations: int, seed: int) -> dict[str, Any]:
    """The ``tokenizer.json`` of a tokenizer of ``VOCAB_SIZE`` entries."""
    runs = list(_runs(num_conversations, seed))
    pattern = _pattern(_small_words(runs))
    trained = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_LAST),
        special_tokens=list(_BASE),
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((text for run in runs for text in run), trainer)
    definition: dict[str, Any] = json.loads(trained.to_str())
    definition["added_tokens"] = [_added_token(i, token, special=True) for i, token in enumerate(_BASE)] + [
        _added_token(VOCAB_SIZE - len(_LAST) + i, control.value, special=control is Control.DSML)
        for i, control in enumerate(_LAST)
    ]
    return definition


def write(definition: dict[str, Any], folder: Path) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``."""
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": Control.BOS.value,
        "eos_token": Control.EOS.value,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", definition), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _runs(num_conversations: int, seed: int) -> Iterator[list[str]]:
    """Texts between control tokens, of conversations and of long documents, all words invented."""
    mixture = replace(SHORT, invented_share=1.0, pieced_share=0.0)
    rng = random.Random(seed)
    for _ in range(num_conversations):
        pieces = marked_pieces(conversation(rng, mixture), ThinkingMode.THINKING)
        yield [item.piece for item in pieces if isinstance(item.piece, str)]
        draw = mixture.draw(rng)
        yield [make_long_document(draw, lambda texts: [len(text) // 3 for text in texts], length=200).text]


def _small_words(runs: list[list[str]]) -> list[str]:
    """Words of the templates, most frequent first."""
    counts = Counter(word for run in runs for word in set(re.findall(r"[A-Za-z]+", " ".join(run[-12:]))))
    least = max(4, int(_SMALL_WORD_SHARE * len(runs)))
    return ["a", "I", *(w for w, count in counts.most_common() if count >= least and len(w) > 1 and not w.isupper())]


def _preamble() -> list[str]:
    """The lines of the tools' preamble, longest first."""
    tool = ToolSchema(function_json="{}")
    pieces = render([Message(role=Role.SYSTEM, tools=(tool,))], mode=ThinkingMode.THINKING).pieces()
    lines = {line for piece in pieces if isinstance(piece, str) for line in piece.split("\n") if len(line) > 12}
    return sorted(lines, key=lambda line: (-len(line), line))


def _pattern(small_words: list[str]) -> str:
    whole = "|".join([*(re.escape(line).replace(r"\ ", " ") for line in _preamble()), *_FRAMES])
    small = "|".join(sorted(small_words, key=lambda word: (-len(word), word)))
    return (
        rf"{whole}| (?:{small})(?![A-Za-z0-9_-])|[0-9]|[A-Z](?![a-z])|[A-Z]?[a-z]+|[\p{{L}}\p{{M}}]+"
        r"|[^\s\p{L}\p{M}\p{N}]+ ?|\n+| "
    )


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


def main(
    out: Annotated[Path, typer.Option(help="folder to write to")] = TOKENIZER,
    conversations: Annotated[int, typer.Option(help="number of conversations to learn from")] = 12_000,
    seed: Annotated[int, typer.Option(help="of the generated text")] = 20,
) -> None:
    """Train the tokenizer and write it."""
    write(train(conversations, seed), out)


if __name__ == "__main__":
    typer.run(main)
