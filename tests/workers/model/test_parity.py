"""The forward pass against transformers' ``DeepseekV32ForCausalLM``: logits and the selected tokens of every layer."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import indexer as index_kernels
from seamount.workers.model.config import ModelConfig

transformers = pytest.importorskip("transformers", minversion="5.23.0")

INDEX_TOPK = 16
TOLERANCE = 1e-4
MIN_MARGIN = 2e-5

pytestmark = pytest.mark.figures


def _reference(seed: int, *, index_heads: int = 32, **overrides: Any) -> Any:
    config = transformers.DeepseekV32Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_n_heads=index_heads,
        index_head_dim=128,
        index_topk=INDEX_TOPK,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        **overrides,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.DeepseekV32ForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(std=value.shape[-1] ** -0.5)
            elif name.endswith("norm.weight"):
                value.copy_(1 + 0.1 * torch.randn_like(value))
            else:
                value.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def _checkpoint_parameters(model: Any) -> dict[str, Tensor]:
    """transformers merges a layer's experts into two tensors; the checkpoint has three for each expert."""
    parameters: dict[str, Tensor] = {}
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, merged in enumerate(value.detach()):
                gate, up = merged.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                parameters |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value.detach()):
                parameters[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        elif "inv_freq" not in name:
            parameters[name] = value.detach()
    return parameters


def _config_of(model: Any, folder: Path) -> ModelConfig:
    model.config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["architectures"] = ["DeepseekV32ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_json(folder)


class Selections:
    """The sets that ``topk_indices`` returned, by layer and position, as this test sees them pass by."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.margin = float("inf")

    def clear(self) -> None:
        self.rows.clear()
        self.margin = float("inf")

    def by_layer(self, num_layers: int) -> list[dict[int, set[int]]]:
        """One sequence only: a row that sees n tokens is position n - 1. Calls repeat in layer order."""
        layers: list[dict[int, set[int]]] = [{} for _ in range(num_layers)]
        for call, (indices, lengths) in enumerate(self.rows):
            for row, length in zip(indices.tolist(), lengths.tolist(), strict=True):
                layers[call % num_layers][length - 1] = {at for at in row if at >= 0}
        return layers


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Selections:
    seen = Selections()
    choose = index_kernels.topk_indices

    def watched(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
        indices = choose(logits, k, lengths)
        best = logits[lengths > k].topk(k + 1, dim=1).values
        seen.margin = min(seen.margin, *(best[:, k - 1] - best[:, k]).tolist(), float("inf"))
        seen.rows.append((indices.clone(), lengths.clone()))
        return indices

    monkeypatch.setattr(index_kernels, "topk_indices", watched)
    return seen


def _run_reference(model: Any, token_ids: list[int]) -> tuple[Tensor, list[dict[int, set[int]]]]:
    chosen: list[Tensor] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda _m, _i, out: chosen.append(out[0].clone()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    # Rows that see fewer than top-k tokens come back filled up with tokens of the future.
    legal = [{t: {s for s in row if s <= t} for t, row in enumerate(layer.tolist())} for layer in chosen]
    return logits, legal


def _chunkings(length: int, generator: random.Random) -> Iterator[tuple[str, list[int]]]:
    yield "full", [length]
    cuts = sorted(generator.sample(range(1, length), min(5, length - 1)))
    yield "chunked", [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    yield "step by step", [1] * length


def _unambiguous_tokens(
    length: int, generator: random.Random, config: ModelConfig, make_run: Callable[..., Any], selections: Selections
) -> list[int]:
    """Random tokens for which no k-th and next score lie within float32's rounding of each other.

    A choice between such two has no right answer that two implementations could share; equal scores have their own
    test below.
    """
    for attempt in range(50):
        token_ids = [generator.randrange(config.vocab_size) for _ in range(length)]
        selections.clear()
        make_run().logits_in_chunks(token_ids, [length])
        if selections.margin > MIN_MARGIN:
            print(f"{length} tokens, draw {attempt + 1}: least distance of k-th and next score {selections.margin:.1e}")
            return token_ids
    pytest.fail("no unambiguous draw in 50: the scores are less precise than this test assumes")


@pytest.mark.parametrize("length", [1, 15, 17, 64, 65, 150])
def test_logits_and_selections_agree(
    length: int, seed: int, paged_run: Callable[..., Any], selections: Selections, tmp_path: Path
) -> None:
    reference = _reference(seed)
    config = _config_of(reference, tmp_path)
    parameters = _checkpoint_parameters(reference)
    generator = random.Random(seed)
    make_run = functools.partial(paged_run, config, parameters, dtype=torch.float32)
    token_ids = _unambiguous_tokens(length, generator, config, make_run, selections)
    expected, expected_sets = _run_reference(reference, token_ids)
    for name, chunks in _chunkings(length, generator):
        selections.clear()
        logits = make_run(seed=seed).logits_in_chunks(token_ids, chunks)
        difference = (logits - expected).abs().max().item()
        print(f"{length} tokens, {name}: max |dlogit| {difference:.2e} of {expected.abs().max().item():.2f}")
        assert difference < TOLERANCE
        actual_sets = selections.by_layer(config.num_hidden_layers)
        for layer in range(config.num_hidden_layers):
            for position, chosen in actual_sets[layer].items():
                assert chosen == expected_sets[layer][position], f"layer {layer}, position {position}"
            # Whatever was not scored lies within top-k, where the choice is everything.
            assert set(range(INDEX_TOPK, length)) <= actual_sets[layer].keys()


def test_selection_matters(seed: int, paged_run: Callable[..., Any], tmp_path: Path) -> None:
    reference = _reference(seed)
    config = _config_of(reference, tmp_path)
    parameters = _checkpoint_parameters(reference)
    generator = random.Random(seed)
    token_ids = [generator.randrange(config.vocab_size) for _ in range(8 * INDEX_TOPK)]
    sparse = paged_run(config, parameters, dtype=torch.float32).logits_in_chunks(token_ids, [len(token_ids)])
    everything = dataclasses.replace(config, index_topk=1 << 20)
    dense = paged_run(everything, parameters, dtype=torch.float32).logits_in_chunks(token_ids, [len(token_ids)])
    difference = (sparse - dense).abs().amax(dim=1)
    print(
        f"selection off: max |dlogit| within top-k {difference[:INDEX_TOPK].max():.2e}, beyond {difference.max():.2f}"
    )
    assert difference[:INDEX_TOPK].max() < TOLERANCE
    assert difference[INDEX_TOPK:].max() > 0.1


def test_ties_take_the_lowest_positions(
    seed: int, paged_run: Callable[..., Any], selections: Selections, tmp_path: Path
) -> None:
    """All head weights 0 make every score 0: then the first top-k tokens are chosen, however the prompt is cut."""
    reference = _reference(seed)
    config = _config_of(reference, tmp_path)
    parameters = _checkpoint_parameters(reference)
    for name, value in parameters.items():
        if name.endswith("weights_proj.weight"):
            value.zero_()
    generator = random.Random(seed)
    token_ids = [generator.randrange(config.vocab_size) for _ in range(70)]
    results = []
    for _, chunks in _chunkings(len(token_ids), generator):
        selections.clear()
        results.append(paged_run(config, parameters, dtype=torch.float32).logits_in_chunks(token_ids, chunks))
        for layer in selections.by_layer(config.num_hidden_layers):
            assert all(chosen == set(range(min(t + 1, INDEX_TOPK))) for t, chosen in layer.items())
    for other in results[1:]:
        assert (other - results[0]).abs().max() < TOLERANCE
