"""The evaluation's logic: intervals, paired tests, rows and files, the indexer's recall."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.tiny_agent.config import model_config
from examples.tiny_agent.documents import TOKENIZER, DocumentSource
from examples.tiny_agent.episodes import gold_outputs
from examples.tiny_agent.evaluate import MODELS, Group, Plan, Players, Results, Served, needle_row, opened, run
from examples.tiny_agent.inference import LocalInference
from examples.tiny_agent.journal import Journal
from examples.tiny_agent.model import Angles, Layer, Model, Projected
from examples.tiny_agent.recall import NUM_QUERIES, indexer_recall
from examples.tiny_agent.reinforce import served_model
from examples.tiny_agent.report import Report, write_report
from examples.tiny_agent.scores import Share, paired
from examples.tiny_agent.turns import TaskKind
from seamount.cluster.checkpoint import init_checkpoint
from seamount.router.tokenizer import Tokenizer
from seamount.workers.model.config import ModelConfig

torch.set_num_threads(1)
PLAN = Plan(seed=6, num_tasks=5, num_needles=2, lengths=(512,), depths=(0.0, 1.0), batch_size=3)
SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


class Oracle:
    """Says the gold outputs of the plan's tasks, and EOS to every other prompt."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self._eos = tokenizer.eos_token_id
        self._outputs: dict[tuple[int, ...], list[int]] = {}
        for group in plan.groups(DocumentSource(tokenizer)):
            for episode in opened(dataclasses.replace(group, given=False, keeps_reasoning=True), tokenizer):
                for output in gold_outputs(episode.task, tokenizer):
                    self._outputs[tuple(episode.prompt())] = output
                    episode.take(output)

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {i: self._outputs.get(tuple(prompt), [self._eos]) for i, prompt in prompts.items()}


class Silent:
    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {i: [1] for i in prompts}


@pytest.fixture(scope="module")
def results(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Results:
    console, folder = Console(quiet=True), tmp_path_factory.mktemp("evaluation")
    made = run(PLAN, Served(Oracle(PLAN, tokenizer)), tokenizer, console, Journal(folder / "oracle", {}))
    other = run(PLAN, Served(Silent()), tokenizer, console, Journal(folder / "silent", {}))
    return Results(outcomes={"oracle": made.outcomes["served"], "silent": other.outcomes["served"]})


def test_every_kind_is_played_and_a_perfect_player_does_all_of_it(results: Results) -> None:
    rows = {name: [one.succeeded for one in outcomes] for name, outcomes in results.outcomes["oracle"].items()}
    assert set(rows) == {
        *(kind.value for kind in TaskKind if kind is not TaskKind.NEEDLE),
        *("plan, given", "plan, cut"),
        *(needle_row(512, depth) for depth in PLAN.depths),
    }
    cut = rows.pop("plan, cut")
    assert not any(cut), "without its reasoning nobody knows what was chosen"
    assert all(all(done) for done in rows.values())
    assert sum(map(len, rows.values())) + len(cut) == PLAN.num_episodes
    assert not any(one.succeeded for made in results.outcomes["silent"].values() for one in made)


def test_an_evaluation_goes_on_where_it_stopped(results: Results, tokenizer: Tokenizer, tmp_path: Path) -> None:
    console, subject = Console(quiet=True), {"seed": PLAN.seed}
    stopped = run(PLAN, Served(Silent()), tokenizer, console, Journal(tmp_path, subject), deadline=0.0)
    assert not stopped.outcomes
    first = dataclasses.replace(PLAN, kinds=PLAN.kinds[:2], lengths=())
    begun = run(first, Served(Silent()), tokenizer, console, Journal(tmp_path, subject)).outcomes["served"]
    whole = run(PLAN, Served(Oracle(PLAN, tokenizer)), tokenizer, console, Journal(tmp_path, subject))
    for row, outcomes in whole.outcomes["served"].items():
        assert outcomes == begun.get(row, results.outcomes["oracle"][row])
    with pytest.raises(ValueError, match="another model"):
        Journal(tmp_path, {"seed": 7})


def test_the_report_is_complete(results: Results, tmp_path: Path) -> None:
    report = Report.of(results.outcomes, {}, source="here", seed=6, seconds=1.0)
    report.print(Console(quiet=True))
    write_report(report, tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    single = next(row for row in stored["rows"] if row["model"] == "oracle" and row["name"] == "single")
    assert single["success"]["successes"] == single["success"]["total"] == PLAN.num_tasks
    assert single["valid_calls"]["value"] == 1.0
    together = next(one for one in stored["comparisons"] if one["name"] == "all")
    assert together["total"] == PLAN.num_episodes
    assert together["only_first"] == PLAN.num_episodes - PLAN.num_tasks
    assert together["only_second"] == 0
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (1900, 2000, 0.9396, 0.9587)],
)
def test_wilson_intervals(successes: int, total: int, low: float, high: float) -> None:
    assert Share(successes, total).interval == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_counts_only_what_differs() -> None:
    first = [True] * 9 + [False] * 1 + [True] * 50
    second = [False] * 9 + [True] * 1 + [True] * 50
    comparison = paired(first, second)
    assert (comparison.only_first, comparison.only_second) == (9, 1)
    assert comparison.p_value == pytest.approx(22 / 1024)
    assert comparison.difference == pytest.approx(8 / 60)
    low, high = comparison.interval
    assert low < 8 / 60 < high
    assert paired(first, first).p_value == 1.0


