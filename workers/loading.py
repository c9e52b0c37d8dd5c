"""How far a rank is with reading its weights: told to whoever watches, and logged now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
_LOG_EVERY = 0.1

OnLoading = Callable[[int, int], None]
"""Bytes read and bytes to read, of this rank's share of the checkpoint; called on the loading thread."""


class LoadingProgress:
    """What ``load_model`` reports, thinned out: ``on_loading`` hears each new percent, the log each new tenth."""

    def __init__(self, on_loading: OnLoading | None) -> None:
        self._on_loading = on_loading
        self._percent = -1
        self._logged = 0.0

    def __call__(self, name: str, num_bytes_done: int, num_bytes_total: int) -> None:
        share = num_bytes_done / max(1, num_bytes_total)
        if self._on_loading is not None and int(share * 100) > self._percent:
            self._percent = int(share * 100)
            self._on_loading(num_bytes_done, num_bytes_total)
        if share >= self._logged + _LOG_EVERY:
            self._logged = share
            _LOG.info("weights_loading", extra={"num_bytes": num_bytes_done, "num_bytes_total": num_bytes_total})
