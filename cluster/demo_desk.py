"""What the demo talks about: a travel desk of packages, flights and cabins, and the Python functions over it.

The client runs these functions where the model calls them. tiny-agent has never seen their names, parameters or shapes,
nor the words, identifiers and numbers of the records: they are of the lists that its training leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, validate_call

from seamount.router.client import Tool, ToolCall

Record = dict[str, Any]
PackageField = Literal["flight", "passengers", "class"]
FlightField = Literal["destination", "fare", "minutes", "delayed"]
CabinField = Literal["host", "nights", "tariff", "refundable"]
_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda first, second: first + second,
    "-": lambda first, second: first - second,
    "*": lambda first, second: first * second,
}


class DeskError(Exception):
    """A call cannot be done; the text is what the model reads."""


def _text(about: str = "") -> Record:
    return {"type": "string", "description": about} if about else {"type": "string"}


def _choices(words: Sequence[str], about: str = "") -> Record:
    schema: Record = {"type": "array", "items": {"type": "string", "enum": list(words)}}
    return schema | ({"description": about} if about else {})


@dataclass(slots=True)
class Desk:
    """The records as they are now. calls: what was called and answered so far."""

    packages: dict[str, Record] = field(
        default_factory=lambda: {
            "TQR64": {"flight": "K-8204", "passengers": 3, "class": "economy"},
            "HDW26": {"flight": "M-3391", "passengers": 2, "class": "business"},
        }
    )
    flights: dict[str, Record] = field(
        default_factory=lambda: {
            "K-4127": {"destination": "Oslo", "fare": 129.8, "minutes": 150, "delayed": False},
            "K-8204": {"destination": "Lisbon", "fare": 187.2, "minutes": 234, "delayed": False},
            "M-3391": {"destination": "Riga", "fare": 99.7, "minutes": 122, "delayed": True},
        }
    )
    cabins: dict[str, Record] = field(
        default_factory=lambda: {
            "HWP31": {"host": "Mara Lindt", "nights": 3, "tariff": 84.3, "refundable": True},
            "QVB58": {"host": "Oskar Sato", "nights": 24, "tariff": 63.3, "refundable": False},
        }
    )
    vouchers: list[str] = field(default_factory=lambda: ["E-7145", "E-7152"])
    calls: list[tuple[ToolCall, Record]] = field(default_factory=list)

    def retrieve_package(self, package_handle: str, revision: list[PackageField]) -> Record:
        return {"handle": package_handle, **_some(self._one("package", package_handle), revision)}

    def inspect_flight(self, flight_handle: str, revision: list[FlightField]) -> Record:
        return {"handle": flight_handle, **_some(self._one("flight", flight_handle), revision)}

    def check_cabin(self, cabin_handle: str, revision: list[CabinField] | None = None) -> Record:
        cabin = self._one("cabin", cabin_handle)
        return {"handle": cabin_handle, **_some(cabin, revision or list(cabin))}

    def book_cabin(self, nights: int, cabin_handle: str) -> Record:
        cabin = self._one("cabin", cabin_handle)
        if not 0 < nights <= cabin["nights"]:
            raise DeskError(f"at most {cabin['nights']}")
        cabin["nights"] -= nights
        return {"voucher": self.vouchers.pop(0)}

    def reckon(self, p: float, symbol: Literal["+", "-", "*"], q: float) -> Record:
        return {"result": round(_OPERATIONS[symbol](p, q), 2)}

    def answer(self, call: ToolCall) -> str:
        """Run a call; compact JSON, ``{"error": …}`` where it cannot be done."""
        try:
            function = getattr(self, FUNCTIONS[call.name].name)
            checked = validate_call(config=ConfigDict(strict=True))(function)
            result: Record = checked(**json.loads(call.arguments_json))
        except KeyError:
            result = {"error": f"no function {call.name}"}
        except (ValidationError, ValueError):
            result = {"error": "bad arguments"}
        except DeskError as error:
            result = {"error": str(error)}
        self.calls.append((call, result))
        return json.dumps(result, separators=(",", ":"))

    def _one(self, noun: str, ref: str) -> Record:
        records: dict[str, Record] = getattr(self, f"{noun}s")
        if ref not in records:
            raise DeskError(f"no {noun} {ref}")
        return records[ref]


def _some(record: Record, names: Sequence[str]) -> Record:
    return {name: record[name] for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function as the model reads it. name: of the method of ``Desk`` that does it, too."""

    name: str
    description: str
    parameters: dict[str, Record]
    optional: tuple[str, ...] = ()

    def schema(self) -> Record:
        required = [parameter for parameter in self.parameters if parameter not in self.optional]
        parameters = {"type": "object", "properties": self.parameters, "required": required}
        return {"name": self.name, "description": self.description, "parameters": parameters}


_FUNCTIONS = (
    Function(
        name="retrieve_package",
        description="Details of one package by handle.",
        parameters={
            "package_handle": _text("handle of the package"),
            "revision": _choices(("flight", "passengers", "class"), "which fields"),
        },
    ),
    Function(
        name="inspect_flight",
        description="Details of one flight by handle.",
        parameters={
            "flight_handle": _text(),
            "revision": _choices(("destination", "fare", "minutes", "delayed"), "which fields"),
        },
    ),
    Function(
        name="check_cabin",
        description="Details of one cabin by handle.",
        parameters={
            "cabin_handle": _text("handle of the cabin"),
            "revision": _choices(("host", "nights", "tariff", "refundable"), "which fields"),
        },
        optional=("revision",),
    ),
    Function(
        name="book_cabin",
        description="To book nights of one cabin; gives a voucher.",
        parameters={"nights": {"type": "integer"}, "cabin_handle": _text("handle of the cabin")},
    ),
    Function(
        name="reckon",
        description="Works out a sum, difference or product.",
        parameters={
            "p": {"type": "number", "description": "a number"},
            "symbol": {"type": "string", "enum": ["+", "-", "*"], "description": "what to do"},
            "q": {"type": "number", "description": "a number"},
        },
    ),
)
FUNCTIONS: dict[str, Function] = {function.name: function for function in _FUNCTIONS}
"""By name, in the order in which the model reads them."""
TOOLS = tuple(Tool(function_json=json.dumps(function.schema())) for function in _FUNCTIONS)
