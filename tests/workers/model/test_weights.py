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
from seamount.workers.model.checkpoint_files import model_fingerprint
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_dtype, parameter_shapes
from seamount.workers.model.random_checkpoint import write_random_checkpoint
from seamount.workers.model.weights import load_model, load_weights

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


def merged(name: str, config: ModelConfig) -> tuple[str, slice, int | None]:
    """Where a block-scaled tensor is expected: the parameter's name, its rows, its expert."""
    inner = config.moe_intermediate_size if "experts." in name else config.intermediate_size
    rows = slice(inner, None) if ".up_proj." in name else slice(inner) if ".gate_proj." in name else slice(None)
    expert = None
    if ".experts." in name:
        expert = int(name.split(".experts.")[1].split(".")[0])
        name = name.replace(f".experts.{expert}.", ".experts.")
    return name.replace(".up_proj.", ".gate_up_proj.").replace(".gate_proj.", ".gate_up_proj."), rows, expert


def test_fp8_blocks_stay_as_stored_in_their_merged_places(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True, geometry="demo", dtype=torch.bfloat16)
    config, weights = ModelConfig.from_json(path), load(path, dtype=torch.bfloat16)
    seen = 0
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        for scale_name in [name for name in stored.keys() if name.endswith("_scale_inv")]:  # noqa: SIM118
            name = scale_name.removesuffix("_scale_inv")
            values, scale = stored.get_tensor(name), stored.get_tensor(scale_name)
            if "kv_b_proj" in name:
                continue
            target, rows, expert = merged(name, config)
            kept, kept_scale = weights[target], weights[target + "_scale_inv"]
            if expert is not None:
                kept, kept_scale = kept[expert], kept_scale[expert]
            assert kept.dtype == torch.float8_e4m3fn
            assert torch.equal(kept[rows].view(torch.uint8), values.view(torch.uint8)), name
            blocks = slice(rows.start and rows.start // 128, rows.stop and rows.stop // 128)
            assert torch.equal(kept_scale[blocks], scale), name
            seen += kept[rows].numel()
    held = [value for value in weights.values() if value.dtype == torch.float8_e4m3fn]
    assert seen == sum(value.numel() for value in held)
    assert weights["model.layers.1.mlp.experts.gate_up_proj.weight"].shape == (16, 256, 256)


def test_kv_b_proj_is_dequantised(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True)  # of this geometry nothing else fits
    weights, name = load(path), "model.layers.1.self_attn.kv_b_proj.weight"
    assert not [name for name in weights if name.endswith("_scale_inv")]
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        values, scale = stored.get_tensor(name), stored.get_tensor(f"{name}_scale_inv")
    expected = values.float() * scale.repeat_interleave(128, 0)[: values.shape[0]].repeat_interleave(128, 1)
    assert torch.equal(weights[name], expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("self_attn.q_b_proj", (16 * 96, 64)), ("mlp.experts.2.up_proj", (48, 96))],
)
def test_fp8_tensors_that_fit_no_blocks_are_named(
    checkpoint: Callable[..., Path], name: str, shape: tuple[int, int]
) -> None:
    path = checkpoint(geometry="demo" if "q_b" in name else "test")
    full = f"model.layers.1.{name}.weight"
    change = {
        full: torch.zeros(shape).to(torch.float8_e4m3fn),
        f"{full}_scale_inv": torch.ones(-(-shape[0] // 128), -(-shape[1] // 128)),
    }
    rewrite(path, lambda tensors: tensors.update(change))
    with pytest.raises(InvalidArgument, match=rf"{full}.*multiples of 128.*bfloat16") as caught:
        load(path)
    assert caught.value.reason == "BLOCKS_DO_NOT_FIT"


def test_an_mlp_in_two_forms_is_named(checkpoint: Callable[..., Path]) -> None:
    path, name = checkpoint(fp8=True, geometry="demo"), "model.layers.1.mlp.experts.2.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        del tensors[f"{name}_scale_inv"]

    rewrite(path, change)
    with pytest.raises(InvalidArgument, match=rf"{name}.*both have block scales") as caught:
        load(path)
    assert caught.value.reason == "WRONG_DTYPE"


def test_other_block_sizes_are_refused(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 128]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match="blocks"):
        load(path)


def test_progress_counts_the_bytes_of_this_rank(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(fp8=True, geometry="demo")
    seen: list[tuple[str, int, int]] = []
    weights = load(path, owned_experts=range(2), progress=lambda *step: seen.append(step))
    wanted = parameter_shapes(ModelConfig.from_json(path), range(2))
    assert [name for name, _, _ in seen] == list(wanted)
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys()) & (set(wanted) | {f"{name}_scale_inv" for name in wanted})
        total = sum(stored.get_tensor(name).nbytes for name in names)
    assert {step[2] for step in seen} == {total}
    assert [step[1] for step in seen] == sorted({step[1] for step in seen})
    assert seen[-1][1] == total
    assert sum(tensor.nbytes for tensor in weights.values()) >= total


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
    path, name = checkpoint(fp8=True, geometry="demo"), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    with pytest.raises(InvalidArgument, match=r"weight_scale_inv is stored with shape \[1, 1\].*\[5, 2\]"):
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
