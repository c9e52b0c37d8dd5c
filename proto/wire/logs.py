"""One JSON object a line, the same from every process. Ids and figures only: never prompts, tokens or secrets.

``logger.info("rank_ready", extra={"rank_id": …})``: the message is a constant event name, what varies stands in
``extra``.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from typing import TextIO

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "part", "event", …extra, "error", "at"}``.

    An exception is shown as its type and the places it passed through; its text is left out, for it may quote input.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "part": record.name,
            "event": record.getMessage(),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _OWN_FIELDS}
        line |= {key: value for key, value in extra.items() if not key.startswith("_")}  # Ray adds some of its own
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        return json.dumps(line, default=str)


def configure(*, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of ``seamount`` to ``stream`` (None = standard error) as JSON lines; once, at a process's start."""
    out = logging.StreamHandler(stream or sys.stderr)
    out.setFormatter(JsonFormatter())
    root = logging.getLogger("seamount")
    root.handlers[:] = [out]
    root.setLevel(level)
    root.propagate = False
