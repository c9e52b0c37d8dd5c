from __future__ import annotations

import dataclasses
import queue
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from examples.tiny_agent import attempts, objectives, reinforce
from examples.tiny_agent.attempts import KINDS, KindShares, Transcript, advantages, play, training_groups
from examples.tiny_agent.captured import EveryExpert, copy_weights
from examples.tiny_agent.config import model_config
from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.indexing import Rows, SelectedAttention
from examples.tiny_agent.model import Model
from examples.tiny_agent.reinforce import Learner, packed
from examples.tiny_agent.rollouts import Reply, Rollouts, draw
from examples.tiny_agent.sampling import Links, Measure, Over, Result, Sample, Sizes, run_sampler
from examples.tiny_agent.shared_weights import SharedWeights
from examples.tiny_agent.tasks import Task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.router.tokenizer import Tokenizer
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.transformer import Transformer

torch.set_num_threads(1)
EOS = 1
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
    "index_topk": 16,
}


def _model() -> Model:
    torch.manual_seed(3)
    return Model(model_config(**SMALL), torch.float32)


class Asking:
    """Asks three times; what was said stays in the prompt, except that the last question forgets the first answer."""

    def __init__(self, first: Sequence[int], questions: int = 3, forgetful: bool = False) -> None:
        self.said: list[list[int]] = []
        self._first, self._questions, self.forgetful = list(first), questions, forgetful

    @property
    def done(self) -> bool:
        return len(self.said) == self._questions

    def prompt(self) -> list[int]:
        answers = self.said[1:] if self.forgetful and len(self.said) == 2 else self.said
        return [*self._first, *(token for said in answers for token in (*said, 5, 6))]

    def take(self, token_ids: Sequence[int]) -> None:
        self.said.append(list(token_ids))


def _logprobs(model: Model, transcript: Transcript) -> list[float]:
    """Of the sampled tokens, by the trainer's own forward pass over the whole context."""
    tokens = torch.tensor([transcript.token_ids])
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    attend = SelectedAttention(Rows(torch.zeros_like(tokens), positions), 16, model.config.softmax_scale, None)
    with torch.no_grad():
        hidden, _ = model(tokens, model.angles(positions), attend)
        logprobs = (model.head_input(hidden)[0] @ model.lm_head.T).log_softmax(-1)
    sampled = [t for t, value in enumerate(transcript.drawn) if value == value]
    return [logprobs[t - 1, transcript.token_ids[t]].item() for t in sampled]


def _served(model: Model) -> Transformer:
    weights = SharedWeights(model.config, model.dtype)
    weights.write(model)
    return weights.served(torch.device("cpu"))[0]


@pytest.mark.parametrize(("captured", "admit_at"), [(False, 1), (True, 1), (True, 3)])
def test_attempts_sample_from_the_trained_model(captured: bool, admit_at: int) -> None:
    """Several replies over a cache that is reused, some of its tokens forgotten: always the whole context's logits.

    There are fewer seats than attempts, so conversations of several tasks lie in one place after another.
    """
    model = _model()
    coming = [
        [Asking([3, 4, 7 + i], forgetful=bool(i % 2)) for i in range(group, group + 2)] for group in range(0, 6, 2)
    ]
    rollouts = Rollouts(_served(model), num_conversations=4, max_tokens=128, admit_at=admit_at, captured=captured)
    generator = torch.Generator().manual_seed(0)
    groups = list(play(iter(coming), rollouts, max_new=12, generator=generator))
    assert len(groups) == 3
    for group in groups:
        for one, contexts in zip(group.attempts, group.transcripts, strict=True):
            assert one.done
            assert len(contexts) == (2 if one.forgetful else 1)
            sampled = [t for told in contexts for t, p in zip(told.token_ids, told.drawn, strict=True) if p == p]
            assert sampled == [token for said in one.said for token in said]
            for context in contexts:
                own = [value for value in context.drawn if value == value]
                assert len(own) == context.num_sampled
                assert own == pytest.approx(_logprobs(model, context), abs=1e-4)


