"""The gang: ranks that step together because their experts are shared out among them.

While any rank has work, all ranks meet in one small all-gather at the start of every step (``agree``). When none has,
they leave lock-step and each waits on an event of its own, with no collective open (``wait_for_work``). The first rank
with work sets one numbered key a peer in the gang's store; every rank has a thread that waits for its next number
and then wakes the loop. A gang of one has no group, no store and no thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed import DistStoreError

from seamount.wire.errors import InvalidArgument, SeamountError, Unavailable
from seamount.wire.ids import GangId

_LOG = logging.getLogger(__name__)
_WATCH_SLICE_S = 3600.0
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHeader:
    """What a rank tells the others before a step.

    num_decode_tokens: rows that will sample; num_prefill_tokens: prompt rows it would like to compute;
    num_background_tokens: those that give way to any other work of the gang; stop: it wants to leave, and steps on
    without work until all do.
    """

    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_background_tokens: int = 0
    stop: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens

    @property
    def has_work(self) -> bool:
        return self.num_tokens + self.num_background_tokens > 0


class Gang:
    """One rank's membership. ``agree``, ``wait_for_work`` and the group's collectives belong to the engine's thread;
    ``ring`` and ``close`` may be called from any."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        gang_id: GangId,
        group: ProcessGroupGloo | None = None,
        store: TCPStore | None = None,
        watch_store: TCPStore | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.rank = rank
        self.size = size
        self.gang_id = gang_id
        self.timeout_s = timeout_s
        self._group = group
        self._store = store
        self._news = threading.Event()
        self._period = 0  # idle periods that this rank has left
        self._num_rung = 0  # idle periods that some peer has ended
        self._failure: SeamountError | None = None
        self._closed = False
        self._close_lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        if watch_store is not None:
            name = f"gang-watch-{rank}"
            self._watcher = threading.Thread(target=self._watch, args=(watch_store,), name=name, daemon=True)
            self._watcher.start()

    @staticmethod
    def alone(gang_id: str = "alone") -> Gang:
        """A gang of one: every call is local."""
        return Gang(rank=0, size=1, gang_id=GangId(gang_id))

    @staticmethod
    def join(
        *,
        store_host: str,
        store_port: int,
        gang_id: str,
        rank: int,
        size: int,
        timeout_s: float,
        host_store: bool,
        bind_host: str = "127.0.0.1",
        join_timeout_s: float = 60.0,
        on_listening: Callable[[int], None] | None = None,
    ) -> Gang:
        """Meet the other ranks at the store and connect to each of them.

        store_host, store_port: where the gang's store listens; with ``host_store`` this rank opens it there (port 0 =
        any free one) and tells ``on_listening`` the port before it waits for the others. gang_id: prefix of all keys,
        new for every gang. timeout_s: of every collective; a peer silent for longer is dead. join_timeout_s: how long
        to wait for the others to start. bind_host: address of this rank that its peers connect to; nothing listens
        anywhere else.
        Raises InvalidArgument for a rank outside ``0 <= rank < size``; Unavailable if the others do not come in time.
        """
        if not 0 <= rank < size:
            raise InvalidArgument(f"rank is {rank}; it must be at least 0 and below size {size}", field="rank")
        if size == 1:
            return Gang.alone(gang_id)
        timeout = timedelta(seconds=join_timeout_s)
        try:
            server = _open_store(store_host, store_port, timeout) if host_store else None
            port = server.port if server is not None else store_port
            if server is not None and on_listening is not None:
                on_listening(port)
            store = server or _connect(store_host, port, timeout)
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
            options._timeout = timeout
            options._devices = [ProcessGroupGloo.create_device(hostname=bind_host)]
            group = ProcessGroupGloo(PrefixStore(f"{gang_id}/group", store), rank, size, options)
            group._set_default_timeout(timedelta(seconds=timeout_s))
            watch_store = _connect(store_host, port, timeout)
        except (RuntimeError, OSError) as error:
            raise Unavailable(
                f"rank {rank} of {size} could not join gang {gang_id} in {join_timeout_s:g} s: {_first_line(error)}",
                reason="GANG_NOT_FORMED",
                retry_after_s=1.0,
            ) from error
        return Gang(
            rank=rank,
            size=size,
            gang_id=GangId(gang_id),
            group=group,
            store=store,
            watch_store=watch_store,
            timeout_s=timeout_s,
        )

    @property
    def group(self) -> ProcessGroupGloo | None:
        """For the collectives of the step; None in a gang of one and after ``close``."""
        return self._group

    @contextlib.contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        """Collectives have until ``timeout_s`` for a while, and then ``self.timeout_s`` again. All ranks, or none."""
        if self._group is None:
            yield
            return
        self._group._set_default_timeout(timedelta(seconds=timeout_s))
        try:
            yield
        finally:
            if self._group is not None:
                self._group._set_default_timeout(timedelta(seconds=self.timeout_s))

    def agree(self, header: StepHeader) -> list[StepHeader]:
        """All ranks' headers in rank order; one all-gather of four numbers a rank.

        Raises Unavailable once a peer is dead (at once) or silent (after ``timeout_s``): the gang is lost then.
        """
        if self.size == 1:
            return [header]
        if self._group is None:
            raise Unavailable("this rank has left its gang", reason="GANG_CLOSED", retry_after_s=1.0)
        numbers = (header.num_decode_tokens, header.num_prefill_tokens, header.num_background_tokens, int(header.stop))
        mine = torch.tensor(numbers, dtype=torch.int64)
        everyone = torch.empty(self.size, len(numbers), dtype=torch.int64)
        try:
            self._group.allgather([list(everyone.unbind())], [mine]).wait()  # type: ignore[attr-defined]  # missing in torch's stubs
        except RuntimeError as error:
            raise self._lost(error) from error
        return [
            StepHeader(num_decode_tokens=d, num_prefill_tokens=p, num_background_tokens=b, stop=bool(s))
            for d, p, b, s in everyone.tolist()
        ]

    def ring(self) -> None:
        """This rank has news for its loop (work, an abort, a stop): end the idle period, here and at every peer."""
        self._news.set()

    def hush(self) -> None:
        """Forget earlier rings. Call it before looking at the news, so that what comes later still rings."""
        self._news.clear()

    def wait_for_work(self, timeout_s: float) -> bool:
        """Idle, outside lock-step, until this rank or a peer rings: True, and all ranks meet in ``agree`` next.

        False after ``timeout_s`` without either; the idle period then goes on. Raises Unavailable if the store is gone.
        """
        if self._num_rung <= self._period:
            self._news.wait(timeout_s)
        if self._failure is not None:
            raise self._failure
        rung_by_peer = self._num_rung > self._period
        if not (rung_by_peer or self._news.is_set()):
            return False
        self._news.clear()
        self._period += 1
        if not rung_by_peer:
            self._wake_all(self._period - 1)
        return True

    def close(self) -> None:
        """Leave: drop the group (a peer in a collective then fails at once) and end the watching thread. Idempotent."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        self._news.set()
        if self._watcher is not None and self._store is not None and self._watcher is not threading.current_thread():
            for _ in range(20):  # the watcher may just be moving on to its next number
                with contextlib.suppress(RuntimeError):
                    self._store.set(self._wake_key(self.rank, self._num_rung), "1")
                self._watcher.join(_CLOSE_TIMEOUT_S / 20)
                if not self._watcher.is_alive():
                    break
        self._group = None
        self._store = None

    def _wake_all(self, number: int) -> None:
        """Every rank's own key, this one's too: all watchers count all idle periods."""
        if self._store is None:
            return
        try:
            self._store.multi_set(  # type: ignore[attr-defined]  # missing in torch's stubs
                [self._wake_key(rank, number) for rank in range(self.size)], ["1"] * self.size
            )
        except RuntimeError as error:
            raise self._lost(error) from error

    def _watch(self, store: TCPStore) -> None:
        """Wait for this rank's next wake number, with a store client of this thread's own."""
        while not self._closed:
            number = self._num_rung
            try:
                store.wait([self._wake_key(self.rank, number)], timedelta(seconds=_WATCH_SLICE_S))
                if number > 0:  # nobody sets the number before: its ringers have met us in a step since
                    store.delete_key(self._wake_key(self.rank, number - 1))
            except DistStoreError as error:
                if "timeout" in str(error):
                    continue
                self._failure = self._lost(error)
            except RuntimeError as error:
                self._failure = self._lost(error)
            if self._failure is not None:
                self._news.set()
                return
            self._num_rung = number + 1
            if self._num_rung > self._period:
                self._news.set()

    def _wake_key(self, rank: int, number: int) -> str:
        return f"{self.gang_id}/wake/{rank}/{number}"

    def _lost(self, error: Exception) -> Unavailable:
        if not self._closed:
            _LOG.error("gang_lost", extra={"gang_id": self.gang_id, "rank": self.rank, "cause": _first_line(error)})
        return Unavailable(
            f"gang {self.gang_id} lost a rank: {_first_line(error)}", reason="GANG_LOST", retry_after_s=5.0
        )


def _open_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """A store that listens on ``host`` only; left to itself it would listen on every address."""
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound_port = listener.getsockname()[1]
    return TCPStore(host, bound_port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _connect(host: str, port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(host, port, None, False, timeout, wait_for_workers=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
