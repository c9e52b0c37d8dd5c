"""The processes that sample for the reinforcement stage, as the process that trains sees them.

Each has a share of the device, caches of its own and a copy of the weights. While the model is updated nobody samples:
processes that share a GPU slow each other down.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from typing import Any

from examples.tiny_agent.model import Model
from examples.tiny_agent.sampling import Links, Measure, Over, Result, Sample, Sizes, run_sampler
from examples.tiny_agent.shared_weights import SharedWeights

_SPAWN = multiprocessing.get_context("spawn")
_END_S = 10.0
"""How long processes may take to end by themselves."""


class Samplers:
    """``count`` processes on the model's device; use as a context. seed: of what they draw."""

    def __init__(self, model: Model, sizes: Sizes, *, count: int, seed: int) -> None:
        self.weights = SharedWeights(model.config, model.dtype)
        self.weights.write(model)
        self._results: Any = _SPAWN.Queue()
        self._commands = [_SPAWN.SimpleQueue() for _ in range(count)]
        self._open, self._may_sample = _SPAWN.Event(), _SPAWN.Event()
        self._may_sample.set()
        device = str(model.embed_tokens.device)
        self._processes = [
            _SPAWN.Process(
                target=run_sampler, args=(self._links(commands), sizes, device, number, count, seed), daemon=True
            )
            for number, commands in enumerate(self._commands)
        ]

    def __enter__(self) -> Samplers:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._may_sample.set()
        for commands in self._commands:
            commands.put(None)
        end = time.monotonic() + _END_S
        while any(process.is_alive() for process in self._processes) and time.monotonic() < end:
            self._told(0.1)  # a process does not end before its results are taken
        for process in self._processes:
            process.kill()
            process.join()

    def measure(self, command: Measure) -> list[Result]:
        """All results of it. Raises RuntimeError with the error of a process that failed."""
        self._tell(command)
        results: list[Result] = []
        missing = len(self._commands)
        while missing:
            told = self._told(1.0)
            if isinstance(told, Result):
                results.append(told)
            missing -= isinstance(told, Over)
        return results

    def begin(self, command: Sample) -> None:
        """Let all sample until ``end``."""
        self._tell(command)

    def next(self, timeout: float) -> Result | None:
        """What came next of a sampling, None if nothing did in time. Raises RuntimeError as ``measure``."""
        told = self._told(timeout)
        assert not isinstance(told, Over), "nobody was told to end"
        return told

    def end(self) -> None:
        """Stop sampling; groups that are not complete, or that nobody asked for, are lost."""
        self._open.clear()
        missing = len(self._commands)
        while missing:
            missing -= isinstance(self._told(1.0), Over)

    def pause(self) -> None:
        """Leave the device to the trainer, from the end of the present step on."""
        self._may_sample.clear()

    def resume(self) -> None:
        self._may_sample.set()

    def _links(self, commands: Any) -> Links:
        return Links(
            weights=self.weights,
            commands=commands,
            results=self._results,
            is_open=self._open,
            may_sample=self._may_sample,
        )

    def _tell(self, command: Measure | Sample) -> None:
        self._open.set()
        for commands in self._commands:
            commands.put(command)

    def _told(self, timeout: float) -> Result | Over | None:
        try:
            told: Result | Over = self._results.get(timeout=timeout)
        except queue.Empty:
            dead = [process.exitcode for process in self._processes if process.exitcode]
            if dead:
                raise RuntimeError(f"{len(dead)} sampling processes died, with {dead}") from None
            return None
        if isinstance(told, Over) and told.error:
            raise RuntimeError(told.error)
        return told
