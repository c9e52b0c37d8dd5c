import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.experts.mapping import ExpertMap
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_dtype, parameter_shapes
from seamount.workers.model.random_checkpoint import write_random_checkpoint
from seamount.workers.model.weights import load_model, load_weights, model_fingerprint

VOCAB = 67


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")

    def write(name: str = "model", **options: object) -> Path:
        arguments = {"seed": seed, "geometry": "test", "vocab_size": VOCAB, "dtype": torch.float32} | options
        write_random_checkpoint(tmp_path / name, **arguments)
        return tmp_path / name

    return write


def load(path: Path, **options: object) -> dict[str, torch.Tensor]:
    config = ModelConfig.from_json(path)
    arguments = {"owned_experts": range(config.n_routed_experts), "dtype": torch.float32} | options
    return load_weights(path, config, **arguments)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_parameter_comes_as_it_was_written(checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
    path = checkpoint()
    written, weights = load_file(path / "model.safetensors"), load(path, dtype=dtype)
    assert set(weights) == set(written)
    for name, tensor in weights.items():
        assert tensor.dtype == parameter_dtype(name, dtype)
        assert torch.equal(tensor, written[name].to(tensor.dtype)), name


def test_shards_and_one_file_load_alike(checkpoint: Callable[..., Path]) -> None:
    one, many = load(checkpoint("one")), load(checkpoint("many", max_shard_bytes=200_000))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_rank_opens_no_shard_of_foreign_experts_only(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(max_shard_bytes=40_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    config = ModelConfig.from_json(path)
    mine, whole = range(4, 8), load(path)
    needed = {index[name] for name in parameter_shapes(config, mine)}
    foreign = set(index.values()) - needed
    assert foreign, "the shards are too large to tell"
    for shard in foreign:
        (path / shard).write_bytes(b"\xff" * 64)  # reading it would fail
    weights = load(path, owned_experts=mine)
    assert set(weights) == set(parameter_shapes(config, mine))
    assert all(torch.equal(weights[name], whole[name]) for name in weights)


class SecondOfTwo(LocalExperts):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.rank, self.size, self.map = 1, 2, ExpertMap(num_experts=num_experts, size=2)


def test_each_rank_holds_its_share_of_the_experts(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    config = ModelConfig.from_json(path)
    num_moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_model(path, dtype=dtype, layout_name="exact")
        half = load_model(path, dtype=dtype, layout_name="exact", experts=SecondOfTwo(config.n_routed_experts))
        assert whole.expert_bytes == num_moe_layers * config.n_routed_experts * per_expert * dtype.itemsize
        assert half.expert_bytes * 2 == whole.expert_bytes


def test_a_loaded_model_answers_with_spread_out_logits(checkpoint: Callable[..., Path]) -> None:
    model = load_model(checkpoint(), dtype=torch.float32, layout_name="fp8")
    planes = model.layout.allocate(model.config.num_hidden_layers, 2)
    batch = ForwardBatch.create([(torch.randint(VOCAB, (70,)).tolist(), 0, [1, 0])], range(70))
    logits = model.forward(batch, planes)
    assert 1 < logits.std() < 10
    assert logits.argmax(-1).unique().numel() > 10


def test_layouts_that_do_not_fit_are_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgument, match="layout"):
        load_model(checkpoint(), dtype=torch.float32, layout_name="int4")


def test_fp8_blocks_are_dequantised(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True, dtype=torch.bfloat16)
    weights = load(path)
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        names = [name for name in stored.keys() if name.endswith("_scale_inv")]  # noqa: SIM118
        assert len(names) > 40
        partial = 0
        for scale_name in names:
            name = scale_name.removesuffix("_scale_inv")
            quantized, scale = stored.get_tensor(name), stored.get_tensor(scale_name)
            out, width = quantized.shape
            partial += out % 128 > 0
            expected = torch.empty(out, width)
            for row in range(out):
                for block in range(scale.shape[1]):
                    columns = slice(block * 128, (block + 1) * 128)
                    expected[row, columns] = quantized[row, columns].float() * scale[row // 128, block]
            assert torch.equal(weights[name], expected), name
    assert partial > 5
    exact = load(checkpoint("exact"))
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert 0 < (weights[name] - exact[name]).norm() / exact[name].norm() < 0.05


def test_progress_counts_the_bytes_of_this_rank(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True)
    seen: list[tuple[str, int, int]] = []
    weights = load(path, owned_experts=range(2), progress=lambda *step: seen.append(step))
    assert [name for name, _, _ in seen] == list(weights)
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys()) & (set(weights) | {f"{name}_scale_inv" for name in weights})
        tensors = [stored.get_tensor(name) for name in names]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert {step[2] for step in seen} == {total}
    assert [step[1] for step in seen] == sorted({step[1] for step in seen})
    assert seen[-1][1] == total


def test_weights_do_not_follow_the_file(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    weights = load(path)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    size = (path / "model.safetensors").stat().st_size
    with (path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


DAMAGED = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        (lambda t: t.pop(DAMAGED), "MISSING_TENSOR", [DAMAGED]),
        (lambda t: t.update({DAMAGED: torch.zeros(48, 95)}), "WRONG_SHAPE", [DAMAGED, "[48, 95]", "[48, 96]"]),
        (lambda t: t.update({DAMAGED: torch.zeros(48 * 96)}), "WRONG_SHAPE", [DAMAGED, "[4608]", "[48, 96]"]),
        (lambda t: t.update({DAMAGED: t[DAMAGED].int()}), "WRONG_DTYPE", [DAMAGED, "I32"]),
        (lambda t: t.update({DAMAGED: t[DAMAGED].to(torch.float8_e4m3fn)}), "WRONG_DTYPE", [DAMAGED, "_scale_inv"]),
        (lambda t: t.update({DAMAGED + "_scale_inv": torch.ones(1, 1)}), "WRONG_DTYPE", [DAMAGED]),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.zeros(2)}),
            "UNEXPECTED_TENSOR",
            ["experts.8"],
        ),
        (lambda t: t.update({"visual.patch.weight": torch.zeros(2)}), "UNEXPECTED_TENSOR", ["visual.patch.weight"]),
    ],
)
def test_wrong_tensors_are_named(
    checkpoint: Callable[..., Path],
    change: Callable[[dict[str, torch.Tensor]], None],
    reason: str,
    told: list[str],
) -> None:
    path = checkpoint()
    rewrite(path, change)
    with pytest.raises(InvalidArgument) as caught:
        load(path)
    assert (caught.value.reason, caught.value.field) == (reason, "model_path")
    assert all(part in caught.value.message for part in told), caught.value.message


