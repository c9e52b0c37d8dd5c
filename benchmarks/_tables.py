"""Prints results/*.jsonl as the Markdown tables of docs/performance.md: python -m benchmarks._tables"""

from __future__ import annotations

import json

from benchmarks._report import RESULTS, Row

NOT_COLUMNS = ("benchmark", "date", "machine", "load_before", "gflop_per_s_limit", "gb_per_s_limit", "pages")


def table(rows: list[Row]) -> str:
    """The columns that differ from row to row in what they say; the rest goes into a line above."""
    about = ", ".join(f"{key} {_cell(rows[0][key])}" for key in NOT_COLUMNS[1:] if key in rows[0])
    columns = [key for key in rows[0] if key not in NOT_COLUMNS]
    lines = [" | ".join(columns), " | ".join("---" if isinstance(rows[0][key], str) else "--:" for key in columns)]
    lines += [" | ".join(_cell(row[key]) for key in columns) for row in rows]
    return "\n".join([f"{about}:", "", *(f"| {line} |" for line in lines)])


def _cell(value: str | int | float | None) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.jsonl")):
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"### {path.stem}\n\n{table(found)}\n")
