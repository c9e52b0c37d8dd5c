"""What one answer cost, on its way to the receipt."""

from __future__ import annotations

import time
from dataclasses import dataclass

from seamount.router.parsing import ParsedOutput
from seamount.router.receipts import Found, SessionBefore, lease_state, miss_cause
from seamount.v1 import events_pb2, worker_pb2
from seamount.wire.durations import duration


@dataclass(slots=True, kw_only=True)
class Account:
    """What the generation cost so far; becomes the receipt. ``before``: None for a stateless answer."""

    started: float
    before: SessionBefore | None = None
    num_cached: int = 0
    num_from_host: int = 0
    num_from_disk: int = 0
    num_decode_computed: int = 0
    num_prefill_computed: int = 0
    num_pulled: int = 0
    num_pushed: int = 0
    num_migrated: int = 0
    num_prepared: int = 0
    common_len: int = 0
    miss_cause: events_pb2.MissCause = events_pb2.MISS_CAUSE_UNSPECIFIED
    idle_kv_byte_seconds: float = 0.0
    lease: events_pb2.Lease | None = None
    decode_rank: str = ""
    prefill_rank: str = ""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    num_retries: int = 0

    def receipt(self, *, num_prompt: int, num_output: int) -> events_pb2.Receipt:
        """The receipt as of now."""
        remote = bool(self.prefill_rank)
        receipt = events_pb2.Receipt(
            num_prompt_tokens=num_prompt,
            num_cached_tokens=self.num_cached,
            num_host_tokens=self.num_from_host,
            num_disk_tokens=self.num_from_disk,
            num_decode_computed_tokens=self.num_decode_computed,
            num_prefill_computed_tokens=self.num_prefill_computed,
            num_pulled_tokens=self.num_pulled,
            num_pushed_tokens=self.num_pushed,
            num_migrated_tokens=self.num_migrated,
            num_prepared_tokens=self.num_prepared,
            num_output_tokens=num_output,
            path=events_pb2.PREFILL_PATH_REMOTE if remote else events_pb2.PREFILL_PATH_LOCAL,
            decode_rank=self.decode_rank,
            prefill_rank=self.prefill_rank,
            first_differing_position=self.common_len,
            queue_time=duration(self.queue_s),
            prefill_time=duration(self.prefill_s),
            time_to_first_token=duration(self.first_token_s),
            decode_time=duration(self.decode_s),
            num_retries=self.num_retries,
            miss_cause=self.miss_cause,
            transfer_time=duration(self.transfer_s),
            idle_kv_byte_seconds=self.idle_kv_byte_seconds,
            lease=self.lease,
            num_discarded_tokens=self.before.num_discarded if self.before is not None else 0,
        )
        receipt.finished_at.GetCurrentTime()
        return receipt

    def usage(self, output: ParsedOutput, *, num_prompt: int) -> events_pb2.Usage:
        """What a finished answer used."""
        return events_pb2.Usage(
            num_prompt_tokens=num_prompt,
            num_cached_tokens=self.num_cached,
            num_output_tokens=output.num_tokens,
            num_reasoning_tokens=output.num_reasoning_tokens,
        )

    def add_reservation(
        self,
        rank_id: str,
        reserved: worker_pb2.ReserveResponse,
        *,
        num_prompt: int,
        kv_bytes_per_token: int,
        last_rank_is_alive: bool,
    ) -> None:
        """A decode rank took the answer; what the first one found is what the turn found."""
        if not self.decode_rank:
            self.num_cached = reserved.cached_len
            self.num_from_host, self.num_from_disk = reserved.num_host_tokens, reserved.num_disk_tokens
            self.num_prepared = reserved.num_prepared_tokens
            self.common_len = reserved.common_len
            idle_s = reserved.idle_time.ToTimedelta().total_seconds()
            self.idle_kv_byte_seconds = reserved.cached_len * kv_bytes_per_token * idle_s
            if self.before is not None:
                found = Found(
                    rank=rank_id,
                    num_prompt=num_prompt,
                    num_cached=reserved.cached_len,
                    common_len=reserved.common_len,
                    had_left=reserved.left_len,
                )
                self.miss_cause = miss_cause(self.before, found, last_rank_is_alive=last_rank_is_alive)
                self._add_lease(rank_id, reserved, last_rank_is_alive=last_rank_is_alive)
        self.decode_rank = rank_id

    def _add_lease(self, rank_id: str, reserved: worker_pb2.ReserveResponse, *, last_rank_is_alive: bool) -> None:
        """What became of the session's lease: a rank that should hold it and does not is another process."""
        if self.before is None or self.before.lease is None:
            return
        lease = self.lease = events_pb2.Lease()
        lease.CopyFrom(self.before.lease)
        is_here = self.before.lease.decode_rank == rank_id
        is_lost = not (reserved.is_leased if is_here else last_rank_is_alive)
        lease.state = lease_state(lease, is_lost=is_lost, now_s=time.time())
        if lease.state == events_pb2.LEASE_STATE_RANK_LOST:
            self.miss_cause = events_pb2.MISS_CAUSE_RANK_LOST

    def add_migration(self, finished: worker_pb2.MigrateFinished) -> None:
        """Pages came from another decode rank."""
        self.num_migrated += finished.num_migrated_tokens
        self.transfer_s += finished.transfer_time.ToTimedelta().total_seconds()

    def add_prefill(self, rank_id: str, finished: worker_pb2.PrefillFinished) -> None:
        """A prefill rank did its part."""
        self.prefill_rank = rank_id
        self.num_prefill_computed += finished.num_computed_tokens
        self.num_pulled += finished.num_pulled_tokens
        self.num_pushed += finished.num_pushed_tokens
        self.transfer_s += finished.transfer_time.ToTimedelta().total_seconds()
        self._add_times(finished)

    def add_decode(self, finished: worker_pb2.GenerateFinished) -> None:
        """The decode rank ended the answer."""
        self.num_decode_computed += finished.num_computed_tokens
        self.decode_s += finished.decode_time.ToTimedelta().total_seconds()
        self._add_times(finished)

    def add_cut_decode(self, *, num_computed: int, prefill_s: float, decode_s: float) -> None:
        """This router ended the answer (a stop string), before the rank could say what it cost."""
        self.num_decode_computed += num_computed
        self.prefill_s += prefill_s
        self.decode_s += decode_s

    def _add_times(self, finished: worker_pb2.PrefillFinished | worker_pb2.GenerateFinished) -> None:
        self.queue_s += finished.queue_time.ToTimedelta().total_seconds()
        self.prefill_s += finished.prefill_time.ToTimedelta().total_seconds()
