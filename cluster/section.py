"""What every section of the settings is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from seamount.wire.errors import InvalidArgument


class Section(BaseModel):
    """Unknown keys are errors, values cannot change, and no message repeats what was given."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def contradiction(key: str, message: str) -> PydanticCustomError:
    """Settings that contradict each other; ``key``: the dotted name of the one to change."""
    return PydanticCustomError("contradiction", "{message}", {"key": key, "message": message})


def refused(field: str, message: str, *, reason: str = "INVALID_SETTING") -> InvalidArgument:
    """The error for a setting; field: its dotted name."""
    return InvalidArgument(message, field=field, reason=reason)
