"""The trainer's CUDA paths against its plain PyTorch ones on the CPU, in float32 and on fresh random inputs."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from examples.tiny_agent.attention import DenseAttention, attend, visible_pairs
from examples.tiny_agent.index_scores import attention_mass, index_scores, visible
from examples.tiny_agent.indexing import Rows, select, selected_pairs, selection_mask
from examples.tiny_agent.model import Projected

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BATCH, LENGTH = 2, 640


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN and fails every comparison."""
    wide = expected.double()
    return ((actual.cpu().double() - wide).norm() / wide.norm()).item()


def _rows() -> Rows:
    """Documents of odd lengths, padding at the end of the second row."""
    lengths = torch.tensor([[1, 127, 200, 312], [300, 129, 11, 0]])
    ids, positions = torch.full((BATCH, LENGTH), -1), torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for b in range(BATCH):
        at = 0
        for number, length in enumerate(lengths[b].tolist()):
            ids[b, at : at + length], positions[b, at : at + length] = number, torch.arange(length)
            at += length
    return Rows(ids, positions)


def _projected(dtype: torch.dtype = torch.bfloat16) -> Projected:
    q, k = torch.randn(BATCH, LENGTH, 16, 96, dtype=dtype), torch.randn(BATCH, LENGTH, 16, 96, dtype=dtype)
    return Projected(q, q, q, k, torch.randn(BATCH, LENGTH, 16, 32, dtype=dtype))


def _indexed(count: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(BATCH, count, 64, 128).bfloat16(), torch.randn(BATCH, LENGTH, 128).bfloat16()
    return q, k, torch.randn(BATCH, count, 64)


def test_scores_and_their_gradients() -> None:
    rows = _rows()
    drawn = (torch.arange(0, LENGTH, 5) + torch.randint(5, (BATCH, LENGTH // 5))).sort(1).values
    starts = rows.starts.gather(1, drawn)
    inputs = [tensor.requires_grad_() for tensor in _indexed(LENGTH // 5)]
    plain = [tensor.detach().float().requires_grad_() for tensor in inputs]
    moved = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    seen = visible(starts, drawn, LENGTH)
    expected = index_scores(plain[0], plain[1], plain[2], starts, drawn)
    actual = index_scores(moved[0], moved[1], moved[2], starts.cuda(), drawn.cuda())
    assert torch.equal(actual.cpu() > float("-inf"), seen)
    assert _difference(actual.cpu()[seen], expected[seen]) < 1e-5
    d_scores = torch.randn_like(expected) * seen
    wanted = torch.autograd.grad(expected.masked_fill(~seen, 0.0), plain, d_scores)
    found = torch.autograd.grad(actual, moved, d_scores.cuda())
    for gradient, reference in zip(found, wanted, strict=True):
        assert _difference(gradient, reference) < 1e-2


def test_attention_mass() -> None:
    rows, projected = _rows(), _projected()
    _, lse = attend(Projected(*(tensor.float() for tensor in projected)), visible_pairs(_ids(rows)), 0.1)
    drawn = torch.arange(LENGTH).expand(BATCH, -1)
    arguments = (projected.q, projected.k, lse, rows.starts, drawn)
    expected = attention_mass(projected.q.float(), projected.k.float(), *arguments[2:], 0.1)
    actual = attention_mass(*(tensor.cuda() for tensor in arguments), 0.1)
    assert _difference(actual, expected) < 1e-4
    assert (actual.sum(2)[rows.real.cuda()] - 1).abs().max() < 1e-4


def _ids(rows: Rows) -> Tensor:
    """Documents by their first token."""
    return rows.starts


@pytest.mark.parametrize("topk", [None, 64])
def test_attention_and_its_gradients(topk: int | None) -> None:
    rows, projected = _rows(), _projected()
    ids = torch.where(rows.real, rows.starts, -1)
    plain = Projected(*(tensor.float().requires_grad_() for tensor in projected))
    moved = Projected(*(tensor.cuda().requires_grad_() for tensor in projected))
    if topk is None:
        expected, lse = DenseAttention(ids, 0.1).attend(plain)
        actual, own_lse = DenseAttention(ids.cuda(), 0.1).attend(moved)
    else:
        q, k, weights = _indexed(LENGTH)
        picked = select(q.float(), k.float(), weights, rows, topk)
        assert (picked >= 0).sum(2).max() == topk
        expected, lse = attend(plain, selected_pairs(picked, LENGTH), 0.1)
        actual, own_lse = attend(moved, selection_mask(picked.cuda()), 0.1)
    real = rows.real
    assert _difference(actual[real.cuda()], expected[real]) < 1e-2
    assert _difference(own_lse.transpose(1, 2)[real.cuda()], lse.transpose(1, 2)[real]) < 1e-3
    d_out = torch.randn_like(expected) * real[..., None, None]
    wanted = torch.autograd.grad(expected, plain[2:], d_out)
    found = torch.autograd.grad(actual, moved[2:], d_out.cuda().bfloat16())
    for gradient, reference in zip(found, wanted, strict=True):
        assert _difference(gradient, reference) < 1e-2


def test_selection_is_that_of_the_plain_form() -> None:
    """Up to scores that differ by rounding: those that are chosen are no worse than those that are not."""
    rows = _rows()
    q, k, weights = _indexed(LENGTH)
    device_rows = Rows(torch.where(rows.real, rows.starts, -1).cuda(), (rows.numbers - rows.starts).cuda())
    picked = selected_pairs(select(q.cuda(), k.cuda(), weights.cuda(), device_rows, 64), LENGTH).cpu()
    scores = index_scores(q.float(), k.float(), weights, rows.starts, rows.numbers)
    seen = visible(rows.starts, rows.numbers, LENGTH)
    assert torch.equal(picked.sum(2), seen.sum(2).clamp(max=64))
    assert not (picked & ~seen).any()
    worst = scores.masked_fill(~picked, float("inf")).amin(2)
    best_left = scores.masked_fill(picked | ~seen, float("-inf")).amax(2)
    assert (best_left - worst).max() < 1e-3 * scores[seen].abs().max()
