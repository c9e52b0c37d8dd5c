"""Writes small random models in the real checkpoint format: for demos and tests until a trained one exists.

The scales keep a random model lively: every projection keeps the variance of its input, logits spread over several
nats, index scores differ from token to token, and the gate's bias moves some choices.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from seamount.wire.errors import AlreadyExists, InvalidArgument
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes

FP8_BLOCK = 128
"""Rows and columns of a block that shares one scale."""

_FP8_MAX = 448.0
_ARCHITECTURE: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 163840,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "use_cache": True,
    }
)
GEOMETRIES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        # The real sizes wherever a GPU kernel depends on them (latent, rope, index heads), small elsewhere.
        "demo": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 64,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
        # Awkward widths: hardly a projection is a whole number of FP8 blocks.
        "test": {
            "hidden_size": 96,
            "intermediate_size": 160,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 24,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    }
)


def random_config(
    geometry: str, *, vocab_size: int, bos_token_id: int, eos_token_id: int, dtype: torch.dtype, fp8: bool = False
) -> dict[str, object]:
    """The ``config.json`` of a geometry in ``GEOMETRIES``. Raises ``InvalidArgument`` for a name that is not there."""
    if geometry not in GEOMETRIES:
        raise InvalidArgument(f"geometry {geometry!r} is unknown; choose one of {sorted(GEOMETRIES)}", field="geometry")
    config = dict(_ARCHITECTURE) | dict(GEOMETRIES[geometry])
    config |= {"vocab_size": vocab_size, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
        }
    return dict(sorted(config.items()))


def write_random_checkpoint(
    path: Path,
    *,
    seed: int,
    geometry: str,
    vocab_size: int,
    bos_token_id: int = 0,
    eos_token_id: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    max_shard_bytes: int = 1 << 30,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``config.json``, ``generation_config.json`` and safetensors to a new folder, all or nothing.

    seed: every tensor depends on it and on its own name only. geometry: a key of ``GEOMETRIES``.
    dtype: bfloat16 or float32, of all but the gate's bias and the indexer's LayerNorm, which are float32.
    fp8: projections become e4m3 with one float32 ``weight_scale_inv`` a 128x128 block.
    max_shard_bytes: beyond it the tensors are spread over shards with an index.
    extra_files: name to content, written beside them (the tokenizer's).
    Raises ``InvalidArgument`` (geometry, dtype, a malformed size) and ``AlreadyExists`` if ``path`` exists.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise InvalidArgument(f"dtype is {dtype}; it must be bfloat16 or float32", field="dtype")
    if path.exists():
        raise AlreadyExists(f"{path} exists; choose another folder or remove it", reason="CHECKPOINT_EXISTS")
    raw = random_config(
        geometry, vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id, dtype=dtype, fp8=fp8
    )
    generation = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft.chmod(0o755)
        _write_json(draft / "config.json", raw)
        _write_json(draft / "generation_config.json", generation)
        for name, content in (extra_files or {}).items():
            (draft / name).write_bytes(content)
        _write_tensors(draft, ModelConfig.from_mapping(raw), seed, dtype, fp8, max_shard_bytes)
        os.rename(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def quantize_fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block-scaled e4m3: weight ~ fp8 * scale of its 128x128 block; the last blocks may be partial.

    weight: [out, in] float. Returns ([out, in] float8_e4m3fn, [ceil(out/128), ceil(in/128)] float32). Scales are powers
    of two, rounded up, of max(|block|, 1e-4) / 448.
    """
    rows, columns = weight.shape
    row_blocks, column_blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = torch.zeros(row_blocks * FP8_BLOCK, column_blocks * FP8_BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-4) / _FP8_MAX
    scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantized = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return quantized.contiguous().to(torch.float8_e4m3fn), scale


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path, config: ModelConfig, seed: int, dtype: torch.dtype, fp8: bool, max_shard_bytes: int
) -> None:
    shards = list(_shards(config, dtype, max_shard_bytes))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    total_size = 0
    for file_name, shapes in zip(names, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            tensors |= _stored(name, _random_tensor(name, shape, seed), dtype, fp8)
        # One metadata key: safetensors writes several in no fixed order, and equal seeds shall give equal files.
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    shard_bytes = 0
    for name, shape in parameter_shapes(config, range(config.n_routed_experts)).items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shard and shard_bytes + num_bytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = shape
        shard_bytes += num_bytes
    yield shard


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "layernorm.weight")):
        return 1.0 + 0.1 * noise
    if name.endswith(("norm.bias", "e_score_correction_bias")):
        return 0.1 * noise
    if name == "model.embed_tokens.weight":
        return noise
    scale = 3.0 if name == "lm_head.weight" else 1.0  # logits of about three nats: neither flat nor settled
    return noise * (scale / math.sqrt(shape[-1]))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype, fp8: bool) -> dict[str, Tensor]:
    if name.endswith("e_score_correction_bias") or ".k_norm." in name:
        return {name: tensor}
    if fp8 and tensor.ndim == 2 and not name.endswith(_NEVER_FP8):
        quantized, scale = quantize_fp8_blocks(tensor)
        return {name: quantized, f"{name}_scale_inv": scale}
    return {name: tensor.to(dtype)}


_NEVER_FP8 = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "weights_proj.weight")
