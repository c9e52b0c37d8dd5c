"""The trainer's parameters as a Hugging Face checkpoint, and back.

A checkpoint is also what a training run saves: bfloat16 except for the indexers' LayerNorm and the gates' bias, in
shards under 16 MiB.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.tiny_agent.config import CONFIG
from examples.tiny_agent.model import MLP, Layer, Model, MoE

MAX_SHARD_BYTES = 15 << 20
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG: Mapping[str, Any] = {
    "bos_token_id": CONFIG["bos_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
}


def checkpoint_views(model: Model) -> dict[str, Tensor]:
    """Every checkpoint tensor by name, as a view of the model's parameters: writing into it changes the model."""
    views = {
        "model.embed_tokens.weight": model.embed_tokens.data,
        "model.norm.weight": model.norm.weight.data,
        "lm_head.weight": model.lm_head.data,
    }
    for number, layer in enumerate(model.all_layers()):
        views |= {f"model.layers.{number}.{name}": tensor for name, tensor in _layer_views(layer)}
    return views


def save_checkpoint(model: Model, folder: Path, tokenizer: Path | None = None) -> None:
    """Write config.json, generation_config.json, the shards and their index; tokenizer: a folder to copy files from.

    Files of the same names are replaced, each by a rename.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards({name: _stored(name, tensor) for name, tensor in checkpoint_views(model).items()}))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / f"{file_name}.new", metadata={"format": "pt"})
        (folder / f"{file_name}.new").rename(folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / "config.json", dict(CONFIG) | {"vocab_size": model.config.vocab_size})
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    for file in sorted(tokenizer.iterdir()) if tokenizer is not None else ():
        shutil.copyfile(file, folder / file.name)


def stored_dtype(name: str) -> torch.dtype:
    """Of a parameter in a checkpoint."""
    wide = name.endswith("e_score_correction_bias") or ".k_norm." in name
    return torch.float32 if wide else torch.bfloat16


def load_checkpoint(model: Model, folder: Path) -> None:
    """Read what ``save_checkpoint`` wrote into the model. Raises ValueError where tensors are missing or misshaped."""
    index = folder / INDEX
    if not index.exists():
        raise ValueError(f"{index} does not exist; give a folder that a training run wrote")
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    stored: dict[str, Tensor] = {}
    for name in files:
        stored |= load_file(folder / Path(name).name)
    for name, view in checkpoint_views(model).items():
        if name not in stored or stored[name].shape != view.shape:
            found = list(stored[name].shape) if name in stored else "missing"
            raise ValueError(f"{name} in {folder} is {found}; this model needs {list(view.shape)}")
        view.copy_(stored[name])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
    draft.rename(path)


def _layer_views(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in layer.named_parameters():
        if not name.startswith("mlp."):
            yield name.replace("shared_head_norm", "shared_head.norm"), parameter.data
        elif isinstance(layer.mlp, MLP):
            yield name, parameter.data
    if isinstance(layer.mlp, MoE):
        yield from _moe_views(layer.mlp)


def _moe_views(moe: MoE) -> Iterator[tuple[str, Tensor]]:
    yield "mlp.gate.weight", moe.gate.data
    yield "mlp.gate.e_score_correction_bias", moe.gate_bias
    shared = moe.config.n_routed_experts
    for projection, stacked in (
        ("gate_proj", moe.experts_gate.data),
        ("up_proj", moe.experts_up.data),
        ("down_proj", moe.experts_down.data),
    ):
        yield from ((f"mlp.experts.{expert}.{projection}.weight", stacked[expert]) for expert in range(shared))
        yield f"mlp.shared_experts.{projection}.weight", stacked[shared]


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(stored_dtype(name)).contiguous()


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        if shard and num_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield shard
