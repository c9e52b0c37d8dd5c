"""Each term against a formula of its own, written without the trainer's code."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from examples.tiny_agent import objectives
from examples.tiny_agent.attention import DenseAttention, attend, document_mask, visible_pairs
from examples.tiny_agent.config import model_config
from examples.tiny_agent.index_scores import index_scores
from examples.tiny_agent.indexing import (
    IndexerWarmUp,
    Rows,
    SelectedAttention,
    learn,
    select,
    selected_pairs,
)
from examples.tiny_agent.model import Layer, Model, Projected

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
}


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def _documents(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Document ids and positions; the rows end in padding, the first by one token."""
    generator = random.Random(seed)
    ids, positions = torch.full((batch, length), -1), torch.zeros(batch, length, dtype=torch.int64)
    for b in range(batch):
        end = length - 1 if b == 0 else generator.randint(length // 2, length)
        at, number = 0, 0
        while at < end:
            size = min(generator.randint(1, length // 3), end - at)
            ids[b, at : at + size], positions[b, at : at + size] = number, torch.arange(size)
            at, number = at + size, number + 1
    return ids, positions


def test_cross_entropy_and_its_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "HEAD_ROWS", 16)
    hidden = torch.randn(43, 24, requires_grad=True)
    head = torch.randn(77, 24, requires_grad=True)
    targets, weights = torch.randint(77, (43,)), (torch.rand(43) > 0.3).float()
    sums = objectives.cross_entropy(hidden, head, targets, weights)
    logits = hidden.double() @ head.double().T
    expected = -(logits.softmax(-1).log()[torch.arange(43), targets] * weights).sum()
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums.seen.item() == ((logits.argmax(-1) == targets) * weights).sum().item()
    own = torch.autograd.grad(0.25 * sums.loss, (hidden, head))
    wanted = torch.autograd.grad(0.25 * expected, (hidden, head))
    for actual, reference in zip(own, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_document_mask_hold_exactly_the_visible_pairs(seed: int) -> None:
    length = 1024
    ids, _ = _documents(seed, 3, length)
    ids = ids.masked_fill(ids < 0, length)
    ids[2] = 0  # one document: blocks below the diagonal are full
    mask = document_mask(ids)
    tiles = visible_pairs(ids).unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).transpose(2, 3)
    assert torch.equal(mask.to_dense()[:, 0].bool(), tiles.any((3, 4)))
    full = torch.zeros(3, 8, 9, dtype=torch.bool)
    counts, numbers = mask.full_kv_num_blocks, mask.full_kv_indices
    assert counts is not None
    assert numbers is not None
    unused = torch.arange(8) >= counts[:, 0].unsqueeze(-1)
    full.scatter_(2, numbers[:, 0].long().masked_fill(unused, 8), True)
    assert torch.equal(full[:, :, :8], tiles.all(3).all(3))


def test_scores_and_selection(seed: int) -> None:
    ids, positions = _documents(seed, 2, 96)
    rows = Rows(ids, positions)
    q, k, weights = torch.randn(2, 96, 4, 16), torch.randn(2, 96, 16), torch.randn(2, 96, 4)
    scores = index_scores(q[:, 32:], k, weights[:, 32:], rows.starts[:, 32:], rows.numbers[:, 32:])
    picked = select(q, k, weights, rows, 10)
    for b in range(2):
        for t in range(96):
            first = t - int(positions[b, t]) if ids[b, t] >= 0 else t
            expected = (weights[b, t, :, None] * (q[b, t] @ k[b, first : t + 1].T).clamp(min=0)).sum(0)
            if t >= 32:
                torch.testing.assert_close(scores[b, t - 32, first : t + 1], expected, rtol=1e-4, atol=1e-4)
                assert (scores[b, t - 32, :first] == float("-inf")).all()
                assert (scores[b, t - 32, t + 1 :] == float("-inf")).all()
            best = {first + int(i) for i in expected.argsort(descending=True, stable=True)[:10]}
            assert {int(at) for at in picked[b, t] if at >= 0} == best


def _divergence(
    layer: Layer, projected: Projected, model: Model, positions: Tensor, drawn: Tensor, allowed: Tensor
) -> Tensor:
    """Mean over the drawn rows of KL(p || softmax I), one row after the other; allowed: [B, T, T] bool."""
    index = layer.self_attn.indexer
    angles = model.angles(positions)
    q, weights = index.queries(projected.x, projected.q_latent, angles)
    k = index.keys(projected.x, angles)
    parts = []
    for b in range(drawn.shape[0]):
        for t in drawn[b].tolist():
            seen = allowed[b, t].nonzero().flatten()
            heads = torch.einsum("hd,shd->hs", projected.q[b, t], projected.k[b, seen]) * model.config.softmax_scale
            p = heads.exp() / heads.exp().sum(1, keepdim=True)
            p = p.sum(0) / p.sum()
            score = (weights[b, t, :, None] * torch.relu(q[b, t] @ k[b, seen].T)).sum(0)
            share = score.exp() / score.exp().sum()
            parts.append((p * (p.log() - share.log())).sum())
    return torch.stack(parts).mean()


@pytest.mark.parametrize("selected", [False, True])
def test_divergence_and_its_gradients(seed: int, selected: bool) -> None:
    model = Model(model_config(**SMALL), torch.float32)
    ids, positions = _documents(seed, 2, 64)
    rows, layer, angles = Rows(ids, positions), model.layers[1], model.angles(positions)
    with torch.no_grad():
        projected = layer.project(model.embed(torch.randint(128, (2, 64))), angles)
        q, weights = layer.self_attn.indexer.queries(projected.x, projected.q_latent, angles)
        picked = select(q, layer.self_attn.indexer.keys(projected.x, angles), weights, rows, 7)
    drawn = torch.stack([torch.nonzero(rows.real[b]).flatten()[-20:] for b in range(2)])
    allowed = visible_pairs(ids.masked_fill(ids < 0, 64))
    if selected:
        allowed = selected_pairs(picked, 64)
        assert (allowed.sum(2) == (rows.numbers - rows.starts + 1).clamp(max=7)).all()
    scale = model.config.softmax_scale
    _, lse = attend(projected, allowed, scale)
    value = learn(layer, projected, lse, angles, rows, drawn, picked if selected else None, scale)
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = _divergence(layer, projected, model, positions, drawn, allowed)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = {f"layers.1.self_attn.indexer.{name}": p for name, p in layer.self_attn.indexer.named_parameters()}
    assert own.keys() == wanted.keys(), "the gradient stays inside the indexer"
    for name, gradient in zip(wanted, torch.autograd.grad(expected, list(wanted.values())), strict=True):
        torch.testing.assert_close(own[name], gradient, rtol=2e-3, atol=1e-6)


def test_only_the_indexers_learn_in_the_warm_up(seed: int) -> None:
    model = Model(model_config(**SMALL), torch.float32)
    ids, positions = _documents(seed, 2, 64)
    rows, generator = Rows(ids, positions), torch.Generator().manual_seed(seed)
    scale = model.config.softmax_scale
    with torch.no_grad():
        model(
            torch.randint(128, (2, 64)),
            model.angles(positions),
            IndexerWarmUp(rows, DenseAttention(ids, scale), scale, generator),
        )
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if ".indexer." in name and "mtp" not in name}


def test_the_main_loss_does_not_reach_the_indexer(seed: int) -> None:
    model = Model(model_config(**SMALL), torch.float32)
    ids, positions = _documents(seed, 2, 64)
    attend = SelectedAttention(Rows(ids, positions), 7, model.config.softmax_scale, generator=None)
    x, _ = model(torch.randint(128, (2, 64)), model.angles(positions), attend)
    x.square().sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(".indexer." in name for name in moved)
    assert all(f"layers.{layer}.self_attn.q_a_proj.weight" in moved for layer in range(4))


def test_selecting_everything_is_dense(seed: int) -> None:
    model = Model(model_config(**SMALL), torch.float32)
    ids, positions = _documents(seed, 2, 64)
    tokens, angles, scale = torch.randint(128, (2, 64)), model.angles(positions), model.config.softmax_scale
    with torch.no_grad():
        dense, _ = model(tokens, angles, DenseAttention(ids, scale))
        selected, _ = model(tokens, angles, SelectedAttention(Rows(ids, positions), 64, scale, None))
    assert (dense - selected)[ids >= 0].abs().max() < 1e-4


def test_policy_loss_and_its_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "HEAD_ROWS", 16)
    hidden = torch.randn(43, 24, requires_grad=True)
    head = (0.3 * torch.randn(77, 24)).requires_grad_()
    targets, advantages = torch.randint(77, (43,)), torch.randn(43) * (torch.rand(43) > 0.2)
    logprobs = (hidden.double() @ head.double().T).softmax(-1).log()[torch.arange(43), targets]
    drawn = (logprobs + 0.3 * torch.randn(43)).detach()
    advantages[0], drawn[0] = -1.0, logprobs[0].detach() - 1.5  # much likelier than it was, and unwelcome
    sums = objectives.policy_loss(hidden, head, targets, advantages, drawn.float())
    ratio = (logprobs - drawn).exp()
    bounded = torch.clamp(ratio, 0.8, 1.2)
    clipped = torch.stack([ratio * advantages, bounded * advantages]).min(0).values
    clipped = torch.where(advantages < 0, torch.maximum(clipped, 3 * advantages), clipped)
    expected = -clipped.sum()
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    outside = ((ratio > 1.2) & (advantages > 0)) | (((ratio < 0.8) | (ratio > 3)) & (advantages < 0))
    apart = ((logprobs - drawn) ** 2 / 2)[~outside & (advantages != 0)].sum()
    assert sums.seen.tolist() == pytest.approx([outside.sum().item(), apart.item()], rel=1e-3)
    assert ((ratio > 3) & (advantages < 0)).any()
    own = torch.autograd.grad(0.25 * sums.loss, (hidden, head))
    wanted = torch.autograd.grad(0.25 * expected, (hidden, head))
    for actual, reference in zip(own, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-5)
