"""The command, stage after stage, with a model and stages small enough for a CPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from examples.tiny_agent import export, feeding, objectives, progress, reinforce, running, train, training
from examples.tiny_agent.config import VOCAB_SIZE, model_config
from examples.tiny_agent.tasks import MAKERS
from seamount.workers.model.weights import load_model

torch.set_num_threads(1)
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 64,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {
        name: dataclasses.replace(
            stage, sequence_length=1024, batch_size=1, steps=3, mixture=running.STAGES["dense"].mixture
        )
        for name, stage in running.STAGES.items()
    }
    monkeypatch.setattr(running, "STAGES", stages)
    monkeypatch.setattr(running, "STEPS", 1)
    monkeypatch.setattr(running, "model_config", lambda: model_config(**SMALL))
    monkeypatch.setattr(feeding, "HEAD_ROWS", 256)
    monkeypatch.setattr(objectives, "HEAD_ROWS", 256)
    monkeypatch.setattr(export, "CONFIG", dict(export.CONFIG) | SMALL)
    monkeypatch.setattr(reinforce, "STEPS", 1)
    sizes = {"GROUP": 2, "GROUPS": 1, "MOST_GROUPS": 2, "CONVERSATIONS": 4, "MAX_NEW": 8, "MEASURED": 1, "ROWS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(reinforce, name, value)


def _invoke(*args: object) -> Result:
    fixed = ["--device", "cpu", "--workers", "0"]
    return CliRunner().invoke(train.app, [str(arg) for arg in args] + fixed)


def _run(out: Path, *args: object) -> dict[str, Any]:
    result = _invoke("--out", out, *args)
    assert result.exit_code == 0, result.output
    state: dict[str, Any] = json.loads((out / progress.STATE).read_text())
    return state


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_command_knows_the_stages_without_loading_them() -> None:
    assert [name.value for name in train.StageName] == list(running.ORDER)
    loaded = (
        "import sys, examples.tiny_agent.train; print(*(name for name in ('torch', 'numpy') if name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True).stdout == b"\n"


def test_stages_follow_each_other(tmp_path: Path) -> None:
    dense, rest = tmp_path / "dense", tmp_path / "rest"
    assert _run(dense, "--stage", "dense", "--steps", 2)["step"] == 2
    state = _run(dense, "--stage", "dense")
    assert (state["step"], state["done"]) == (3, True)
    assert [run["steps"] for run in state["runs"]] == [[0, 2], [2, 3]]
    assert [line["step"] for line in _lines(dense)] == [2, 3]
    assert _run(rest, "--resume", dense, "--last", "long")["stage"] == "long"
    state = _run(rest)
    assert (state["stage"], state["done"]) == ("reinforce", True)
    assert [run["stage"] for run in state["runs"]] == [
        "dense",
        "dense",
        "anneal",
        "long",
        "indexer",
        "sparse",
        "sparse_long",
        "reinforce",
    ]
    told = [*running.ORDER[1:-1], "reinforce, measured", "reinforce", "reinforce, measured"]
    assert [line["stage"] for line in _lines(rest)] == told
    assert _lines(rest)[-1]["success_by_kind"].keys() == {kind.value for kind in MAKERS}
    names = {file.name for file in rest.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert load_model(rest, dtype=torch.float32, layout_name="exact").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--stage", "wrong"), "is not one of 'dense', 'anneal', 'long', 'indexer', 'sparse', 'sparse_long', "),
        (("--stage", "sparse"), "stage dense is next, at step 0"),
    ],
)
def test_stages_keep_their_order(args: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = _invoke("--out", tmp_path, *args)
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())


def test_a_long_run_saves_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "write_json", lambda path, content: seen.append(dict(content)))
    assert _invoke("--out", tmp_path, "--stage", "dense").exit_code == 0
    assert [state["step"] for state in seen] == [1, 2, 3, 3]
    assert [state["runs"][-1]["steps"] for state in seen] == [[0, 1], [0, 2], [0, 3], [0, 3]]


def test_a_run_is_repeated_by_its_seed(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    _run(first, "--steps", 2)
    _run(second, "--steps", 2)
    _run(other, "--steps", 2, "--seed", 2)
    losses = [_lines(folder)[-1]["loss"] for folder in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]


def test_a_deadline_stops_a_run_that_can_go_on(tmp_path: Path) -> None:
    state = _run(tmp_path, "--minutes", 0)
    assert (state["stage"], state["step"], state["done"]) == ("dense", 0, False)
    assert _run(tmp_path, "--stage", "dense")["done"]


def test_stages_may_be_done_early(tmp_path: Path) -> None:
    state = _run(tmp_path, "--until", "dense=0", "--until", "anneal=0.0", "--stage", "dense")
    assert (state["stage"], state["step"], state["done"]) == ("dense", 1, True)  # no less than a step
    assert _run(tmp_path, "--stage", "anneal", "--until", "anneal=-1")["step"] == 1
    for wrong in ("dense", "dense=soon", "wrong=3"):
        result = _invoke("--out", tmp_path, "--until", wrong)
        assert result.exit_code == 2
        assert "is no STAGE=MINUTES" in " ".join(result.output.replace("│", " ").split())


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    _run(tmp_path / "a", "--minutes", 0)
    (tmp_path / "a" / export.INDEX).unlink()
    result = _invoke("--out", tmp_path / "b", "--resume", tmp_path / "a")
    assert result.exit_code == 2
    assert "training run wrote" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "b").exists()