@pytest.mark.parametrize("captured", [False, True])
def test_attempts_at_one_task_share_the_computation_of_its_prompt(captured: bool) -> None:
    model, asked = _model(), [2 + (7 * i) % 29 for i in range(90)]
    coming = [[Asking([*asked, 7 + group], questions=2) for _ in range(4)] for group in range(3)]
    rollouts = Rollouts(_served(model), num_conversations=5, max_tokens=192, captured=captured)
    generator = torch.Generator().manual_seed(0)
    groups = list(play(iter(coming), rollouts, max_new=12, generator=generator))
    assert len(groups) == 3
    for group in groups:
        for (context,) in group.transcripts:
            own = [value for value in context.drawn if value == value]
            assert own == pytest.approx(_logprobs(model, context), abs=1e-4)
        assert len({tuple(context.token_ids) for (context,) in group.transcripts}) > 1
    # Each prompt once, and the few tokens between two questions; an attempt whose first has left may need it again.
    assert rollouts.work.num_prefilled < 6 * 91


def test_a_context_that_is_full_ends() -> None:
    tried = Asking([3, 4], questions=50)
    rollouts = Rollouts(_served(_model()), num_conversations=1, max_tokens=64, captured=True)
    (group,) = play(iter([[tried]]), rollouts, max_new=12, generator=torch.Generator().manual_seed(0))
    assert not tried.done
    assert len(group.transcripts[0][-1].token_ids) <= 65


def test_what_is_not_complete_is_lost_when_playing_ends() -> None:
    answers = iter([True] * 20 + [False])
    rollouts = Rollouts(_served(_model()), num_conversations=4, max_tokens=64)
    endless = ([Asking([3, 4], questions=2)] for _ in iter(int, 1))
    generator = torch.Generator().manual_seed(0)
    groups = list(play(endless, rollouts, max_new=6, generator=generator, goes_on=lambda: next(answers)))
    assert groups
    assert all(group.attempts[0].done for group in groups)
    assert not rollouts.is_busy


def test_every_expert_adds_what_the_chosen_ones_would() -> None:
    torch.manual_seed(5)
    x, ids = torch.randn(7, 6), torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    outputs = []
    for experts in (LocalExperts(4), EveryExpert(4)):
        sent = experts.dispatch(x, ids)
        parts = sent.x.split(list(sent.rows_per_expert))
        computed = torch.cat([part * (1.0 + number) ** 2 for number, part in enumerate(parts)])
        outputs.append(experts.combine(computed, sent, weights))
    assert torch.equal(*outputs)


