"""Sessions of agents, made up after public measurements of real ones.

TraceLab (arXiv 2606.30560; 4,265 sessions of coding agents) says per session: requests of a person 9.2 on average, half
of the sessions one, p90 18, p99 137; 7.8 tool-started steps a request; tokens appended a step by size of the cached
prefix (p50, p90, p99, two agents); 524 output tokens a step. AgentX (vLLM, 2026): subagents in 44% of the sessions.
Each of these is fitted by a log-normal: sigma from p90 / p50 agrees with that from p99 / p50 to 0.1. Waits for tools
span 0.1 s to minutes; of programs' requests 80% come within 10 s (arXiv 2506.02634).
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass, field, replace

from seamount.wire.limits import MAX_TOOL_WAIT_S

REQUESTS_ONE_SHARE, REQUESTS_LOG = 0.55, (1.64, 1.63)
"""Share of sessions with one request; (mu, sigma) of the others' count."""
MAX_REQUESTS, MAX_TOOL_STEPS = 200, 200
TOOL_STEPS_LOG = (1.45, 1.1)
"""Of a request: mean 7.8."""
APPENDED = (
    (64_000, ((951, 1.34), (954, 1.69))),
    (128_000, ((793, 1.20), (796, 1.59))),
    (math.inf, ((710, 1.17), (771, 1.50))),
)
"""(prefix below, (median, sigma) of each agent). Below 32K, where nothing was published, as from 32K to 64K."""
MAX_APPENDED = 50_000
MIN_WAIT_S = 0.1
RESET_SHARE = 0.8
OUTPUT_LOG = (math.log(250), 1.2)
MAX_OUTPUT = 8_000
REASONING_SHARE = (0.3, 0.7)
SYSTEM_TOKENS = (12_000, 16_000)
"""Instructions and tools of each agent, shared by its sessions."""
TOOLS = {"read": (0.4, 0.9, 0.62), "shell": (3.0, 1.5, 0.28), "build": (40.0, 1.1, 0.07), "web": (90.0, 0.9, 0.03)}
"""Median wait in seconds, sigma of its logarithm, share of the calls."""
SUBAGENT = "subagent"
SUBAGENT_SHARE, SUBAGENT_STEPS, SUBAGENT_LOG = 0.04, 6, (4.5, 0.9)
"""Share of the tool-started steps that bring a subagent's answer; its own steps, in a fork; (mu, sigma) of the wait."""
FORK_WAIT = (1.0, 1.0)
"""Median and sigma of the waits of a subagent's own steps."""
PAUSE = (600.0, 1.6)
"""Median and sigma of a person's pauses: two of three outlive a cache that is kept for 5 minutes. TraceLab measured 35
times the new tokens after pauses, which such a cache gives where nearly all of them do."""
MAX_PAUSE_S = 4 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn. tool: whose results it brings, '' for a person; wait_s: since the end of the turn before; num_appended:
    tokens of its input; num_reasoning, num_output: tokens that it samples; forks: a subagent's steps that begin as this
    turn ends, in a fork of the session; resets: the context is cut back to the first question before it; text: the
    whole prompt, of a trace."""

    tool: str
    wait_s: float
    num_appended: int
    num_reasoning: int
    num_output: int
    forks: tuple[Step, ...] = ()
    resets: bool = False
    text: array[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A session. agent: which system prompt it shares; lingers_s: how long nobody knows, after its last turn, that it
    was the last."""

    agent: int
    steps: tuple[Step, ...]
    lingers_s: float = 0.0
    starts_after_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Generator:
    """Plans, one after the other, the same for the same seed. max_context_tokens: where a context is reset (at 80%)."""

    seed: int
    max_context_tokens: int
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def plan(self) -> Plan:
        agent, steps = self._rng.randrange(2), list[Step]()
        size = SYSTEM_TOKENS[agent]
        for _ in range(self._num_requests()):
            thoughts = 0
            for number in range(1 + self._num_tool_steps()):
                step = self._tool_step(agent, size) if number else self._step(agent, size, "", self._pause_s())
                if step.tool == SUBAGENT:
                    forks = tuple(
                        self._step(agent, size, "read", self._wait_s(*FORK_WAIT)) for _ in range(SUBAGENT_STEPS)
                    )
                    steps[-1] = replace(steps[-1], forks=forks)
                if step.tool and size > RESET_SHARE * self.max_context_tokens:
                    step = replace(step, resets=True, num_appended=0)
                    size, thoughts = SYSTEM_TOKENS[agent], 0
                steps.append(step)
                size += step.num_appended + step.num_reasoning + step.num_output
                thoughts += step.num_reasoning
            size -= thoughts  # the next question cuts them
        return Plan(agent=agent, steps=tuple(steps), lingers_s=self._pause_s())

    def _tool_step(self, agent: int, size: int) -> Step:
        rng = self._rng
        if rng.random() < SUBAGENT_SHARE:
            return self._step(agent, size, SUBAGENT, self._wait_s(math.exp(SUBAGENT_LOG[0]), SUBAGENT_LOG[1]))
        (tool,) = rng.choices(list(TOOLS), weights=[share for *_, share in TOOLS.values()])
        median_s, sigma, _ = TOOLS[tool]
        return self._step(agent, size, tool, self._wait_s(median_s, sigma))

    def _wait_s(self, median_s: float, sigma: float) -> float:
        return max(MIN_WAIT_S, min(MAX_TOOL_WAIT_S, median_s * self._rng.lognormvariate(0.0, sigma)))

    def _pause_s(self) -> float:
        return min(MAX_PAUSE_S, PAUSE[0] * self._rng.lognormvariate(0.0, PAUSE[1]))

    def _num_requests(self) -> int:
        rng = self._rng
        if rng.random() < REQUESTS_ONE_SHARE:
            return 1
        return min(MAX_REQUESTS, 1 + round(rng.lognormvariate(*REQUESTS_LOG)))

    def _num_tool_steps(self) -> int:
        return min(MAX_TOOL_STEPS, int(self._rng.lognormvariate(*TOOL_STEPS_LOG)))

    def _step(self, agent: int, size: int, tool: str, wait_s: float) -> Step:
        rng = self._rng
        median, sigma = next(agents[agent] for below, agents in APPENDED if size < below)
        sampled = min(MAX_OUTPUT, max(4, round(rng.lognormvariate(*OUTPUT_LOG))))
        num_reasoning = max(1, round(sampled * rng.uniform(*REASONING_SHARE)))
        return Step(
            tool=tool,
            wait_s=wait_s,
            num_appended=min(MAX_APPENDED, max(1, round(median * rng.lognormvariate(0.0, sigma)))),
            num_reasoning=num_reasoning,
            num_output=max(1, sampled - num_reasoning),
        )
