"""Two ranks train as one process does on all of their sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing

from examples.tiny_agent import feeding, indexing, objectives, reinforce
from examples.tiny_agent.attempts import Transcript
from examples.tiny_agent.config import model_config
from examples.tiny_agent.data import Batch
from examples.tiny_agent.documents import SHORT
from examples.tiny_agent.model import Model
from examples.tiny_agent.parallel import Ranks
from examples.tiny_agent.reinforce import Learner
from examples.tiny_agent.stages import Kind, Stage
from examples.tiny_agent.training import Training

STEPS = 2
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 8,
}


def _batch(step: int, rows: slice) -> Batch:
    """Rows of a batch of four that differ in how much is padding and in how much is learnt."""
    generator = np.random.default_rng(step)
    tokens = generator.integers(2, 64, (4, 64), dtype=np.int32)
    lengths = np.array([64, 50, 30, 20])
    real = np.arange(64) < lengths[:, None]
    positions = np.where(real, np.arange(64), 0).astype(np.int32)
    return Batch(
        tokens=np.where(real, tokens, 0)[rows],
        loss_mask=(real & (positions > generator.integers(1, 15, (4, 1))))[rows],
        document_ids=np.where(real, 0, -1).astype(np.int32)[rows],
        positions=positions[rows],
    )


def _trained(kind: Kind, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and metrics after some steps. Every row is compared by the indexers, so nothing is drawn."""
    indexing.ROW_STRIDE = 1
    feeding.HEAD_ROWS = objectives.HEAD_ROWS = 32
    torch.manual_seed(3)
    model = Model(model_config(**SMALL), torch.float32)
    stage = Stage(
        name="some",
        kind=kind,
        mixture=SHORT,
        sequence_length=64,
        batch_size=4,
        steps=STEPS,
        matrix_lr=1e-3,
        other_lr=1e-3,
        warm_up=1,
        decay_share=0.5,
        mtp_weight=0.3,
    )
    share = ranks.share(stage.batch_size)
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    batches = (_batch(step, rows) for step in range(STEPS))
    lines: list[dict[str, Any]] = []
    Training(model, stage, seed=1, ranks=ranks).run(batches, deadline=float("inf"), on_metrics=lines.append)
    return dict(model.state_dict()), lines[-1]


def _contexts(rank: int, step: int) -> list[tuple[Transcript, float]]:
    """Four contexts of a rank with their advantages; the second one has none in the second step, and must keep step."""
    generator = np.random.default_rng([rank, step])
    if (rank, step) == (1, 1):
        return []
    contexts = []
    for length in (20, 33, 41, 50):
        drawn = [float("nan") if at < 9 else -4.0 + 0.1 * generator.standard_normal() for at in range(length)]
        contexts.append((Transcript(generator.integers(2, 64, length).tolist(), drawn), generator.standard_normal()))
    return contexts


def _reinforced(ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """After two updates on the contexts of two ranks, by both of them or by one process alone."""
    objectives.HEAD_ROWS = 64
    reinforce.ROWS, reinforce.DENSE_LENGTH = 2, 64
    torch.manual_seed(3)
    learner = Learner(Model(model_config(**SMALL), torch.float32), ranks=ranks)
    own = range(2) if ranks.size == 1 else [ranks.rank]
    lines = [learner.update([one for rank in own for one in _contexts(rank, step)]) for step in range(2)]
    return dict(learner.model.state_dict()), lines


def _one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    for name, (weights, told) in (
        *((kind.value, _trained(kind, ranks)) for kind in Kind),
        ("reinforced", _reinforced(ranks)),
    ):
        save_file(weights, folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have trained."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(_one_of_two, (folder,), nprocs=2)
    return folder


def _read(folder: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], Any]:
    told = json.loads((folder / f"{name}-{rank}.json").read_text())
    return load_file(folder / f"{name}-{rank}.safetensors"), told


@pytest.mark.parametrize("kind", list(Kind))
def test_two_ranks_are_one_process_with_their_sequences(kind: Kind, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((indexing, "ROW_STRIDE"), (feeding, "HEAD_ROWS"), (objectives, "HEAD_ROWS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # set by _trained, put back at the end
    alone, metrics = _trained(kind, Ranks())
    for rank in range(2):
        weights, told = _read(two, kind.value, rank)
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            assert torch.allclose(weight, alone[name], rtol=1e-4, atol=1e-6), name
        for name in metrics.keys() - {"tokens_per_s", "mfu", "seconds"}:
            assert told[name] == pytest.approx(metrics[name], abs=2e-5), name


def test_two_ranks_learn_from_rewards_as_one_process_does(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((reinforce, "ROWS"), (reinforce, "DENSE_LENGTH"), (objectives, "HEAD_ROWS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # set by _reinforced, put back at the end
    alone, lines = _reinforced(Ranks())
    assert [line["learnt_tokens"] for line in lines] == [216, 108]
    for rank in range(2):
        weights, told = _read(two, "reinforced", rank)
        for name, weight in weights.items():
            assert torch.allclose(weight, alone[name], rtol=1e-4, atol=1e-6), name
        assert [pytest.approx(line, abs=1e-5) for line in lines] == told


def test_sequences_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="63 sequences cannot be shared by 2 ranks"):
        Ranks(1, 2).share(63)
