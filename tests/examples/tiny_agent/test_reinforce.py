from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from examples.tiny_agent import objectives, reinforce
from examples.tiny_agent.config import model_config
from examples.tiny_agent.indexing import Rows, SelectedAttention
from examples.tiny_agent.model import Model
from examples.tiny_agent.reinforce import Reinforcement, Transcript, advantages, attempt, packed, served_model
from examples.tiny_agent.rollouts import Reply, Rollouts, draw

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
        self._first, self._questions, self._forgetful = list(first), questions, forgetful

    @property
    def done(self) -> bool:
        return len(self.said) == self._questions

    def prompt(self) -> list[int]:
        answers = self.said[1:] if self._forgetful and len(self.said) == 2 else self.said
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


def test_attempts_sample_from_the_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several replies over a cache that is reused, some of its tokens forgotten: always the whole context's logits."""
    monkeypatch.setattr(reinforce, "MAX_NEW", 12)
    model = _model()
    tried = [Asking([3, 4, 7 + i], forgetful=bool(i % 2)) for i in range(4)]
    rollouts = Rollouts(served_model(model), num_conversations=4, max_tokens=128)
    generator = torch.Generator().manual_seed(0)
    transcripts = attempt(tried, rollouts, generator=generator)
    assert all(one.done for one in tried)
    for i, (one, contexts) in enumerate(zip(tried, transcripts, strict=True)):
        assert len(contexts) == (2 if i % 2 else 1)
        sampled = [t for context in contexts for t, p in zip(context.token_ids, context.drawn, strict=True) if p == p]
        assert sampled == [token for said in one.said for token in said]
        for context in contexts:
            own = [value for value in context.drawn if value == value]
            assert own == pytest.approx(_logprobs(model, context), abs=1e-4)


def test_a_context_that_is_full_ends() -> None:
    tried = [Asking([3, 4], questions=50)]
    rollouts = Rollouts(served_model(_model()), num_conversations=1, max_tokens=64)
    transcripts = attempt(tried, rollouts, generator=torch.Generator().manual_seed(0))
    assert not tried[0].done
    assert len(transcripts[0][-1].token_ids) <= 65


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    ids, logprobs = draw(logits, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(ids, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert logprobs.exp().tolist() == pytest.approx([[0.5, 0.3, 0.15, 0.05][i] for i in ids.tolist()], abs=1e-5)
    assert draw(logits[:2], 0.0, torch.Generator())[0].tolist() == [0, 0]


def test_advantages_are_relative_to_the_group() -> None:
    assert advantages([1, 0, 0, 1, 1, 1], 3) == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


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
    for name, value in {"TASKS": 4, "GROUP": 8, "MAX_NEW": 6, "ROWS": 4, "DENSE_LENGTH": 64}.items():
        monkeypatch.setattr(reinforce, name, value)
    monkeypatch.setattr(reinforce, "MATRIX_LR", 6e-3)
    monkeypatch.setattr(reinforce, "OTHER_LR", 6e-3)
    monkeypatch.setattr(objectives, "HEAD_ROWS", 64)
    model = _model()
    indexers = {name: p.detach().clone() for name, p in model.named_parameters() if ".indexer." in name}
    learner = Reinforcement(model, seed=1)
    lines = []
    for _ in range(20):
        tried = [Asking([3, 4, 10 + task], questions=1) for task in range(4) for _ in range(8)]
        lines.append(learner.step(tried, lambda one: sum(t % 2 == 0 for t in one.said[0]) / len(one.said[0])))
    rewards = [line["reward"] for line in lines]
    print([round(value, 2) for value in rewards])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert all(torch.equal(dict(model.named_parameters())[name], before) for name, before in indexers.items())


def test_reply_of_another_context_starts_a_new_transcript() -> None:
    transcript = Transcript()
    reply = Reply(token_ids=[5], logprobs=[-1.0])
    assert transcript.extend([1, 2], reply)
    assert not transcript.extend([1, 3, 5, 7], reply)
    assert transcript.extend([1, 2, 5, 7], dataclasses.replace(reply, token_ids=[6]))
    assert transcript.token_ids == [1, 2, 5, 7, 6]