def test_new_weights_take_the_place_of_the_old_ones() -> None:
    model = _model()
    weights = SharedWeights(model.config, model.dtype)
    weights.write(model)
    old, version = weights.served(torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    weights.write(model)
    new, later = weights.served(torch.device("cpu"))
    assert (version, later) == (1, 2)
    replies = []
    for served in (old, new, old):
        if replies:
            copy_weights(new, served)
        rollouts = Rollouts(served, num_conversations=1, max_tokens=64, captured=True)
        reply = rollouts.replies({0: [3, 4, 5]}, max_new=5, temperature=0.0, generator=torch.Generator())[0]
        replies.append(reply.logprobs)
    assert replies[0] != replies[1] == replies[2]


def test_kinds_that_fail_are_drawn_more_often() -> None:
    shares = KindShares()
    for _ in range(60):
        for kind in KINDS:
            shares.add(kind, [kind is not TaskKind.MULTI] * 8)
    drawn = [shares.draw(random.Random(i)) for i in range(2000)]
    assert 0.75 < drawn.count(TaskKind.MULTI) / len(drawn) < 0.9
    assert set(drawn) == set(KINDS)


def test_tasks_depend_on_seed_number_and_shares_alone() -> None:
    tokenizer = Tokenizer.load(TOKENIZER)

    def prompts(first: int, stride: int, count: int) -> list[list[int]]:
        coming = training_groups(tokenizer, KindShares(), size=2, seed=4, first=first, stride=stride)
        groups = [next(coming) for _ in range(count)]
        assert all(len(group) == 2 and group[0].prompt() == group[1].prompt() for group in groups)
        return [group[0].prompt() for group in groups]

    every = prompts(0, 1, 6)
    assert prompts(0, 2, 3) == every[::2]
    assert prompts(1, 2, 3) == every[1::2]
    assert len({tuple(prompt) for prompt in every}) == 6


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    ids, logprobs = draw(logits, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(ids, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert logprobs.exp().tolist() == pytest.approx([[0.5, 0.3, 0.15, 0.05][i] for i in ids.tolist()], abs=1e-5)
    assert draw(logits[:2], 0.0, torch.Generator())[0].tolist() == [0, 0]


def test_a_task_that_cannot_be_made_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attempts.make_task

    def failing(kind: TaskKind, *, split: Split, seed: int, index: int) -> Task:
        assert index != 5, "every table has a look-up"
        return made(kind, split=split, seed=seed, index=index)

    monkeypatch.setattr(attempts, "make_task", failing)
    coming = training_groups(Tokenizer.load(TOKENIZER), KindShares(), size=1, seed=4, first=4, stride=1)
    assert [next(coming)[0].task.index for _ in range(3)] == [4, -6, 6]


def test_advantages_are_relative_to_the_group() -> None:
    assert advantages([1, 0, 0]) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages([0.8, 0.8]) == [0, 0]


def test_packing_keeps_every_sampled_token_with_its_advantage() -> None:
    samples = []
    for size in (40, 30, 20, 64, 5):
        transcript = Transcript()
        transcript.extend(list(range(size - 3)), Reply(token_ids=[9, 8, EOS], logprobs=[-0.1 * size, -0.2, -0.3]))
        samples.append((transcript, float(size)))
    blocks = list(packed(samples, 64, torch.device("cpu")))
    assert len(blocks) == 1
    block = blocks[0]
    assert (block.document_ids >= 0).any(1).sum() == 3  # 64 | 40 + 20 | 30 + 5
    for size, (transcript, _) in zip((40, 30, 20, 64, 5), samples, strict=True):
        at = (block.advantages == size).nonzero().tolist()
        assert len(at) == 3
        assert [int(block.tokens[b, t]) for b, t in at] == [9, 8, EOS]
        assert float(block.drawn[at[0][0], at[0][1]]) == pytest.approx(-0.1 * size)
        b, end = at[-1]
        assert block.tokens[b, end - size + 1 : end + 1].tolist() == transcript.token_ids
        assert block.positions[b, end - size + 1 : end + 1].tolist() == list(range(size))


def test_rewarded_tokens_become_likelier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward: the share of sampled tokens that are even. No data, no gold answer."""
    for name, value in {"ROWS": 4, "DENSE_LENGTH": 64, "LR": 1e-2}.items():
        monkeypatch.setattr(reinforce, name, value)
    monkeypatch.setattr(objectives, "HEAD_ROWS", 64)
    model = _model()
    frozen = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if ".indexer." in name or name.startswith(("mtp.", "embed_tokens", "lm_head"))
    }
    with torch.no_grad():
        model.lm_head *= 10  # it stays as it is: what comes before it must matter
    frozen["lm_head"] = model.lm_head.detach().clone()
    learner = Learner(model)
    learner.warm_up()
    saved = learner.saved()
    generator, rewards = torch.Generator().manual_seed(0), []
    for _ in range(20):
        rollouts = Rollouts(_served(model), num_conversations=32, max_tokens=64, captured=True)
        coming = ([Asking([3, 4, 10 + task], questions=1) for _ in range(8)] for task in range(4))
        samples = []
        for group in play(coming, rollouts, max_new=6, generator=generator):
            shares = [sum(t % 2 == 0 for t in one.said[0]) / len(one.said[0]) for one in group.attempts]
            samples += [(told[0], a) for told, a in zip(group.transcripts, advantages(shares), strict=True)]
            rewards += shares
        figures = learner.update(samples)
        # One step off its weights a sample would not be: these are of the present ones.
        assert figures["clipped"] == 0
        assert figures["divergence"] < 1e-6
    print([round(sum(rewards[at : at + 32]) / 32, 2) for at in range(0, 640, 32)])
    assert sum(rewards[-96:]) / 96 > sum(rewards[:96]) / 96 + 0.2
    assert all(torch.equal(dict(model.named_parameters())[name], before) for name, before in frozen.items())
    learner.restore(saved)
    start = _model()
    for name, parameter in start.named_parameters():
        assert name == "lm_head" or torch.equal(parameter, dict(model.named_parameters())[name])


class Told(queue.SimpleQueue[Any]):
    """Results; after ``limit`` of a sampling that sampling is to end."""

    def __init__(self, is_open: threading.Event, limit: int) -> None:
        self.told: list[Any] = []
        self._is_open, self._limit = is_open, limit

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.told.append(item)
        if sum(isinstance(one, Result) and len(one.rewards) > 1 for one in self.told) >= self._limit:
            self._is_open.clear()


def _obeyed(commands: Sequence[object], sizes: Sizes, model: Model) -> list[Any]:
    is_open, may_sample = threading.Event(), threading.Event()
    is_open.set()
    may_sample.set()
    told, coming = Told(is_open, limit=3), queue.SimpleQueue[Any]()
    for command in (*commands, None):
        coming.put(command)
    weights = SharedWeights(model.config, model.dtype)
    weights.write(model)
    links = Links(weights=weights, commands=coming, results=told, is_open=is_open, may_sample=may_sample)
    run_sampler(links, sizes, "cpu", number=1, count=2, seed=0)
    return told.told


def test_a_process_does_what_it_is_told() -> None:
    torch.manual_seed(3)
    model = Model(model_config(**SMALL | {"vocab_size": 4096}), torch.float32)
    sizes = Sizes(num_conversations=8, max_tokens=2048, max_new=4, group=4)
    told = _obeyed([Measure(num_tasks=4, seed=1), Sample(first=0, seed=2)], sizes, model)
    kinds = [Over if isinstance(one, Over) else (len(one.rewards), one.kind) for one in told]
    first = kinds.index(Over)
    # Tasks 1 and 3 are this process' of 4 of each kind.
    assert sorted(kinds[:first], key=str) == sorted([(1, kind) for kind in KINDS] * 2, key=str)
    assert kinds[-1] is Over
    assert {size for size, _ in kinds[first + 1 : -1]} == {4}
    assert len(kinds[first + 1 : -1]) >= 3
    for result in told[first + 1 : -1]:
        assert result.version == 1
        assert not result.samples, "an untrained model earns nothing"
        assert 4 <= result.num_sampled <= 4 * 4 * 10
        assert result.num_tokens > result.num_sampled


def test_a_failure_is_told() -> None:
    told = _obeyed(["nonsense"], Sizes(num_conversations=8, max_tokens=2048, max_new=4, group=4), _model())
    assert len(told) == 1
    assert "nonsense" in told[0].error or "Traceback" in told[0].error


def test_reply_of_another_context_starts_a_new_transcript() -> None:
    transcript = Transcript()
    reply = Reply(token_ids=[5], logprobs=[-1.0])
    assert transcript.extend([1, 2], reply)
    assert not transcript.extend([1, 3, 5, 7], reply)
    assert transcript.extend([1, 2, 5, 7], dataclasses.replace(reply, token_ids=[6]))
    assert transcript.token_ids == [1, 2, 5, 7, 6]
