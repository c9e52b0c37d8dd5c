from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import indexer as index_kernels
from seamount.kernels.layout import CacheLayout
from seamount.kernels.rope import rope_angles, rope_frequencies
from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.attention import Attention
from seamount.workers.model.batch import AttentionPlan, ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.transformer import Transformer

Make = Callable[..., Any]
Parameters = Callable[[ModelConfig, int], dict[str, Tensor]]


def _tokens(generator: random.Random, config: ModelConfig, count: int) -> list[int]:
    return [generator.randrange(config.vocab_size) for _ in range(count)]


@pytest.mark.parametrize("layout", ["exact", "bf16", "fp8"])
def test_cutting_a_prompt_changes_nothing(
    layout: str, tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    """In float64 only the order of sums differs; a chunk that read its own unquantised latents would show at once."""
    generator = random.Random(seed)
    run = paged_run(tiny_config, random_parameters(tiny_config, seed), layout=layout, seed=seed)
    length = 131
    token_ids = _tokens(generator, tiny_config, length)
    whole = run.logits_in_chunks(token_ids, [length])
    assert whole.dtype == torch.float64
    assert whole.isfinite().all()
    for chunks in ([64, 64, 3], [1, 63, 66, 1], [16, 1, 1, 113], [1] * 30 + [101], [100] + [1] * 31):
        difference = (run.logits_in_chunks(token_ids, chunks) - whole).abs().max().item()
        print(f"{layout}, chunks {chunks[:4]}: max |dlogit| {difference:.1e}")
        assert difference < 1e-9


def test_sequences_do_not_touch_each_other(
    tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    """Decode rows and chunks, within top-k and beyond, in any order in one batch, against one sequence at a time."""
    generator = random.Random(seed)
    parameters = random_parameters(tiny_config, seed)
    run = paged_run(tiny_config, parameters, num_pages=40, seed=seed)
    alone = paged_run(tiny_config, parameters, num_pages=40, seed=seed + 1)
    cached_and_new = [(0, 1), (5, 1), (15, 1), (16, 1), (63, 1), (64, 1), (130, 1), (0, 9), (0, 80), (60, 10), (100, 2)]
    generator.shuffle(cached_and_new)
    batch, expected = [], []
    for cached, new in cached_and_new:
        token_ids = _tokens(generator, tiny_config, cached + new)
        pages = run.new_pages(len(token_ids))
        if cached:
            run.step([(token_ids[:cached], 0, pages)])
        batch.append((token_ids[cached:], cached, pages))
        expected.append(alone.logits_in_chunks(token_ids, [len(token_ids)])[cached:])
    actual = run.step(batch, all_rows=True)
    assert (actual - torch.cat(expected)).abs().max() < 1e-9


@pytest.mark.parametrize("length", [5, 40])
def test_plain_form_equals_absorbed_form(
    length: int,
    tiny_config: ModelConfig,
    random_parameters: Parameters,
    paged_run: Make,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(tiny_config, index_topk=64)
    token_ids = _tokens(random.Random(seed), config, length)
    run = paged_run(config, random_parameters(config, seed), layout="fp8")
    logits = []
    for plain in (True, False):
        monkeypatch.setattr(Attention, "_plain_is_cheaper", lambda *_, plain=plain: plain)
        logits.append(run.logits_in_chunks(token_ids, [length]))
    assert (logits[0] - logits[1]).abs().max() < 1e-9


def test_short_append_reads_the_same_selection(
    tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    """3 new tokens behind 197 take the slot path, 100 new ones the context path."""
    token_ids = _tokens(random.Random(seed), tiny_config, 200)
    run = paged_run(tiny_config, random_parameters(tiny_config, seed))
    appended = run.logits_in_chunks(token_ids, [197, 3])
    assert (appended - run.logits_in_chunks(token_ids, [100, 100])).abs().max() < 1e-9


def test_nothing_is_narrowed_in_float64(
    tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    """A change of 1e-10 in an embedding moves the logits a thousandth as far as one of 1e-7; float32 would lose it."""
    parameters = random_parameters(tiny_config, seed)
    token_ids = _tokens(random.Random(seed), tiny_config, 40)
    embedding = parameters["model.embed_tokens.weight"]
    logits = []
    for change in (0.0, 1e-10, 1e-7):
        changed = embedding.clone()
        changed[token_ids[0]] += change
        run = paged_run(tiny_config, parameters | {"model.embed_tokens.weight": changed})
        logits.append(run.logits_in_chunks(token_ids, [20, 20]))
    small, large = logits[1] - logits[0], logits[2] - logits[0]
    assert large.abs().max() > 0
    assert (small * 1000 - large).norm() < 0.01 * large.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_models_stay_near_float64(
    dtype: torch.dtype, tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    config = dataclasses.replace(tiny_config, num_hidden_layers=1, index_topk=256)
    parameters = {name: value.to(dtype).double() for name, value in random_parameters(config, seed).items()}
    token_ids = _tokens(random.Random(seed), config, 70)
    exact = paged_run(config, parameters).logits_in_chunks(token_ids, [64, 5, 1])
    actual = paged_run(config, parameters, dtype=dtype).logits_in_chunks(token_ids, [64, 5, 1])
    assert actual.dtype == torch.float32
    error = ((actual - exact).norm() / exact.norm()).item()
    print(f"{dtype}: relative error {error:.1e}")
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_steps_without_tokens_or_wanted_rows(
    tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    run = paged_run(tiny_config, random_parameters(tiny_config, seed))
    before = [plane.clone() for plane in (*run.planes.latent, *run.planes.index)]
    layers: list[int] = []
    assert run.step([], on_layer=layers.append).shape == (0, tiny_config.vocab_size)
    assert layers == [0, 1, 2]
    after = (*run.planes.latent, *run.planes.index)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    batch = ForwardBatch.create([([3, 4], 0, run.new_pages(2))], [])
    assert run.model.forward(batch, run.planes).shape == (0, tiny_config.vocab_size)


def test_callback_comes_when_the_layer_is_written(
    tiny_config: ModelConfig, random_parameters: Parameters, paged_run: Make, seed: int
) -> None:
    run = paged_run(tiny_config, random_parameters(tiny_config, seed))
    pages = run.new_pages(3)
    written: list[tuple[int, int]] = []

    def on_layer(layer: int) -> None:
        row = slice(0, run.model.layout.latent_bytes_per_token * 3)
        done = [not (plane[pages[0], row] == 0xFF).all() for plane in run.planes.latent]
        indexed = [not (plane[pages[0], : row.stop // 8] == 0xFF).all() for plane in run.planes.index]
        written.append((layer, sum(done)))
        assert done == indexed

    run.step([([1, 2, 3], 0, pages)], on_layer=on_layer)
    assert written == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(("layout", "bound"), [("fp8", 0.05), ("bf16", 0.005)])
def test_each_layer_stays_within_quantisation_error(
    layout: str,
    bound: float,
    tiny_config: ModelConfig,
    random_parameters: Parameters,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same inputs through each layer's attention with quantised and exact caches, chosen tokens included."""
    config, count = dataclasses.replace(tiny_config, index_topk=48), 192
    parameters = random_parameters(config, seed)
    generator = torch.Generator().manual_seed(seed)
    scores: list[tuple[Tensor, Tensor]] = []
    choose = index_kernels.topk_indices

    def watched(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
        scores.append((logits, choose(logits, k, lengths)))
        # Both runs then attend to the exact run's choice, so that outputs differ by quantisation alone.
        return scores[0][1]

    monkeypatch.setattr(index_kernels, "topk_indices", watched)
    batch = ForwardBatch.create([([0] * count, 0, [2, 0, 1])])
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        own = {name.removeprefix(prefix): at for name, at in parameters.items() if name.startswith(prefix)}
        x = torch.randn((count, config.hidden_size), generator=generator, dtype=torch.float64)
        scores.clear()
        exact = _attend(config, "exact", own, x, batch)
        quantised = _attend(config, layout, own, x, batch)
        error = ((quantised - exact).norm() / exact.norm()).item()
        (exact_scores, exact_choice), (other_scores, choice) = scores
        legal = exact_scores.isfinite()
        score_error = ((other_scores - exact_scores)[legal].norm() / exact_scores[legal].norm()).item()
        overlap = _common_share(exact_scores, exact_choice, other_scores, choice)
        print(
            f"{layout}, layer {layer}: output error {error:.4f}, score error {score_error:.4f}, overlap {overlap:.3f}"
        )
        assert 0 < error < bound
        assert 0 < score_error < 0.05
        assert overlap >= 0.97


def _attend(config: ModelConfig, name: str, own: dict[str, Tensor], x: Tensor, batch: ForwardBatch) -> Tensor:
    layout = CacheLayout.create(
        name,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        dtype=torch.float64,
    )
    planes = layout.allocate(1, 3)
    angles = rope_angles(batch.positions, rope_frequencies(config.qk_rope_head_dim, 1e4, torch.float64))
    plan = AttentionPlan.create(batch, config.index_topk)
    attention = Attention(config, layout, own)
    return attention.forward(x, planes.latent[0], planes.index[0], batch.slots, angles, plan, lambda: None)


def _common_share(scores: Tensor, choice: Tensor, other_scores: Tensor, other_choice: Tensor) -> float:
    """Share of common choices; every other one lies as near to the k-th score as its row's scores are wrong."""
    common, total = 0, 0
    for row, others, mine, theirs in zip(scores, other_scores, choice.tolist(), other_choice.tolist(), strict=True):
        chosen, picked = {at for at in mine if at >= 0}, {at for at in theirs if at >= 0}
        assert len(chosen) == len(picked)
        common, total = common + len(chosen & picked), total + len(chosen)
        if chosen != picked:
            error = (others - row)[row.isfinite()].abs().max()
            assert row[sorted(chosen)].min() - row[sorted(picked)].min() <= 2 * error
    return common / total


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown"])
def test_parameters_that_do_not_fit_are_named(
    fault: str, tiny_config: ModelConfig, random_parameters: Parameters, seed: int
) -> None:
    parameters = random_parameters(tiny_config, seed)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if fault == "missing":
        del parameters[name]
    elif fault == "shape":
        parameters[name] = parameters[name].T
    else:
        name = "model.layers.3.eh_proj.weight"
        parameters[name] = torch.zeros(1)
    layout = CacheLayout.create("exact", kv_lora_rank=128, qk_rope_head_dim=16, index_head_dim=32, dtype=torch.float32)
    with pytest.raises(InvalidArgument) as caught:
        Transformer(tiny_config, layout, parameters, LocalExperts(tiny_config.n_routed_experts))
    assert caught.value.field == name


def test_parameters_of_the_right_dtype_are_not_copied(
    tiny_config: ModelConfig, random_parameters: Parameters, seed: int, paged_run: Make
) -> None:
    parameters = random_parameters(tiny_config, seed)
    run = paged_run(tiny_config, parameters)
    before = run.logits_in_chunks([1, 2, 3], [3])
    for value in parameters.values():
        value.zero_()
    assert before.any()
    assert not run.logits_in_chunks([1, 2, 3], [3]).any()
