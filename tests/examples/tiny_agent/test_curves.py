from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from examples.tiny_agent.curves import compare, curve, main, plot


def _lines(factor: float = 1.0, last: int = 400) -> list[dict[str, Any]]:
    dense = [{"stage": "dense", "step": step, "loss": factor * 100 / step} for step in range(10, last + 1, 10)]
    return [*dense, {"stage": "indexer", "step": 10, "divergence": 0.5}]


def _written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_means_are_over_a_hundred_steps() -> None:
    lines = [{"stage": "dense", "step": step, "loss": float(step)} for step in (10, 100, 110, 200)]
    assert curve(lines, "dense") == {0: 55.0, 1: 155.0}


def test_a_stage_that_was_begun_anew_counts_from_there() -> None:
    lines = [
        {"stage": "dense", "step": step, "loss": loss} for step, loss in ((10, 9.0), (20, 8.0), (10, 3.0), (20, 2.0))
    ]
    assert curve(lines, "dense") == {0: 2.5}


def test_stages_are_compared_where_both_have_steps() -> None:
    dense, indexer = compare(_lines(1.02, last=250), _lines())
    assert (dense.stage, dense.quantity, dense.windows) == ("dense", "loss", 2)
    assert 0.02 < dense.largest < 0.3  # the run's last window is half as long
    assert dense.step == 201
    assert (indexer.quantity, indexer.windows, indexer.largest) == ("divergence", 1, 0.0)


@pytest.mark.parametrize(("factor", "code"), [(1.03, 0), (1.08, 1)])
def test_the_command_says_whether_curves_agree(factor: float, code: int, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    run, recorded = _written(tmp_path / "metrics.jsonl", _lines(factor)), _written(tmp_path / "old.jsonl", _lines())
    result = CliRunner().invoke(app, [str(run.parent), "--recorded", str(recorded)])
    assert result.exit_code == code, result.output
    assert f"{100 * factor - 100:.1f}%" in result.output
    measured = {"stage": "reinforce, measured", "step": 0, "success": 0.5}
    recorded = _written(tmp_path / "old.jsonl", [*_lines(), measured])
    assert CliRunner().invoke(app, [str(recorded), "--recorded", str(recorded)]).exit_code == 0
    for lines in ([], [measured]):
        assert CliRunner().invoke(app, [str(_written(tmp_path / "none.jsonl", lines))]).exit_code == 2


def test_curves_are_drawn(tmp_path: Path) -> None:
    plot(_lines(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
