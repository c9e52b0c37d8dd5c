from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.tiny_agent.attention import DenseAttention
from examples.tiny_agent.config import checkpoint_shapes, model_config, parameter_table
from examples.tiny_agent.export import INDEX, checkpoint_views, load_checkpoint, save_checkpoint
from examples.tiny_agent.indexing import Rows, SelectedAttention
from examples.tiny_agent.model import Model
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.weights import load_model

torch.set_num_threads(1)

TOLERANCE = 1e-4
VOCAB = 256


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(1 << 31)
    print(f"seed {value}")
    return value


def _lively_model(seed: int) -> Model:
    """Random parameters that all matter: norms away from 1, a bias that moves the gate's choice."""
    torch.manual_seed(seed)
    model = Model(model_config(vocab_size=VOCAB), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.lm_head.mul_(10)
        for layer in model.all_layers():
            if hasattr(layer.mlp, "gate_bias"):
                layer.mlp.gate_bias.normal_(std=0.1)
    return model


@torch.no_grad()
def _trainer_logits(model: Model, tokens: Tensor, topk: int | None) -> Tensor:
    """[T] to [T, vocab]; topk: None for dense attention."""
    ids, positions = torch.zeros(1, len(tokens), dtype=torch.int64), torch.arange(len(tokens)).unsqueeze(0)
    scale = model.config.softmax_scale
    attend = (
        DenseAttention(ids, scale)
        if topk is None
        else SelectedAttention(Rows(ids, positions), topk, scale, generator=None)
    )
    x, _ = model(tokens.unsqueeze(0), model.angles(positions), attend)
    return torch.nn.functional.linear(model.norm(x)[0], model.lm_head)


def _served_logits(folder: Path, tokens: Tensor) -> Tensor:
    served = load_model(folder, dtype=torch.float32, layout_name="exact")
    num_pages = -(-len(tokens) // 64)
    planes = served.layout.allocate(served.config.num_hidden_layers, num_pages)
    batch = ForwardBatch.create([(tokens.tolist(), 0, list(range(num_pages)))], range(len(tokens)))
    return served.forward(batch, planes)


@pytest.mark.parametrize("length", [60, 400])
def test_an_exported_model_serves_the_trainers_logits(length: int, seed: int, tmp_path: Path) -> None:
    """Within top-k both are dense; beyond it the indexer's choice decides, in the trainer and in the server."""
    model = _lively_model(seed)
    save_checkpoint(model, tmp_path)
    load_checkpoint(model, tmp_path)  # what bfloat16 kept
    tokens = torch.randint(VOCAB, (length,))
    served = _served_logits(tmp_path, tokens)
    topk = model.config.index_topk
    selected = _trainer_logits(model, tokens, topk)
    assert (selected - served).abs().max() < TOLERANCE
    dense = _trainer_logits(model, tokens, None)
    differs = (dense - served).abs().amax(1)
    assert differs[:topk].max() < TOLERANCE
    assert length <= topk or differs[topk:].max() > 100 * TOLERANCE


def test_a_checkpoint_has_the_published_layout(tmp_path: Path) -> None:
    model = Model(model_config())
    save_checkpoint(model, tmp_path)
    shapes = checkpoint_shapes(model.config)
    assert {name: tuple(view.shape) for name, view in checkpoint_views(model).items()} == shapes
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == shapes.keys()
    sizes = {name: (tmp_path / name).stat().st_size for name in set(weight_map.values())}
    assert all(size < 16 << 20 for size in sizes.values())
    assert sum(sizes.values()) < 30_000_000


def test_the_size_is_what_was_planned() -> None:
    total = dict(parameter_table(model_config()))["total"]
    assert 12_000_000 < total < 15_000_000
    biases = 4 * 8  # of the gates: set by the balance, not by gradients
    assert total - biases == sum(parameter.numel() for parameter in Model(model_config()).parameters())


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    save_checkpoint(Model(model_config(vocab_size=VOCAB)), tmp_path)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight .* is \[256, 256\]"):
        load_checkpoint(Model(model_config(vocab_size=2 * VOCAB)), tmp_path)
    with pytest.raises(ValueError, match="training run"):
        load_checkpoint(Model(model_config(vocab_size=VOCAB)), tmp_path / "nowhere")
