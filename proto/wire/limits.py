"""The one table of bounds on what comes from outside. Each is tested on both sides."""

from __future__ import annotations

import math
from collections.abc import Sized

from seamount.wire.errors import InvalidArgument

MAX_MESSAGE_BYTES = 16 << 20
MAX_CONTENT_BYTES = 8 << 20
MAX_MESSAGES_PER_TURN = 1_024
MAX_TOOLS = 128
MAX_TOOL_JSON_BYTES = 64 << 10
MAX_JSON_DEPTH = 32
MAX_TOOL_CALLS_PER_MESSAGE = 128
MAX_NAME_BYTES = 128
MAX_PARAMETER_NAME_BYTES = 1_024
"""Of a tool call's argument."""
MAX_IDEMPOTENCY_KEY_BYTES = 128
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_OUTPUT_TOKENS = 131_072
MAX_CONTEXT_TOKENS = 163_840
MAX_TURN_DEADLINE_S = 24 * 3600.0
MAX_PAGE_SIZE = 500
MAX_RESERVATION_S = 60.0
MAX_TOOL_WAIT_S = 3600.0
MAX_LISTED_SESSIONS = 256
"""Sessions that a rank's state lists."""


def check_range(value: float, *, field: str, low: float, high: float, low_open: bool = False) -> None:
    """Raise ``InvalidArgument`` unless ``low <= value <= high`` (``low < value`` if ``low_open``) and finite."""
    below = value <= low if low_open else value < low
    if not math.isfinite(value) or below or value > high:
        bound = f"over {low:g}" if low_open else f"at least {low:g}"
        raise InvalidArgument(
            f"{field} is {value:g}; it must be {bound} and at most {high:g}",
            field=field,
            reason="OUT_OF_RANGE",
            metadata={"min": f"{low:g}", "max": f"{high:g}"},
        )


def check_length(value: Sized, *, field: str, high: int, low: int = 0, unit: str = "items") -> None:
    """Raise ``InvalidArgument`` unless ``low <= len(value) <= high``; pass encoded bytes to bound bytes."""
    count = len(value)
    if not low <= count <= high:
        raise InvalidArgument(
            f"{field} has {count} {unit}; it must have at least {low} and at most {high}",
            field=field,
            reason="OUT_OF_RANGE",
            metadata={"min": str(low), "max": str(high), "actual": str(count)},
        )
