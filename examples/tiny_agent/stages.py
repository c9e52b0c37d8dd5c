"""The stages of training: what each one trains, on what, for how long, with which learning rates."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from examples.tiny_agent.config import DENSE_LENGTH, MAX_POSITION
from examples.tiny_agent.documents import LONG, SHORT, Mixture
from examples.tiny_agent.model import Model

BALANCE_SPEED = 0.001
"""Step of the gates' bias towards equal loads (DeepSeek-V3, 2.1.2)."""


class Kind(enum.Enum):
    """DENSE: the whole model but the indexers, which dense attention does not need. INDEXER: the indexers alone,
    towards the attention of the frozen model. SPARSE: everything, over selected tokens."""

    DENSE = "dense"
    INDEXER = "indexer"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """steps: of the whole stage, however many runs it takes. decay_share: of the stage, at the end, over which the
    learning rates fall linearly to a tenth; before it they stay. A run starts with ``warm_up`` rising steps, because
    moments are not saved. mtp_weight: of the prediction of the token after the next; 0 leaves its layer as it is, which
    takes a fifth less time."""

    name: str
    kind: Kind
    mixture: Mixture
    sequence_length: int
    batch_size: int
    steps: int
    matrix_lr: float
    other_lr: float
    warm_up: int
    decay_share: float
    mtp_weight: float

    @property
    def batch_tokens(self) -> int:
        return self.sequence_length * self.batch_size

    def lr_factor(self, progress: float, step_of_run: int) -> float:
        """progress: share of the stage that is behind, from 0 to 1; step_of_run: steps since this run began."""
        left = (1 - progress) / max(1 / self.steps, self.decay_share)
        return min(1.0, (step_of_run + 1) / self.warm_up) * max(0.1, min(1.0, left))


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            Stage(
                name="dense",
                kind=Kind.DENSE,
                mixture=SHORT,
                sequence_length=DENSE_LENGTH,
                batch_size=64,
                steps=3_600,
                matrix_lr=3e-3,
                other_lr=5e-3,
                warm_up=150,
                decay_share=0.0,
                mtp_weight=0.0,
            ),
            # The learning rates fall, and the multi-token prediction layer joins.
            Stage(
                name="anneal",
                kind=Kind.DENSE,
                mixture=SHORT,
                sequence_length=DENSE_LENGTH,
                batch_size=64,
                steps=2_800,
                matrix_lr=3e-3,
                other_lr=4e-3,
                warm_up=50,
                decay_share=1.0,
                mtp_weight=0.3,
            ),
            # Positions beyond those of the first stages, before the indexers imitate what is attended to there.
            Stage(
                name="long",
                kind=Kind.DENSE,
                mixture=LONG,
                sequence_length=MAX_POSITION,
                batch_size=8,
                steps=480,
                matrix_lr=1e-3,
                other_lr=2e-3,
                warm_up=30,
                decay_share=0.8,
                mtp_weight=0.1,
            ),
            # The published learning rate.
            Stage(
                name="indexer",
                kind=Kind.INDEXER,
                mixture=LONG,
                sequence_length=MAX_POSITION,
                batch_size=8,
                steps=280,
                matrix_lr=1e-3,
                other_lr=1e-3,
                warm_up=20,
                decay_share=0.5,
                mtp_weight=0.0,
            ),
            # Most of what selection changes shows in short sequences, where a step takes a third of the time.
            Stage(
                name="sparse",
                kind=Kind.SPARSE,
                mixture=SHORT,
                sequence_length=DENSE_LENGTH,
                batch_size=64,
                steps=400,
                matrix_lr=6e-4,
                other_lr=1.2e-3,
                warm_up=30,
                decay_share=0.8,
                mtp_weight=0.1,
            ),
            Stage(
                name="sparse_long",
                kind=Kind.SPARSE,
                mixture=LONG,
                sequence_length=MAX_POSITION,
                batch_size=8,
                steps=140,
                matrix_lr=4e-4,
                other_lr=8e-4,
                warm_up=30,
                decay_share=0.8,
                mtp_weight=0.1,
            ),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Trained:
    """matrices go to Muon, others to AdamW; the indexers go to AdamW altogether."""

    matrices: list[nn.Parameter]
    others: list[nn.Parameter]


def trained_parameters(model: Model, kind: Kind, *, mtp: bool) -> Trained:
    """What a stage of a kind trains; all other parameters keep ``requires_grad`` False from here on.

    mtp: the multi-token prediction layer, too.
    """
    trained = Trained([], [])
    for name, parameter in model.named_parameters():
        indexer = ".indexer." in name
        wanted = kind is Kind.SPARSE or indexer == (kind is Kind.INDEXER)
        parameter.requires_grad_(wanted and (mtp or not name.startswith("mtp.")))
        if not parameter.requires_grad:
            continue
        # Muon is for matrices between hidden states; an embedding's rows are no directions of one map.
        inner = parameter.dim() >= 2 and name not in ("embed_tokens", "lm_head") and not name.endswith(".gate")
        (trained.matrices if inner and not indexer else trained.others).append(parameter)
    return trained
