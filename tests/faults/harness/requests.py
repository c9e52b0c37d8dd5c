"""The turns that are disturbed: 32 tokens, sampled greedily and by seed, and forced ones with more to break in them."""

from __future__ import annotations

from harness.system import Request
from seamount.router.client import Sampling
from seamount.router.tokenizer import Control, Tokenizer

NUM_TOKENS = 32
GREEDY = Request(sampling=Sampling(max_output_tokens=NUM_TOKENS, temperature=0.0, seed=1))
SEEDED = Request(sampling=Sampling(max_output_tokens=NUM_TOKENS, temperature=0.8, seed=9))
LONG = Request(sampling=Sampling(max_output_tokens=2000, temperature=0.0, seed=1), forced=(70,) * 2000)
"""Seconds of output, for whoever ends it before."""
SHORT = Request(sampling=Sampling(max_output_tokens=8, temperature=0.8, seed=9))
NAMES = ("greedy", "seeded", "reasoning", "tool call", "multi-byte")
CALL = (
    "</think>\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="true">ü</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)


def request(name: str, tokenizer: Tokenizer) -> Request:
    """One of ``NAMES``."""
    match name:
        case "greedy":
            return GREEDY
        case "seeded":
            return SEEDED
        case "reasoning":  # the thought ends in the middle
            ids = forced("Rings: a thought.</think>Saturn has rings, and so have others.", tokenizer)[:NUM_TOKENS]
        case "multi-byte":  # a character of two, three and four bytes; each byte is a token
            ids = forced("ü輪🪐é土星🌍の輪ß€", tokenizer)[:NUM_TOKENS]
        case "tool call":
            ids = [*forced(CALL, tokenizer), tokenizer.eos_token_id]
        case _:
            raise AssertionError(name)
    sampling = Sampling(max_output_tokens=len(ids), temperature=0.0, seed=1)
    return Request(sampling=sampling, forced=tuple(ids))


def forced(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what a model would say: control words as their ids, the rest as text."""
    ids: list[int] = []
    for at, part in enumerate(text.split("</think>")):
        ids += [tokenizer.control_id(Control.END_THINK)] if at else []
        for inner, words in enumerate(part.split("｜DSML｜")):
            ids += [tokenizer.control_id(Control.DSML)] if inner else []
            ids += tokenizer.encode(words)
    return ids
