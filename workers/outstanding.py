"""The requests that are in the engine, and what their sinks hear."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from seamount.wire.errors import SeamountError
from seamount.workers.computation import Outcome
from seamount.workers.engine_counts import EngineCounts
from seamount.workers.events import Failed, Finished, Progress
from seamount.workers.inbox import Inbox
from seamount.workers.schedule import Chunk
from seamount.workers.scheduler import Scheduler
from seamount.workers.sequence import Sequence

_LOG = logging.getLogger(__name__)
_HEARD_S = 0.005
"""What the word that a suspect enters the batch gets to leave this process."""


class Outstanding:
    """From the inbox to the last event. On the engine's thread, while there is one. abort: ends a request whose sink
    fails."""

    def __init__(
        self, *, scheduler: Scheduler, inbox: Inbox, counts: EngineCounts, abort: Callable[[str], None]
    ) -> None:
        self._scheduler, self._inbox, self._counts, self._abort = scheduler, inbox, counts, abort
        self._sequences: dict[str, Sequence] = {}
        self._batch: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[str]:
        """Their ids."""
        return iter(self._sequences)

    def take(self) -> None:
        """What was submitted since the last time goes to the scheduler; what was aborted ends."""
        news = self._inbox.take()
        for sequence in news.submitted:
            self._sequences[sequence.request.id] = sequence
            self._scheduler.add(sequence)
        aborted = (self._sequences[request_id] for request_id in news.aborted if request_id in self._sequences)
        self.cancel(aborted)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        now = time.monotonic()
        self.deliver((sequence, sequence.finished("cancelled", now)) for sequence in sequences)

    def tell_batch(self, chunks: tuple[Chunk, ...]) -> None:
        """Tell who is in the batch from now on and who no longer, before it is computed: if this rank dies of it, its
        own batch is known."""
        batch = {chunk.sequence for chunk in chunks}
        changed = [s for s in batch ^ self._batch if s.request.id in self._sequences]
        self._batch = batch
        self.deliver([(s, Progress(num_computed=s.num_computed, in_batch=s in batch)) for s in changed])
        if any(s.is_on_probation for s in changed):
            time.sleep(_HEARD_S)

    def deliver(self, outcomes: Iterable[Outcome]) -> None:
        """Tell each sink; the last event of a sequence takes it out of the engine first."""
        for sequence, event in outcomes:
            request = sequence.request
            if isinstance(event, Finished | Failed):
                if isinstance(event, Finished):
                    self._counts.finished(sequence, event)
                else:
                    self._counts.num_failed += 1
                self._scheduler.remove(sequence)
                self._sequences.pop(request.id, None)
                self._inbox.forget(request.id)
            try:
                request.sink(event)
            except Exception:
                _LOG.exception("sink_failed", extra={"request_id": request.id})
                self._abort(request.id)

    def fail_all(self, error: SeamountError, *, refuse: bool = True) -> None:
        """Fail every request in the engine and, with ``refuse``, all that are waiting to enter it or come later."""
        if refuse:
            self._inbox.close(error)
            for sequence in self._inbox.take().submitted:
                self._sequences[sequence.request.id] = sequence
        self.deliver([(sequence, Failed(error=error)) for sequence in self._sequences.values()])
