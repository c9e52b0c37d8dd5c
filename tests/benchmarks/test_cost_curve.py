"""The sums behind the cost curve, and the published points they are set beside."""

import pytest

from benchmarks.cost_curve import at, compare, cost_per_million, curves, published


def rows_of(phase: str, tokens: int) -> list[dict[str, object]]:
    fixed = {"projections": 10.0, "index_projections": 2.0, "experts": 20.0, "dense_mlp": 5.0, "head": 100.0}
    about = {"phase": phase, "tokens": tokens, "tokens_timed": tokens}
    rows: list[dict[str, object]] = [
        about | {"part": part, "position": None, "us": us * tokens} for part, us in fixed.items()
    ]
    for position, dense, sparse in ((1024, 4.0, 3.0), (2048, 8.0, 3.5)):
        rows.append(about | {"part": "dense", "position": position, "us": dense * tokens})
        rows.append(about | {"part": "sparse", "position": position, "us": sparse * tokens})
    return rows


def test_one_gpu_hour_over_its_tokens_is_the_price() -> None:
    assert cost_per_million(3600.0, 2.0) == pytest.approx(2.0)  # 3.6 ms a token: a million tokens an hour


def test_a_token_pays_for_every_layer_once() -> None:
    found = curves(rows_of("decode", 128) + rows_of("prefill", 64), usd_per_hour=3600.0)
    us = 61 * (10 + 2 + 3.5) + 3 * 5 + 58 * 20
    assert found["prefill", "sparse"][2] == (2048.0, pytest.approx(us))
    assert found["decode", "sparse"][2] == (2048.0, pytest.approx(us + 100))  # the head computes every decoded token
    assert found["decode", "dense"][1] == (1024.0, pytest.approx(61 * (10 + 4) + 3 * 5 + 58 * 20 + 100))
    assert found["decode", "dense"][0] == (0.0, pytest.approx(61 * 10 + 3 * 5 + 58 * 20 + 100))


def test_the_last_chunk_counts_only_the_tokens_it_had() -> None:
    rows = rows_of("prefill", 64) + rows_of("decode", 64)
    for row in rows:
        if row["position"] == 1024:
            row["tokens_timed"] = 32  # half of the tokens in the same time: twice the cost of the attention
    found = curves(rows, usd_per_hour=3600.0)
    assert found["prefill", "dense"][1][1] == pytest.approx(61 * (10 + 2 * 4) + 3 * 5 + 58 * 20)


def test_between_points_lies_a_line() -> None:
    curve = [(0.0, 1.0), (10.0, 3.0), (20.0, 3.0)]
    assert [at(curve, position) for position in (-1, 0, 5, 10, 15, 99)] == [1, 1, 2, 3, 3, 3]


def test_published_ratios_at_128k() -> None:
    theirs = published()
    assert at(theirs["decode", "dense"], 131072) / at(theirs["decode", "sparse"], 131072) == pytest.approx(
        8.65, abs=0.01
    )
    assert at(theirs["prefill", "dense"], 131072) / at(theirs["prefill", "sparse"], 131072) == pytest.approx(
        3.56, abs=0.01
    )


def test_the_comparison_begins_at_0_and_has_a_row_for_each_measured_position() -> None:
    found = compare(curves(rows_of("decode", 8) + rows_of("prefill", 8), usd_per_hour=2.0), published())
    assert [(row["phase"], row["position"]) for row in found] == [
        ("prefill", 0), ("prefill", 1024), ("prefill", 2048), ("decode", 0), ("decode", 1024), ("decode", 2048),
    ]  # fmt: skip
    for row in found:
        assert row["dense_over_sparse"] == pytest.approx(float(row["dense_usd"]) / float(row["sparse_usd"]))
