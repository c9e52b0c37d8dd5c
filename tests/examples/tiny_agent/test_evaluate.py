"""The evaluation's logic: what is played, intervals, paired tests, rows and files, the indexer's recall."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from examples.tiny_agent.config import CONFIG, model_config
from examples.tiny_agent.documents import TOKENIZER, DocumentSource
from examples.tiny_agent.episodes import gold_outputs, play
from examples.tiny_agent.evaluate import Keeper, lanes_of, play_served
from examples.tiny_agent.export import save_checkpoint
from examples.tiny_agent.export import write_json as write_config
from examples.tiny_agent.inference import LocalInference
from examples.tiny_agent.journal import Journal, Results, read_journal
from examples.tiny_agent.model import Angles, Layer, Model, Projected
from examples.tiny_agent.players import MODELS, Checkpoints, Lane, Pace, Played, first_lanes, play_jobs, run_jobs
from examples.tiny_agent.plots import plot
from examples.tiny_agent.recall import NUM_QUERIES, indexer_recall
from examples.tiny_agent.report import Report, write_json
from examples.tiny_agent.scores import Share, paired
from examples.tiny_agent.shared_weights import SharedWeights
from examples.tiny_agent.suite import Suite, needle_row
from examples.tiny_agent.turns import TaskKind
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.quantize_checkpoint import quantize_checkpoint

torch.set_num_threads(1)
SUITE = Suite(seed=6, num_tasks=5, num_needles=2, lengths=(512,), depths=(0.0, 1.0), group_size=3)
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
    """Says the gold outputs of the suite's tasks, and EOS to every other prompt."""

    def __init__(self, suite: Suite, tokenizer: Tokenizer) -> None:
        self._eos = tokenizer.eos_token_id
        self._outputs: dict[tuple[int, ...], list[int]] = {}
        source, history = DocumentSource(tokenizer), History(tokenizer, "oracle")
        for group in suite.groups():
            plain = dataclasses.replace(group, given=False, keeps_reasoning=True)
            for episode in plain.episodes(tokenizer, source, history):
                for output in gold_outputs(episode.task, tokenizer):
                    self._outputs[tuple(episode.prompt())] = output
                    episode.take(output)

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {i: self._outputs.get(tuple(prompt), [self._eos]) for i, prompt in prompts.items()}


class Silent:
    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {i: [1] for i in prompts}


def keeper(journal: Journal) -> Keeper:
    return Keeper(journal, Progress(console=Console(quiet=True)), 1)


@pytest.fixture(scope="module")
def results(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of two models: ``oracle`` and ``silent``."""
    together = Results()
    for name, model in (("oracle", Oracle(SUITE, tokenizer)), ("silent", Silent())):
        journal = Journal(tmp_path_factory.mktemp(name), {})
        play_served(SUITE, model, tokenizer, journal, keeper(journal), deadline=time.time() + 600)
        together.outcomes[name] = journal.results.outcomes["served"]
    return together


def test_every_kind_is_played_and_a_perfect_player_does_all_of_it(results: Results) -> None:
    done: dict[str, list[bool]] = {}
    for (row, _), outcomes in results.outcomes["oracle"].items():
        done.setdefault(row, []).extend(one.succeeded for one in outcomes)
    assert set(done) == {
        *(kind.value for kind in TaskKind if kind is not TaskKind.NEEDLE),
        *("plan, given", "plan, cut"),
        *(needle_row(512, depth) for depth in SUITE.depths),
    }
    assert sum(map(len, done.values())) == SUITE.num_episodes
    assert not any(done.pop("plan, cut")), "without its reasoning nobody knows what was chosen"
    assert all(all(row) for row in done.values())
    assert not any(one.succeeded for made in results.outcomes["silent"].values() for one in made)


def test_an_evaluation_goes_on_where_it_stopped(results: Results, tokenizer: Tokenizer, tmp_path: Path) -> None:
    subject = {"seed": SUITE.seed}
    stopped = Journal(tmp_path, subject)
    play_served(SUITE, Silent(), tokenizer, stopped, keeper(stopped), deadline=0.0)
    assert not stopped.results.outcomes
    begun = Journal(tmp_path, subject)
    first = dataclasses.replace(SUITE, kinds=SUITE.kinds[:2], lengths=())
    play_served(first, Silent(), tokenizer, begun, keeper(begun), deadline=time.time() + 600)
    with (tmp_path / "outcomes.jsonl").open("a") as file:
        file.write('{"model": "served", "row": "cut off')
    whole = Journal(tmp_path, subject)
    play_served(SUITE, Oracle(SUITE, tokenizer), tokenizer, whole, keeper(whole), deadline=time.time() + 600)
    expected = results.outcomes["oracle"] | begun.results.outcomes["served"]
    assert whole.results.outcomes["served"] == expected
    assert read_journal(tmp_path)[1].outcomes["served"] == expected
    with pytest.raises(ValueError, match="another model"):
        Journal(tmp_path, {"seed": 7})


def test_the_report_is_complete(results: Results, tmp_path: Path) -> None:
    report = Report.of(results, {"source": "here"})
    report.print(Console(quiet=True))
    write_json(report, tmp_path)
    plot(report, tmp_path / "evaluation.png")
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    single = next(row for row in stored["rows"] if row["model"] == "oracle" and row["name"] == "single")
    assert single["success"]["successes"] == single["success"]["total"] == SUITE.num_tasks
    assert single["valid_calls"]["value"] == 1.0
    together = next(one for one in stored["comparisons"] if one["name"] == "all")
    own = SUITE.num_episodes - 2 * SUITE.num_tasks  # without the plans whose first message is given
    assert together["total"] == own
    assert together["only_first"] == own
    assert together["only_second"] == 0
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_only_what_both_models_played_is_compared(results: Results) -> None:
    some = {key: made for key, made in results.outcomes["silent"].items() if key == ("single", 3)}
    some["multi", 0] = results.outcomes["silent"]["multi", 0][:1]
    report = Report.of(Results(outcomes={"oracle": results.outcomes["oracle"], "silent": some}), {})
    assert {one.name: one.paired.only_first for one in report.comparisons} == {"multi": 1, "single": 2, "all": 3}


def test_models_are_compared_with_the_served_one_whichever_was_played_first(results: Results) -> None:
    played = {"fp8": results.outcomes["silent"], "dense": results.outcomes["oracle"]}
    report = Report.of(Results(outcomes=played | {"sparse": results.outcomes["oracle"]}), {})
    assert report.models == ["sparse", "dense", "fp8"]
    assert {(one.first, one.second) for one in report.comparisons} == {("sparse", "dense"), ("sparse", "fp8")}


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
    model = model_with(16)
    weights = SharedWeights(model.config, model.dtype)
    weights.write(model)
    inference = LocalInference(weights.served(torch.device("cpu"))[0], num_conversations=3, max_tokens=64)
    outputs = inference.generate({0: [3] * 64, 2: [3, 4]}, max_output_tokens=4)
    assert outputs[0] == []
    assert 1 <= len(outputs[2]) <= 4
    assert inference.generate({2: [3, 4]}, max_output_tokens=4)[2] == outputs[2]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A small random checkpoint with the recipe's tokenizer."""
    folder = tmp_path_factory.mktemp("forms")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 128, "index_n_heads": 4}
    torch.manual_seed(8)
    model = Model(model_config(**sizes), torch.float32)
    model.lm_head.data[Tokenizer.load(TOKENIZER).eos_token_id] *= 4  # outputs end soon
    save_checkpoint(model, folder / "plain", TOKENIZER)
    write_config(folder / "plain" / "config.json", {**CONFIG, **sizes})
    quantize_checkpoint(folder / "plain", folder / "fp8")
    return Checkpoints(plain=folder / "plain", fp8=folder / "fp8")