def test_a_scale_of_the_wrong_shape_is_named(checkpoint: Callable[..., Path]) -> None:
    path, name = checkpoint(fp8=True), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    with pytest.raises(InvalidArgument, match=r"weight_scale_inv is stored with shape \[1, 1\].*\[2, 1\]"):
        load(path)


def test_layers_for_multi_token_prediction_are_left_out(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    extra = [
        "model.layers.3.eh_proj.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    ]
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(3) for name in extra}))
    assert not set(extra) & set(load(path))


def test_bad_files_are_typed_errors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def refused(path: Path) -> None:
        with pytest.raises(InvalidArgument) as caught:
            load(path)
        assert caught.value.reason == "BAD_CHECKPOINT", caught.value

    path = checkpoint()
    whole = (path / "model.safetensors").read_bytes()
    for content in (b"", whole[:7], whole[:500], b"\xff" * 100, whole[:-1]):
        (path / "model.safetensors").write_bytes(content)
        refused(path)
    (path / "model.safetensors").unlink()
    refused(path)
    for weight_map in ({"lm_head.weight": "../secret.safetensors"}, {"lm_head.weight": "gone.safetensors"}, [1]):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused(path)


def test_fingerprints_tell_models_apart(checkpoint: Callable[..., Path]) -> None:
    path, copy = checkpoint("one"), checkpoint("copy")
    first = model_fingerprint(path)
    assert first == model_fingerprint(copy)
    assert len(bytes.fromhex(first)) == 32
    assert model_fingerprint(checkpoint("other", seed=5)) != first
    assert model_fingerprint(checkpoint("halved", max_shard_bytes=1 << 20)) != first
    rewrite(copy, lambda tensors: [tensor.mul_(1.001) for tensor in tensors.values()])
    retrained = model_fingerprint(copy)  # same names, shapes and sizes
    rewrite(copy, lambda tensors: [tensor.mul_(1.001) for tensor in tensors.values()])
    assert len({first, retrained, model_fingerprint(copy)}) == 3
    config = path / "config.json"
    config.write_text(config.read_text().replace('"index_topk": 16', '"index_topk": 17'))
    assert model_fingerprint(path) != first
