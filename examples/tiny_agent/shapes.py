"""JSON schemas of tools: what a parameter looks like, and which shapes belong to training and which to evaluation."""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass
from typing import Any

from examples.tiny_agent.values import Split


class NoVariant(Exception):
    """A tool has no shape of the split that is wanted: draw another."""


_EVALUATION_SHARE = 4
"""One shape of so many is held out."""


class ParameterType(enum.Enum):
    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    ENUM = "enum"
    STRINGS = "strings"
    CHOICES = "choices"
    """An array of enumerated words."""
    NUMBERS = "numbers"
    OBJECT = "object"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """name: also what names the value in a question, where ``about`` does not. choices: of ENUM and CHOICES. inner: of
    OBJECT."""

    name: str
    type: ParameterType
    required: bool = True
    choices: tuple[str, ...] = ()
    inner: tuple[Parameter, ...] = ()
    about: str = ""
    """Its description."""

    def schema(self) -> dict[str, Any]:
        match self.type:
            case ParameterType.ENUM:
                schema: dict[str, Any] = {"type": "string", "enum": list(self.choices)}
            case ParameterType.STRINGS:
                schema = {"type": "array", "items": {"type": "string"}}
            case ParameterType.CHOICES:
                schema = {"type": "array", "items": {"type": "string", "enum": list(self.choices)}}
            case ParameterType.NUMBERS:
                schema = {"type": "array", "items": {"type": "number"}}
            case ParameterType.OBJECT:
                schema = object_schema(self.inner)
            case _:
                schema = {"type": self.type.value}
        if self.about:
            schema["description"] = self.about
        return schema

    def signature(self) -> str:
        """Its shape, names apart: type, number of choices, required or not, whether it is described."""
        inner = f"({signature(self.inner)})" if self.inner else ""
        choices = str(len(self.choices)) if self.choices else ""
        return f"{self.type.value}{choices}{inner}{'' if self.required else '?'}{':' if self.about else ''}"


def object_schema(parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    """A JSON schema of an object that holds exactly these."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {parameter.name: parameter.schema() for parameter in parameters},
    }
    required = [parameter.name for parameter in parameters if parameter.required]
    if required:
        schema["required"] = required
    return schema


def signature(parameters: tuple[Parameter, ...]) -> str:
    """The shape of a tool's parameters, in order."""
    return ";".join(parameter.signature() for parameter in parameters)


def split_of(shape: str) -> Split:
    """To which split a shape belongs: a hash of it decides."""
    held_out = zlib.crc32(shape.encode()) % _EVALUATION_SHARE == 0
    return Split.EVALUATION if held_out else Split.TRAINING
