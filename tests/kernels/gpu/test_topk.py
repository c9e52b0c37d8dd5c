from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.topk import topk_indices

pytestmark = pytest.mark.gpu
Poison = Callable[[], AbstractContextManager[None]]


def _rare(x: Tensor, share: float) -> Tensor:
    return torch.rand_like(x) < share


def _at(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _zero_plateau(x: Tensor) -> Tensor:
    """Of both signs of zero; some rows have fewer than k scores above it."""
    x = torch.relu(x) * _rare(x, 0.05)
    return torch.where(_rare(x, 0.5) & (x == 0), -0.0, x)


def _minus_infinity(x: Tensor) -> Tensor:
    return x.masked_fill(_rare(x, 0.99), float("-inf")).masked_fill(_rare(x, 0.001), float("nan"))


def _twice(x: Tensor) -> Tensor:
    """Every score has an equal one far away."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, :half], x[:, 2 * half :]], dim=1)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "few values": lambda x: x.mul(1.5).round(),
    "zero plateau": _zero_plateau,
    "minus infinity": _minus_infinity,
    "not a number": lambda x: x.masked_fill(_rare(x, 0.5), float("nan")),
    # All of the best in the last places, as a recency-minded indexer has it.
    "end": lambda x: x + _at(x) / x.shape[1] * 100,
    "ascending": lambda x: x.sort(dim=1).values,
    "descending": lambda x: x.sort(dim=1, descending=True).values,
    "equal": lambda x: x[:, :1].expand_as(x).contiguous(),
    # More scores equal the k-th best than any list of candidates holds; a few are better.
    "wide plateau": lambda x: torch.where(_rare(x, 0.001), x.abs() + 1, 1.0),
    # As many above everything else as one slice of a row may hold.
    "one stretch": lambda x: x + 100 * (_at(x) % 16384 < 1024),
    "twice": _twice,
    # Better than all others, and just beside the scores that a bound is found from.
    "unsampled": lambda x: x + 9 * (_at(x) % 32 == 1),
}


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [
        (3, 1, 1),
        (4, 63, 64),
        (5, 2048, 2048),
        (7, 2049, 2048),
        (3, 32768, 2048),
        (140, 5000, 512),
        (2, 32769, 2048),
        (5, 131072, 2048),
        (3, 163840, 1000),
        (2, 70001, 20000),
        (2, 70001, 4096),
        (2, 40000, 8),
        (300, 9000, 2048),
        (40, 20000, 2048),
        (100, 12000, 2048),
        (2, 600000, 2048),
    ],
)
def test_exact_with_lowest_index_among_equals(
    rows: int, width: int, k: int, kind: str, formulas: ModuleType, poison: Poison, device: torch.device
) -> None:
    logits = _KINDS[kind](torch.randn((rows, width), device=device))
    lengths = torch.randint(0, width + 1, (rows,), device=device)
    lengths[0] = width
    lengths[1] = min(k, width)
    unused = torch.arange(width, device=device) >= lengths[:, None]
    logits = logits.masked_fill(unused, float("inf"))
    with poison():
        actual = topk_indices(logits, k, lengths)
    assert torch.equal(actual, topk_indices(logits, k, lengths))
    assert actual.shape == (rows, k)
    for row in range(0, rows, max(1, rows // 8)):
        assert torch.equal(actual[row].cpu(), formulas.best(logits[row], k, int(lengths[row])))
    strided = torch.empty((rows, width + 3), device=device).fill_(float("nan"))
    strided[:, :width] = logits
    assert torch.equal(topk_indices(strided[:, :width], k, lengths.int()), actual)


def test_every_kind_of_length_in_one_batch(formulas: ModuleType, device: torch.device) -> None:
    """Whole rows, rows in registers, rows of few and of many slices, and the edges between them."""
    k = 2048
    edges = [k, 4096, 8192, 16384, 32768, 131072]
    lengths = torch.tensor([0, 1, 63, 64, 65, 9000, 163840, *(e + d for e in edges for d in (-1, 0, 1))], device=device)
    logits = torch.randn((len(lengths), 163840), device=device)
    actual = topk_indices(logits, k, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(actual[row].cpu(), formulas.best(logits[row], k, length)), length


@pytest.mark.parametrize(("k", "width"), [(8, 9000), (512, 40000), (2048, 32768), (2048, 131072), (4096, 163840)])
def test_bound_leaves_enough_candidates_and_not_too_many(k: int, width: int, device: torch.device) -> None:
    """What ``wanted_groups`` promises of random rows: rows for which it fails are right too, but slow."""
    from seamount.kernels.triton.topk import sample_shift, wanted_groups

    logits = torch.randn((1000, width), device=device)
    samples = logits[:, :: 1 << sample_shift(width)]
    padded = torch.full((1000, -(-samples.shape[1] // 128) * 128), float("-inf"), device=device)
    padded[:, : samples.shape[1]] = samples
    maxima = padded.view(1000, -1, 128).amax(dim=1).sort(dim=1, descending=True).values
    candidates = (logits >= maxima[:, wanted_groups(k, sample_shift(width)) - 1, None]).sum(dim=1)
    assert int((candidates < k).sum()) <= 10
    assert int((candidates > 8192).sum()) <= 10


def test_no_rows_and_no_keys(device: torch.device) -> None:
    none = torch.zeros((0,), dtype=torch.int64, device=device)
    assert topk_indices(torch.zeros((0, 9), device=device), 4, none).shape == (0, 4)
    assert topk_indices(torch.zeros((2, 0), device=device), 3, none.new_zeros(2)).tolist() == [[-1] * 3] * 2


def test_refuses_before_the_launch(device: torch.device) -> None:
    logits, lengths = torch.zeros((3, 100), device=device), torch.zeros((3,), dtype=torch.int64, device=device)
    for arguments, word in (
        ((logits.half(), 4, lengths), "logits is"),
        ((logits.T.contiguous().T, 4, lengths), "strided columns"),
        ((logits, 0, lengths), "k is 0"),
        ((logits, 4, lengths[:2]), "lengths has shape"),
        ((logits, 4, lengths.float()), "lengths is"),
        ((logits, 4, lengths.cpu()), "lengths is on"),
    ):
        with pytest.raises(ValueError, match=word):
            topk_indices(*arguments)
