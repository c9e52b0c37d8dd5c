from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.topk import topk_indices

pytestmark = pytest.mark.gpu


def _scores(kind: str, rows: int, width: int, device: torch.device) -> Tensor:
    x = torch.randn((rows, width), device=device)
    if kind == "few values":
        return x.mul(1.5).round()
    if kind == "zero plateau":
        # Of both signs of zero; some rows have fewer than k scores above it.
        x = torch.relu(x) * (torch.rand_like(x) > 0.95)
        return torch.where((torch.rand_like(x) > 0.5) & (x == 0), -0.0, x)
    if kind == "minus infinity":
        x = x.masked_fill(torch.rand_like(x) > 0.01, float("-inf"))
        return x.masked_fill(torch.rand_like(x) > 0.999, float("nan"))
    if kind == "end":
        # All of the best in the last places, as a recency-minded indexer has it.
        return x + torch.arange(width, device=device) / width * 100
    if kind == "ascending":
        return x.sort(dim=1).values
    if kind == "descending":
        return x.sort(dim=1, descending=True).values
    if kind == "equal":
        return x[:, :1].expand_as(x).contiguous()
    if kind == "wide plateau":
        # More scores equal the k-th best than any list of candidates holds; a few are better.
        return torch.where(torch.rand_like(x) > 0.999, x.abs() + 1, 1.0)
    if kind == "one stretch":
        # Whole groups above everything else: as many candidates as groups can hold.
        return x + 100 * (torch.arange(width, device=device) % 16384 < 1024)
    return x


_KINDS = [
    "normal",
    "few values",
    "zero plateau",
    "minus infinity",
    "end",
    "ascending",
    "descending",
    "equal",
    "wide plateau",
    "one stretch",
]


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
        (2, 40000, 8),
        (300, 9000, 2048),
        (2, 600000, 2048),
    ],
)
def test_exact_with_lowest_index_among_equals(
    rows: int, width: int, k: int, kind: str, formulas: ModuleType, device: torch.device
) -> None:
    logits = _scores(kind, rows, width, device)
    lengths = torch.randint(0, width + 1, (rows,), device=device)
    lengths[0] = width
    lengths[1] = min(k, width)
    unused = torch.arange(width, device=device) >= lengths[:, None]
    logits = logits.masked_fill(unused, float("inf"))
    torch.full((rows, k), -7, device=device)  # What an unwritten result would hold.
    actual = topk_indices(logits, k, lengths)
    assert torch.equal(actual, topk_indices(logits, k, lengths))
    assert actual.shape == (rows, k)
    for row in range(0, rows, max(1, rows // 8)):
        assert torch.equal(actual[row].cpu(), formulas.best(logits[row], k, int(lengths[row])))
    strided = torch.empty((rows, width + 3), device=device).fill_(float("nan"))
    strided[:, :width] = logits
    assert torch.equal(topk_indices(strided[:, :width], k, lengths.int()), actual)


def test_every_kind_of_length_in_one_batch(formulas: ModuleType, device: torch.device) -> None:
    """Whole rows, rows in registers, rows with groups of 4, 8, 16 and 32 scores, and the edges between them."""
    k = 2048
    edges = [k, 4096, 8192, 32768, 65536, 131072]
    lengths = torch.tensor([0, 1, 63, 64, 65, 9000, 163840, *(e + d for e in edges for d in (-1, 0, 1))], device=device)
    logits = torch.randn((len(lengths), 163840), device=device)
    actual = topk_indices(logits, k, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(actual[row].cpu(), formulas.best(logits[row], k, length)), length


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
