"""Settings of scaling and draining, and the ``Slo`` that they make."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seamount.cluster.load import Limits, Slo
from seamount.cluster.section import Section, contradiction


class PrefillRange(Section):
    min_gangs: int = Field(default=0, ge=0, description="0 = none where decode gangs can append all that comes")
    max_gangs: int = Field(default=1, ge=0, description="0 = decode gangs compute every prompt")


class DecodeRange(Section):
    min_gangs: int = Field(default=1, ge=1, description="At least one: sessions live there")
    max_gangs: int = Field(default=1, ge=1, description="Of the decode pool")


class RouterRange(Section):
    min_replicas: int = Field(default=1, ge=1, description="Two or more: one may go without a pause for new clients")
    max_replicas: int = Field(default=1, ge=1, description="Each needs a node that has room for it")


class AutoscalingSettings(Section):
    enabled: bool = Field(default=False, description="false = always pools.*.gangs gangs, and one router")
    prefill: PrefillRange = PrefillRange()
    decode: DecodeRange = DecodeRange()
    routers: RouterRange = RouterRange()
    first_token_s: float = Field(default=2.0, gt=0, description="Target: from a turn's request to its first token")
    inter_token_s: float = Field(default=0.05, gt=0, description="Target: between two tokens of an answer")
    max_utilisation: float = Field(default=0.7, gt=0, le=1, description="Share of time that prefill gangs compute")
    append_share: float = Field(
        default=0.25, ge=0, le=1, description="Share of decode gangs' time that appended prompts may take"
    )
    max_occupancy: float = Field(
        default=0.8, gt=0, le=1, description="Share of decode gangs' pages and places that may be taken"
    )
    shrink_margin: float = Field(
        default=0.8, gt=0, lt=1, description="A gang goes where the rest stays this far below those bounds"
    )
    recover_s: float = Field(default=10.0, gt=0, description="In which a queue is to be gone once new gangs are up")
    flow_window_s: float = Field(default=120.0, gt=0, description="Over which the flow of prompts is measured")
    grow_after_s: float = Field(default=3.0, ge=0, description="How long the load must ask for more gangs")
    shrink_after_s: float = Field(
        default=300.0, gt=0, description="How long fewer must do; never shorter than a gang takes to start"
    )
    start_s: float = Field(default=120.0, gt=0, description="What a gang takes to start, until that is measured")
    streams_per_router: int = Field(default=1000, ge=1, description="Answers in the making at one router")
    cores_per_router: float = Field(default=0.7, gt=0, description="CPU seconds that one router may use each second")

    @model_validator(mode="after")
    def _ranges(self) -> AutoscalingSettings:
        for name, least, most in (
            ("prefill.max_gangs", self.prefill.min_gangs, self.prefill.max_gangs),
            ("decode.max_gangs", self.decode.min_gangs, self.decode.max_gangs),
            ("routers.max_replicas", self.routers.min_replicas, self.routers.max_replicas),
        ):
            if most < least:
                raise contradiction(
                    f"autoscaling.{name}", f"autoscaling.{name} is {most}, less than the minimum, {least}"
                )
        return self

    def slo(self, *, prefill_ranks: int, decode_ranks: int) -> Slo:
        """For gangs of so many ranks."""
        return Slo(
            prefill=Limits(
                at_least=self.prefill.min_gangs, at_most=self.prefill.max_gangs, ranks_per_gang=prefill_ranks
            ),
            decode=Limits(at_least=self.decode.min_gangs, at_most=self.decode.max_gangs, ranks_per_gang=decode_ranks),
            routers=Limits(at_least=self.routers.min_replicas, at_most=self.routers.max_replicas),
            **self.model_dump(exclude={"enabled", "prefill", "decode", "routers", "start_s"}),
        )


class DrainingSettings(Section):
    watch: Literal["none", "pods", "nodes"] = Field(
        default="none",
        description="What the fleet watches in Kubernetes to drain ahead: its pods that terminate, nodes that go, too",
    )
    turns_s: float = Field(
        default=30.0, gt=0, description="What running turns have on a gang that leaves before they go on elsewhere"
    )
    timeout_s: float = Field(
        default=120.0, gt=0, description="What a gang has to hand over its sessions before it goes all the same"
    )
    replacement_s: float = Field(
        default=60.0, ge=0, description="How long a gang on a node that is to be emptied waits for the one in its place"
    )

    @model_validator(mode="after")
    def _turns_fit(self) -> DrainingSettings:
        if self.timeout_s < self.turns_s:
            raise contradiction(
                "draining.timeout_s",
                f"draining.timeout_s is {self.timeout_s:g}, less than draining.turns_s, {self.turns_s:g}",
            )
        return self