def model_with(topk: int) -> Model:
    torch.manual_seed(5)
    return Model(model_config(**SMALL, index_topk=topk), torch.float32)


def test_recall_is_the_attention_on_what_is_selected() -> None:
    model, topk = model_with(16), 16
    prompts = [
        torch.randint(2, 32, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (200, 161)
    ]
    measured = indexer_recall(model, prompts)
    assert [layer.layer for layer in measured] == [0, 1, 2, 3]
    assert {layer.num_queries for layer in measured} == {2 * NUM_QUERIES}

    seen: list[tuple[float, float]] = []

    def attend(layer: Layer, projected: Projected, angles: Angles) -> torch.Tensor:
        """The same by the definition, one query at a time."""
        q, k, v = (heads[0].double() for heads in (projected.q, projected.k, projected.v))
        length = q.shape[0]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * model.config.softmax_scale
        share = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        index = layer.self_attn.indexer
        index_q, weights = index.queries(projected.x, projected.q_latent, angles)
        dots = torch.einsum("qhd,kd->qhk", index_q[0].double(), index.keys(projected.x, angles)[0].double()).relu()
        scores = torch.einsum("qhk,qh->qk", dots, weights[0].double()).masked_fill(hidden, float("-inf"))
        mass = share.mean(0)
        own = range(length - NUM_QUERIES, length)
        picked = [mass[t, scores[t].topk(topk).indices].sum().item() for t in own]
        best = [mass[t].topk(topk).values.sum().item() for t in own]
        seen.append((sum(picked) / NUM_QUERIES, sum(best) / NUM_QUERIES))
        return torch.einsum("hqk,khd->qhd", share, v).unsqueeze(0).to(projected.v.dtype)

    with torch.no_grad():
        for prompt in prompts:
            positions = torch.arange(len(prompt)).unsqueeze(0)
            model(torch.tensor([prompt]), model.angles(positions), attend)
    for layer, (first, second) in zip(measured, zip(seen[:4], seen[4:], strict=True), strict=True):
        assert layer.recall == pytest.approx((first[0] + second[0]) / 2, abs=2e-3)
        assert layer.best == pytest.approx((first[1] + second[1]) / 2, abs=1e-4)
        assert layer.recall <= layer.best + 1e-6


def test_prompts_that_fit_into_the_selection_are_left_out() -> None:
    assert indexer_recall(model_with(16), [[2] * 100]) == []


def test_a_prompt_that_leaves_no_room_gets_no_output() -> None:
    inference = LocalInference(served_model(model_with(16)), num_conversations=3, max_tokens=64)
    outputs = inference.generate({0: [3] * 64, 2: [3, 4]}, max_output_tokens=4)
    assert outputs[0] == []
    assert 1 <= len(outputs[2]) <= 4
    assert inference.generate({2: [3, 4]}, max_output_tokens=4)[2] == outputs[2]


def test_the_models_under_test_differ_in_what_they_attend_to_and_store(tmp_path: Path) -> None:
    checkpoint = tmp_path / "random"
    init_checkpoint(checkpoint, seed=3, geometry="demo")
    topk = ModelConfig.from_json(checkpoint).index_topk
    group = Group(name="", make=list, num_tasks=2, max_tokens=256, batch_size=2)
    prompts = {0: [5 + i % 200 for i in range(topk - 8)], 1: [5 + i * i % 200 for i in range(topk + 100)]}
    with ExitStack() as stack:
        players = Players(checkpoint, stack, models=MODELS, device="cpu")
        said = {name: players.inference(name, group).generate(prompts, max_output_tokens=6) for name in MODELS}
    assert said["sparse"][0] == said["dense"][0], "all tokens are selected in so short a context"
    assert said["sparse"][1] != said["dense"][1]
    assert set(said["fp8"]) == {0, 1}
    assert all(said["fp8"].values())
