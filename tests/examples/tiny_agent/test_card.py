"""The card says what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.tiny_agent.card import card
from examples.tiny_agent.config import CONFIG
from examples.tiny_agent.episodes import Outcome
from examples.tiny_agent.export import GENERATION_CONFIG
from examples.tiny_agent.journal import Results
from examples.tiny_agent.recall import LayerRecall
from examples.tiny_agent.report import Report, write_json


def outcomes(done: int, failed: int) -> list[Outcome]:
    return [Outcome("", 2, 2, 4, 1, 50)] * done + [Outcome("the answer is too long", 2, 1, 4, 1, 50)] * failed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, *lines: object) -> None:
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("config.json", dict(CONFIG))
    write("generation_config.json", dict(GENERATION_CONFIG))
    runs = [{"stage": "dense", "steps": [0, 50], "seed": 3, "ranks": 2, "seconds": 61}]
    runs += [{"stage": "dense", "steps": [0, 50], "seed": 3, "ranks": 2, "seconds": 59}]
    write("training.json", {"stage": "dense", "step": 100, "done": True, "runs": runs})
    write("metrics.jsonl", *({"stage": "dense", "step": step, "loss": 8.0 - step / 20} for step in range(10, 101, 10)))
    return tmp_path


def test_a_card_of_a_run_without_scores(folder: Path) -> None:
    text = card(folder, "one GPU")
    assert "14,024,288" in text
    assert "| dense | 100 | 13 M | 2.0 | loss 6.500 → 4.000 |" in text
    assert "seeds 3, on 2 GPU (one GPU)" in text
    assert "## Scores" not in text


@pytest.mark.parametrize("kept", [True, False])
def test_what_reinforcement_changed(folder: Path, kept: bool) -> None:
    measured = [
        {"stage": "reinforce, measured", "step": 0, "success": 0.5, "success_by_kind": {"multi": 0.25}},
        {
            "stage": "reinforce, measured",
            "step": 9,
            "success": 0.625,
            "success_by_kind": {"single": 0.5, "multi": 0.75},
        },
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line | {"kept": kept}) + "\n" for line in measured)
    text = card(folder, "one GPU")
    assert "after step 9." in text
    assert "| multi | 25.0 | 75.0 |" in text
    assert "| mean | 50.0 | 62.5 |" in text
    assert ("Success fell" in text) != kept


def test_scores_and_goals_are_those_of_the_evaluation(folder: Path) -> None:
    sparse = {("single", 0): outcomes(95, 5), ("multi", 0): outcomes(70, 30), ("needle 8192 0.5", 0): outcomes(46, 4)}
    fp8 = {("single", 0): outcomes(92, 8), ("multi", 0): outcomes(60, 40)}
    recalls = {8192: [LayerRecall(layer=0, recall=0.75, best=0.9, num_queries=128)]}
    write_json(Report.of(Results(outcomes={"sparse": sparse, "fp8": fp8}, recalls=recalls), {"seed": 4}), folder)
    compared = {"dtype": "float64", "num_tasks": 9, "num_outputs": 20, "num_tokens": 900, "num_different": 0}
    lines = [compared | {"first_difference": None}, {"length": 8192, "num_needles": 5, "num_found": 4}]
    (folder / "parity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card(folder, "one GPU")
    assert "| single | 95.0 (88.8–97.8) of 100 | 92.0 (85.0–95.9) of 100 |" in text
    assert "| 8,192 | – | – | 92 | – | – | 92.0 of 50 |" in text
    assert "| single: at least 90 % | 95.00 | reached |" in text
    assert "| multi: at least 75 % | 70.00 | missed |" in text
    assert "| needles in 8,192 tokens: at least 90 % | 92.00 | reached |" in text
    assert "| valid arguments: at least 99 % of calls | 92.20 | missed |" in text
    assert "| fp8 within 2 points of sparse, all tasks | 6.50 | missed |" in text
    assert "| 8,192 | 0.750 (0.900) |" in text
    assert "- float64: 9 tasks, 20 outputs of 900 tokens, 0 differ." in text
    assert "- 4 of 5 needles found in documents of 8,192 tokens, in float32." in text