def test_the_models_under_test_differ_in_what_they_attend_to_and_store(forms: Checkpoints) -> None:
    topk = ModelConfig.from_json(forms.plain).index_topk
    prompts = {0: [5 + i % 200 for i in range(topk - 8)], 1: [5 + i * i % 200 for i in range(topk + 100)]}
    said = {}
    for name in MODELS:
        inference = LocalInference(forms.load(name, "cpu"), num_conversations=2, max_tokens=512)
        said[name] = inference.generate(prompts, max_output_tokens=6)
    assert said["sparse"][0] == said["dense"][0], "all tokens are selected in so short a context"
    assert said["sparse"][1] != said["dense"][1]
    assert set(said["fp8"]) == {0, 1}
    assert all(said["fp8"].values())


@pytest.mark.parametrize(
    ("work", "num_processes", "expected"),
    [([10], 3, [0, 0, 0]), ([60, 20, 19], 5, [0, 0, 0, 1, 2]), ([9, 1], 1, [0]), ([5, 5], 2, [0, 1]), ([], 2, [0, 0])],
)
def test_processes_begin_with_lanes_in_proportion_to_their_work(
    work: list[int], num_processes: int, expected: list[int]
) -> None:
    assert first_lanes(work, num_processes) == expected


def test_processes_share_the_tasks_and_play_them_as_one_would(
    forms: Checkpoints, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    suite = Suite(seed=3, num_tasks=2, num_needles=1, kinds=(TaskKind.NO_TOOL,), lengths=(512,), group_size=1)
    journal = Journal(tmp_path, {})
    lanes = lanes_of({"sparse": suite, "fp8": suite}, journal, (2, 2))
    assert [(lane.model, lane.max_tokens) for lane in lanes] == [
        ("sparse", 2560),
        ("sparse", 1024),
        ("fp8", 2560),
        ("fp8", 1024),
    ]
    short = lanes[:1]
    told: list[Played | Pace] = []
    run_jobs(play_jobs(short, forms, ["cpu", "cpu"], time.time() + 600), told.append)
    outcomes = {(one.group.row, one.group.first): one.outcomes for one in told if isinstance(one, Played)}
    inference = LocalInference(forms.load("sparse", "cpu"), num_conversations=1, max_tokens=2560)
    for lane in short:
        for group in lane.groups:
            episodes = list(group.episodes(tokenizer, DocumentSource(tokenizer), History(tokenizer, "one")))
            assert outcomes[group.row, group.first] == play(episodes, inference)
    sampled = sum(one.work.num_sampled for one in told if isinstance(one, Pace))
    assert sampled == sum(one.num_output_tokens for made in outcomes.values() for one in made)


def test_a_lane_that_fails_is_reported_and_the_others_are_played(forms: Checkpoints) -> None:
    groups = tuple(Suite(seed=1, num_tasks=1, num_needles=0, kinds=(TaskKind.NO_TOOL,)).groups())
    lanes = [Lane(model=model, groups=groups, num_conversations=1) for model in ("fp8", "sparse")]
    told: list[Played | Pace] = []
    without = Checkpoints(plain=forms.plain, fp8=Path("/nowhere"))
    with pytest.raises(RuntimeError, match="nowhere"):
        run_jobs(play_jobs(lanes, without, ["cpu"], time.time() + 600), told.append)
    assert [one.model for one in told if isinstance(one, Played)] == ["sparse"]
