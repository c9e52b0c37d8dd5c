"""What the commands share in front of a terminal: progress of a start, text of a model, where to connect."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from seamount.cluster.node_drain import DrainPhase, DrainStatus


class StartDisplay:
    """One bar a part on a terminal, one line a change elsewhere. Call ``show`` with each news."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, str] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def show(self, part: str, num_ready: int, num_wanted: int, detail: str, *, passing: bool = False) -> None:
        """num_wanted may be 0: the part is not used. passing: only a terminal shows it."""
        if not self._console.is_terminal:
            if passing:
                return
            line = f"{part} {num_ready}/{num_wanted} {detail}".rstrip()
            if self._lines.get(part) != line:
                self._lines[part] = line
                self._console.print(line, markup=False, highlight=False)
            return
        if part not in self._tasks:
            self._tasks[part] = self._progress.add_task(part, total=num_wanted, detail=detail)
        self._progress.update(self._tasks[part], completed=num_ready, total=num_wanted, detail=printable(detail))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the display as it is; repeating it is harmless."""
        self._progress.stop()


def show_drain(display: StartDisplay) -> Callable[[DrainStatus], None]:
    """What to call with each look at a drain: one bar of what has to go from the node."""
    most = 0

    def show(status: DrainStatus) -> None:
        nonlocal most
        left = (*status.gangs, *status.routers)
        most = max(most, len(left))
        is_asked = status.phase is DrainPhase.ASKED
        detail = "waiting for the fleet" if is_asked else status.detail or ", ".join(left)
        display.show(status.node, most - len(left), most, detail)

    return show


class ReadingBar:
    """A bar of bytes read, on a terminal only. Call ``show`` with each tensor."""

    def __init__(self, console: Console, title: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(printable(title), total=None)

    def show(self, name: str, num_bytes_done: int, num_bytes_total: int) -> None:
        self._progress.update(self._task, completed=num_bytes_done, total=num_bytes_total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()


def printable(text: str) -> str:
    """Text from elsewhere without what would steer a terminal: control and format characters but newline and tab."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else "\ufffd" for char in text
    )
