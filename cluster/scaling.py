"""How many gangs and routers the load asks for, and which gangs go. Pure: ``decide`` alone, from a ``Snapshot``.

Prompts. With flow F (tokens/s that come, over ``flow_window_s``; F' with its trend carried on from the middle of that
until a gang started now is up), queue Q (tokens), measured rates r of a gang, start-up S, the time T in which a queue
is to be gone (``recover_s``, at least half of the first-token target), and what decode gangs append beside their
streams, A = append_share x sum of their r:

    Q_S     = max(0, Q - S x (prefill gangs x r + A - F))       the queue that is left when a gang started now is up
    prefill = ceil((max(F' / max_utilisation, F + Q_S / T) - A) / r),                 0 where local append serves

A queue that is gone before a new gang could serve starts none, and no more start than there are answers to share. Where
there may be no prefill gangs, decode gangs are to have the rate for all of it.

Answers. Held pages H (in use or leased; H' with their trend over S), answers running R and blocked B, seconds between
the tokens of an answer L; the most of

    max(H', H x (1 + B / R)) / (max_occupancy x pages of a gang),   (R + B) / (max_occupancy x places of a gang),
    n x L / target

While prefill gangs are short, L asks for no more: what streams wait for then is prompts. A step reads its weights for
few answers as for many: once loads were seen that are ``LOADS_APART``, L = a + b R / n goes through the lightest and
the heaviest of them, and R b / (target - a) gangs are asked for. Before, L is taken for proportional to R / n: too much
far from the target, right where it meets it.

Damping. Gangs are added when every look of the last ``grow_after_s`` asked for more than are wanted (as many as the
least of them), and taken away when every look of the last max(``shrink_after_s``, S) could do with fewer, at bounds
lowered by ``shrink_margin``. To keep a gang for as long as one takes to start costs at most twice what knowing the
future would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from seamount.cluster.load import Decision, GangLoad, History, Limits, Look, Need, Slo, Snapshot, StepTimes
from seamount.cluster.moving import cheapest_first

QUEUE_SHARE = 0.5
"""Of the first-token target: what a prompt may wait before it is computed."""
MAX_TREND = 2.0
"""A trend is carried on to at most this many times what is measured."""
HELD_WINDOW_S = 30.0
"""Over which held pages grow: they jump less than prompts, and a burst shows in them first."""
LOADS_APART = 1.5
"""Answers at a gang, the most over the least, from which on their step times tell what each of them adds."""
_EPSILON = 1e-9


def decide(snapshot: Snapshot, slo: Slo) -> Decision:
    """What the deployment should have now. Call it every second or so; give ``history`` back with the next snapshot."""
    look = Look(
        now_s=snapshot.now_s,
        num_prompt_tokens=snapshot.num_prompt_tokens,
        num_held_pages=sum(gang.num_held_pages for gang in snapshot.of("decode")),
        answers=_mean([gang.num_running for gang in snapshot.ready("decode")]),
        inter_token_s=_inter_token_s(snapshot),
    )
    looks = [*_recent(snapshot, slo), look]
    for_prompts = prefill_need(snapshot, slo, looks)
    is_short = len(snapshot.ready("prefill")) < min(for_prompts.grow, slo.prefill.at_most)
    step = _step_times(looks) or snapshot.history.step
    for_answers = decode_need(snapshot, slo, looks, is_prefill_short=is_short, step=step)
    look = replace(look, prefill=for_prompts, decode=for_answers, routers=router_need(snapshot, slo))
    looks[-1] = look
    damping = _Damping(looks, slo)
    prefills, decodes = snapshot.of("prefill"), snapshot.of("decode")
    before = snapshot.history
    last = len(prefills) if before.prefill is None else before.prefill
    prefill = damping.wanted(last, slo.prefill, snapshot.prefill_start_s, lambda one: one.prefill)
    last = len(decodes) if before.decode is None else before.decode
    decode = damping.wanted(last, slo.decode, snapshot.decode_start_s, lambda one: one.decode)
    last = len(snapshot.routers) if before.routers is None else before.routers
    routers = damping.wanted(last, slo.routers, 0.0, lambda one: one.routers)
    return Decision(
        prefill=prefill,
        decode=decode,
        routers=routers,
        drain=(*_surplus(prefills, prefill), *_surplus(decodes, decode)),
        look=look,
        history=History(looks=tuple(looks), step=step, prefill=prefill, decode=decode, routers=routers),
    )


def prefill_need(snapshot: Snapshot, slo: Slo, looks: Sequence[Look]) -> Need:
    """Gangs beside what decode gangs append themselves."""
    if slo.prefill.at_most == 0:
        return Need()
    gangs = snapshot.of("prefill")
    num_queued = sum(gang.num_queued_tokens for gang in snapshot.gangs)
    rate = _prefill_rate(snapshot, slo)
    if rate <= 0:  # nothing is measured yet: the first prompts will tell
        return _need(max(len(gangs), 1 if num_queued else 0), "unmeasured")
    appended = slo.append_share * sum(gang.prompt_tokens_per_s for gang in snapshot.ready("decode"))
    flow, expected = _flow(looks, slo.flow_window_s, snapshot.prefill_start_s)
    left = max(0.0, num_queued - snapshot.prefill_start_s * (len(gangs) * rate + appended - flow))
    most = sum(gang.num_running + gang.num_blocked for gang in snapshot.gangs) / slo.prefill.ranks_per_gang

    def for_queue(num_tokens: float) -> float:
        for_flow = (flow - appended) / rate
        return max(for_flow, min(for_flow + num_tokens / _recover_s(slo) / rate, most))

    def for_flow(margin: float) -> float:
        return (expected / slo.max_utilisation - margin * appended) / (margin * rate)

    return Need(
        grow=_whole(max(for_flow(1.0), for_queue(left))),
        keep=_whole(max(for_flow(slo.shrink_margin), for_queue(num_queued))),  # who is here computes it
        reason="queue" if for_queue(left) > for_flow(1.0) else "flow",
    )


def decode_need(
    snapshot: Snapshot, slo: Slo, looks: Sequence[Look], *, is_prefill_short: bool, step: StepTimes | None = None
) -> Need:
    """Gangs for pages, places and the time between tokens; for prompts, too, where there may be no prefill gangs."""
    ready = snapshot.ready("decode")
    if not ready:
        return _need(len(snapshot.of("decode")), "starting")
    asks: dict[str, float] = {}  # by reason: gangs wanted, not rounded
    held, expected = _held(looks, min(HELD_WINDOW_S, slo.flow_window_s), snapshot.decode_start_s)
    num_running, num_blocked = sum(gang.num_running for gang in ready), sum(gang.num_blocked for gang in ready)
    with_blocked = 1.0 + num_blocked / max(1, num_running)
    pages = sum(gang.num_pages for gang in ready) / len(ready)
    if pages:
        asks["pages"] = max(expected, held * with_blocked) / (slo.max_occupancy * pages)
    places = sum(gang.num_places for gang in ready) / len(ready)
    if places:
        asks["places"] = (num_running + num_blocked) / (slo.max_occupancy * places)
    elif num_blocked:
        asks["blocked"] = len(ready) * with_blocked
    if num_running:
        wanted = len(ready) * _for_inter_token(looks[-1], step, slo.inter_token_s)
        most = num_running / slo.decode.ranks_per_gang
        asks["inter_token"] = min(wanted, most, len(ready) if is_prefill_short else wanted)
    rate = sum(gang.prompt_tokens_per_s for gang in ready) / len(ready)
    if slo.prefill.at_most == 0 and rate > 0:
        asks["prompts"] = _demand(snapshot, slo, looks, rate) / rate
    reason = max(asks, key=lambda key: asks[key], default="idle")
    return _between(lambda margin: asks.get(reason, 0.0) / margin, slo, reason)


def _for_inter_token(look: Look, step: StepTimes | None, target_s: float) -> float:
    """Decode gangs for each one that there is, with which an answer gets a token every ``target_s``."""
    by_proportion = look.inter_token_s / target_s
    if step is None or step.base_s >= target_s:
        return by_proportion
    by_step = look.answers * step.each_s / (target_s - step.base_s)
    return max(by_step, by_proportion) if by_proportion > 1 else by_step


def _step_times(looks: Sequence[Look]) -> StepTimes | None:
    """From the lightest and the heaviest load; None where they are too near to each other to tell."""
    loaded = [one for one in looks if one.answers and one.inter_token_s]
    if not loaded:
        return None
    light, heavy = min(loaded, key=lambda one: one.answers), max(loaded, key=lambda one: one.answers)
    if heavy.answers < LOADS_APART * light.answers or heavy.inter_token_s <= light.inter_token_s:
        return None
    each_s = (heavy.inter_token_s - light.inter_token_s) / (heavy.answers - light.answers)
    return StepTimes(base_s=max(0.0, light.inter_token_s - each_s * light.answers), each_s=each_s)


def router_need(snapshot: Snapshot, slo: Slo) -> Need:
    """By open streams and by CPU."""
    streams = sum(router.num_streams for router in snapshot.routers) / slo.streams_per_router
    cores = sum(router.cores for router in snapshot.routers) / slo.cores_per_router
    return _between(lambda margin: max(streams, cores) / margin, slo, "streams" if streams >= cores else "cores")


def _demand(snapshot: Snapshot, slo: Slo, looks: Sequence[Look], rate: float) -> float:
    """Tokens/s that decode gangs must have the rate for, where they compute every prompt."""
    flow, expected = _flow(looks, slo.flow_window_s, snapshot.decode_start_s)
    gangs = snapshot.of("decode")
    num_queued = sum(gang.num_queued_tokens for gang in gangs)
    left = max(0.0, num_queued - snapshot.decode_start_s * (len(gangs) * rate - flow))  # as for prefill gangs
    return max(expected / slo.max_utilisation, flow + left / _recover_s(slo))


def _recover_s(slo: Slo) -> float:
    return max(slo.recover_s, QUEUE_SHARE * slo.first_token_s)


def _prefill_rate(snapshot: Snapshot, slo: Slo) -> float:
    """Tokens/s of one prefill gang: the mean of those that have measured, or what decode ranks do; 0 = unknown."""
    measured = [gang.prompt_tokens_per_s for gang in snapshot.ready("prefill") if gang.prompt_tokens_per_s > 0]
    if measured:
        return sum(measured) / len(measured)
    by_rank = [g.prompt_tokens_per_s / g.num_ranks for g in snapshot.ready("decode") if g.prompt_tokens_per_s > 0]
    return slo.prefill.ranks_per_gang * sum(by_rank) / len(by_rank) if by_rank else 0.0


def _flow(looks: Sequence[Look], window_s: float, ahead_s: float) -> tuple[float, float]:
    """Prompt tokens a second: measured, and expected ``ahead_s`` from now."""
    flow, trend = _slope(looks, window_s, lambda one: one.num_prompt_tokens)
    return flow, min(MAX_TREND * flow, flow + max(0.0, trend) * (window_s / 2 + ahead_s))


def _held(looks: Sequence[Look], window_s: float, ahead_s: float) -> tuple[float, float]:
    """Held pages: now, and expected ``ahead_s`` from now."""
    held = looks[-1].num_held_pages
    growth, _ = _slope(looks, window_s, lambda one: one.num_held_pages)
    return held, min(MAX_TREND * held, held + max(0.0, growth) * ahead_s)


def _slope(looks: Sequence[Look], window_s: float, of: Callable[[Look], float]) -> tuple[float, float]:
    """Growth a second over the window, and by how much a second that grew from its first half to its second. Where
    there are no looks that old, what is known counts as if it had come within all of the window."""
    now = looks[-1]
    first, middle = _look_at(looks, now.now_s - window_s), _look_at(looks, now.now_s - window_s / 2)
    growth = (of(now) - of(first)) / max(window_s, now.now_s - first.now_s)
    if middle is first or middle is now:
        return growth, 0.0
    early = (of(middle) - of(first)) / (middle.now_s - first.now_s)
    late = (of(now) - of(middle)) / (now.now_s - middle.now_s)
    return growth, (late - early) / ((now.now_s - first.now_s) / 2)


def _look_at(looks: Sequence[Look], at_s: float) -> Look:
    """The last one at that time or before it, or the oldest."""
    return next((one for one in reversed(looks) if one.now_s <= at_s), looks[0])


def _recent(snapshot: Snapshot, slo: Slo) -> list[Look]:
    """Looks that still count, and one older one, which tells that the window is whole."""
    longest_s = max(slo.flow_window_s, slo.shrink_after_s, snapshot.prefill_start_s, snapshot.decode_start_s)
    looks = snapshot.history.looks
    since = next((at for at, one in enumerate(looks) if one.now_s >= snapshot.now_s - longest_s), len(looks))
    return list(looks[max(0, since - 1) :])


def _between(at: Callable[[float], float], slo: Slo, reason: str) -> Need:
    """``at(margin)``: what is wanted at bounds lowered to that part."""
    return Need(grow=_whole(at(1.0)), keep=_whole(at(slo.shrink_margin)), reason=reason)


def _need(number: int, reason: str) -> Need:
    return Need(grow=number, keep=number, reason=reason)


def _inter_token_s(snapshot: Snapshot) -> float:
    """Of the answers that run; 0 where none does."""
    ready = snapshot.ready("decode")
    num_running = sum(gang.num_running for gang in ready)
    return sum(gang.inter_token_s * gang.num_running for gang in ready) / num_running if num_running else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _whole(wanted: float) -> int:
    return max(0, ceil(wanted - _EPSILON))


@dataclass(frozen=True, slots=True)
class _Damping:
    """What the looks of a while agree on."""

    looks: Sequence[Look]
    slo: Slo

    def wanted(self, last: int, limits: Limits, start_s: float, of: Callable[[Look], Need]) -> int:
        """``last``, or more, or less; always within the limits."""
        shrink_after_s = max(self.slo.shrink_after_s, start_s)
        grown = min(of(one).grow for one in self._last(self.slo.grow_after_s))
        kept = max(of(one).keep for one in self._last(shrink_after_s))
        looked_s = self.looks[-1].now_s - self.looks[0].now_s
        wanted = last
        if grown > last and looked_s >= self.slo.grow_after_s:
            wanted = grown
        elif kept < last and looked_s >= shrink_after_s:
            wanted = kept
        return min(max(wanted, limits.at_least), limits.at_most)

    def _last(self, window_s: float) -> list[Look]:
        return [one for one in self.looks if one.now_s >= self.looks[-1].now_s - window_s]


def _surplus(gangs: Sequence[GangLoad], wanted: int) -> list[str]:
    return [gang.name for gang in cheapest_first(gangs)[: max(0, len(gangs) - wanted)]]
