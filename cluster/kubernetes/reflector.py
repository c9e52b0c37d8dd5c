"""One resource of the API server as it is now: listed once, then followed by a watch, on a thread of its own.

A watch that ends or breaks goes on where it stood. Where the server has forgotten that version (410) everything is
listed again. Failures are repeated with growing pauses; meanwhile the last known objects stand, and ``is_current`` is
false.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_when_event_set, wait_random_exponential
from tenacity.nap import sleep_using_event

from seamount.cluster.kubernetes.api import Change, KubernetesApi, Selection
from seamount.cluster.kubernetes.errors import GONE
from seamount.wire.errors import PermissionDenied, SeamountError, Unauthenticated, Unavailable

_LOG = logging.getLogger("seamount.kubernetes")
MAX_PAUSE_S = 30.0
_SHORTEST_WATCH_S = 1.0
"""One that ends sooner and said nothing counts as failed: the next begins after a pause."""
_T = TypeVar("_T")


class Reflector(Generic[_T]):
    """``start`` once, ``stop`` at the end. view: what is kept of an object, by its uid.

    on_change: called after the listing and after each change. on_restart: told why a watch had to begin anew: ``gone``,
    ``dropped`` or ``refused``. All on the reflector's thread.
    """

    def __init__(
        self,
        api: KubernetesApi,
        selection: Selection,
        view: Callable[[Any], _T],
        *,
        on_change: Callable[[], None],
        on_restart: Callable[[str], None],
        max_pause_s: float = MAX_PAUSE_S,
    ) -> None:
        self._api, self._selection, self._view = api, selection, view
        self._on_change, self._on_restart, self._max_pause_s = on_change, on_restart, max_pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards the four that follow
        self._seen: dict[str, _T] = {}
        self._is_current = False
        self._error: SeamountError | None = None
        self._watch: Any = None
        self._version = ""
        self._thread = threading.Thread(target=self._run, name=f"watch {selection.kind}", daemon=True)

    @property
    def objects(self) -> list[_T]:
        """The last known ones."""
        with self._lock:
            return list(self._seen.values())

    @property
    def is_current(self) -> bool:
        """Whether everything was listed and a watch stands, as far as anyone knows."""
        with self._lock:
            return self._is_current

    @property
    def error(self) -> SeamountError | None:
        """What the last attempt failed with; None while it works."""
        with self._lock:
            return self._error

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the watch and the thread."""
        self._stop.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.stop()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            retrying = Retrying(
                retry=retry_if_exception_type(SeamountError),
                wait=wait_random_exponential(multiplier=0.1, max=self._max_pause_s),
                stop=stop_when_event_set(self._stop),
                sleep=sleep_using_event(self._stop),
            )
            try:
                retrying(self._follow)
            except Exception:
                if not self._stop.is_set():
                    _LOG.exception("watch_failed", extra={"resource": self._selection.kind})
                    self._stop.wait(self._max_pause_s)

    def _follow(self) -> None:
        """List where nothing is known to go on from, then watch until it ends. Returns after progress: the next one
        begins without a pause. Raises what failed before any."""
        has_progress, began = False, time.monotonic()
        try:
            if not self._version:
                self._list()
                has_progress = True
            for change in self._changes():
                has_progress = True
                self._take(change)
                if self._stop.is_set():
                    return
            if not has_progress and time.monotonic() - began < _SHORTEST_WATCH_S:
                raise Unavailable("the API server ended the watch at once", reason="WATCH_ENDED")
        except SeamountError as error:
            if not self._stop.is_set():
                self._note(error)
                if not has_progress or error.reason == GONE:
                    raise

    def _list(self) -> None:
        listing = self._api.listing(self._selection)
        seen = {item.metadata.uid: self._view(item) for item in listing.items}
        with self._lock:
            self._seen, self._is_current, self._error = seen, True, None
        self._version = listing.version
        self._on_change()

    def _changes(self) -> Any:
        watch = self._api.watch(self._selection)
        with self._lock:
            self._watch = watch
        return self._api.changes(self._selection, self._version, watch)

    def _take(self, change: Change) -> None:
        self._version = change.version
        with self._lock:
            self._is_current, self._error = True, None
            if change.kind == "DELETED":
                self._seen.pop(change.item.metadata.uid, None)
            elif change.item is not None:
                self._seen[change.item.metadata.uid] = self._view(change.item)
        if change.item is not None:
            self._on_change()

    def _note(self, error: SeamountError) -> None:
        is_refused = isinstance(error, PermissionDenied | Unauthenticated)
        cause = "gone" if error.reason == GONE else "refused" if is_refused else "dropped"
        with self._lock:
            self._is_current, self._error = False, error
        if error.reason == GONE:
            self._version = ""
        level = logging.ERROR if is_refused else logging.INFO
        extra = {"resource": self._selection.kind, "cause": cause, "remedy": error.message}
        _LOG.log(level, "watch_refused" if is_refused else "watch_restarted", extra=extra)
        self._on_restart(cause)
