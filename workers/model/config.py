"""What a model's Hugging Face ``config.json`` says, checked: facts of the model, no choices of the deployment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seamount.wire.errors import InvalidArgument

ARCHITECTURE = "DeepseekV32ForCausalLM"

# The values of the published architecture that this forward pass implements; any other is refused, never ignored.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v32",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "indexer_rope_interleave": (False,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Yarn's stretching of the rotary frequencies; it holds at every length, not only beyond the original one.

    mscale, mscale_all_dim: None where config.json lacks them (amplitude and softmax factors then differ, see
    ``ModelConfig.softmax_scale``).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one DeepSeek-V3.2 model, named as in ``config.json``.

    ``index_topk``: tokens that a query attends to; a value beyond every context switches selection off.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    yarn: YarnConfig | None
    bos_token_id: int
    eos_token_id: int

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise _wrong(name, f"{getattr(self, name)}", "at least 1")
        if self.qk_rope_head_dim % 2:
            raise _wrong("qk_rope_head_dim", f"{self.qk_rope_head_dim}", "even: rotary dimensions come in pairs")
        if self.qk_rope_head_dim > self.index_head_dim:
            raise _wrong(
                "qk_rope_head_dim", f"{self.qk_rope_head_dim}", f"at most index_head_dim {self.index_head_dim}"
            )
        if self.index_head_dim & (self.index_head_dim - 1):
            raise _wrong("index_head_dim", f"{self.index_head_dim}", "a power of two for the Hadamard transform")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            limit = f"between 0 and num_hidden_layers {self.num_hidden_layers}"
            raise _wrong("first_k_dense_replace", f"{self.first_k_dense_replace}", limit)
        self._check_experts()

    def _check_experts(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise _wrong("n_group", f"{self.n_group}", f"a divisor of n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise _wrong("topk_group", f"{self.topk_group}", f"at most n_group {self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            limit = f"at most {reachable}, the experts in topk_group groups"
            raise _wrong("num_experts_per_tok", f"{self.num_experts_per_tok}", limit)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_amplitude(self) -> float:
        """The factor on cos and sin: mscale(mscale) / mscale(mscale_all_dim), 1 for the published model."""
        if self.yarn is None:
            return 1.0
        if self.yarn.mscale and self.yarn.mscale_all_dim:
            return self._mscale(self.yarn.mscale) / self._mscale(self.yarn.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def softmax_scale(self) -> float:
        """``qk_head_dim^-0.5 m^2`` with yarn's m of mscale_all_dim; without that key m is 1. Not for the indexer."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return float(self.qk_head_dim**-0.5)
        return float(self.qk_head_dim**-0.5 * self._mscale(self.yarn.mscale_all_dim) ** 2)

    def _mscale(self, mscale: float) -> float:
        """Yarn's attention factor ``0.1 mscale ln(factor) + 1``; 1 where nothing is stretched."""
        if self.yarn is None or self.yarn.factor <= 1:
            return 1.0
        return 0.1 * mscale * math.log(self.yarn.factor) + 1.0

    def is_dense(self, layer: int) -> bool:
        """Whether the layer has one plain MLP instead of experts."""
        return layer < self.first_k_dense_replace

    @staticmethod
    def from_json(path: Path) -> ModelConfig:
        """Reads ``config.json`` (the file, or the folder that holds it).

        Raises InvalidArgument for a missing or malformed file, another architecture, a missing or unsupported value.
        """
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"cannot read {path}: {error}; give a Hugging Face model folder", field="model_path"
            ) from error
        if not isinstance(raw, dict):
            raise InvalidArgument(f"{path} does not hold a JSON object", field="model_path")
        return ModelConfig.from_mapping(raw)

    @staticmethod
    def from_mapping(raw: Mapping[str, Any]) -> ModelConfig:
        """The same from the parsed object; unknown keys are metadata of other tools and stay unread."""
        if raw.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE] or "model_type" not in raw:
            raise InvalidArgument(
                f"architecture {raw.get('architectures')} is not served; only {ARCHITECTURE} with model_type "
                "deepseek_v32 is",
                field="architectures",
            )
        for key, allowed in _FIXED.items():
            if key in raw and raw[key] not in allowed:
                raise _wrong(key, repr(raw[key]), f"{allowed[0]!r}: nothing else is implemented")
        theta, yarn = _read_rope(raw)
        values: dict[str, Any] = {name: _number(raw, name, int) for name in _POSITIVE}
        return ModelConfig(
            **values,
            n_shared_experts=_number(raw, "n_shared_experts", int),
            first_k_dense_replace=_number(raw, "first_k_dense_replace", int),
            norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
            routed_scaling_factor=_number(raw, "routed_scaling_factor", float),
            rms_norm_eps=_number(raw, "rms_norm_eps", float),
            rope_theta=theta,
            yarn=yarn,
            bos_token_id=_token_id(raw, "bos_token_id", 0),
            eos_token_id=_token_id(raw, "eos_token_id", 1),
        )


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)


def _wrong(field: str, value: str, limit: str) -> InvalidArgument:
    return InvalidArgument(f"{field} in config.json is {value}; it must be {limit}", field=field)


def _number(raw: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        name = "an integer" if kind is int else "a number"
        raise _wrong(key, "missing" if value is None else repr(value), name)
    return kind(value)


def _token_id(raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(key, repr(value), "one token id")
    return value


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    # Published files have rope_theta beside rope_scaling; transformers 5 writes both into rope_parameters.
    merged = {"rope_theta": raw.get("rope_theta", 10000.0)} | dict(
        raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    )
    theta = float(_number(merged, "rope_theta", float))
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise _wrong("rope_scaling.type", repr(kind), "'yarn' or absent")
    for key in ("attention_factor", "truncate"):
        if merged.get(key) is not None and merged[key] is not True:
            raise _wrong(f"rope_scaling.{key}", repr(merged[key]), "absent: nothing else is implemented")
    return theta, YarnConfig(
        factor=_number(merged, "factor", float),
        original_max_position_embeddings=_number(merged, "original_max_position_embeddings", int),
        beta_fast=float(merged.get("beta_fast") or 32),
        beta_slow=float(merged.get("beta_slow") or 1),
        mscale=merged.get("mscale"),
        mscale_all_dim=merged.get("mscale_all_dim"),
    )
