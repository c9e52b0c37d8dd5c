"""Any order of calls against simulated planes: every entry that the caches call present is really there, unspoilt.

The model is the memory itself: each slot holds a fingerprint of (salt, the tokens up to its position), as a real entry
does. Receives, steps and restores write to it at any time between their begin and their end, also after the reservation
is dead: had a page been reused too early, a reader would find another sequence's entries. So do the slots of the tiers
below, into which copies are made at any time.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from seamount.wire.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, OutOfRange, ResourceExhausted
from seamount.wire.hashes import root_hash
from seamount.workers.cache import holdings
from seamount.workers.cache import reservation as reservation_module
from seamount.workers.cache.copies import Copy
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.reservation import Reservation, ReservationState
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.restores import Restore
from seamount.workers.cache.retention import MAX_LEASE_S, Importance, LeaseOutcome, Tier

SIZE = 4
SALTS = [b"a" * 32, b"b" * 32]
picks = st.integers(0, 1 << 16)
"""Which of the reservations, receives or steps there are at that moment."""
prompts = st.tuples(st.integers(0, 22), st.lists(st.integers(0, 1), min_size=1, max_size=4)).map(
    lambda parts: [0] * parts[0] + parts[1]  # many common prefixes
)


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(7, 14), num_host=st.sampled_from([0, 3, 8, 30]), num_disk=st.sampled_from([0, 0, 5, 40])
    )
    def start(self, num_pages: int, num_host: int, num_disk: int) -> None:
        self.now = 0.0
        self.aborted: list[str] = []
        self.memory: dict[int, object] = {}
        self.salts: dict[str, bytes] = {}
        self.receives: list[tuple[Reservation, int, int]] = []
        self.steps: list[tuple[Reservation, int, list[int]]] = []
        self.ids: set[str] = set()
        self.epochs: dict[str, tuple[int, int]] = {}
        self.left: dict[str, tuple[bytes, list[int]]] = {}
        self.leased: dict[str, tuple[float, tuple[int, int] | None, list[PageNode], list[int]]] = {}
        self.stored: dict[tuple[Tier, int], list[object]] = {}
        self.copies: list[tuple[Copy, list[object]]] = []
        self.restore: Restore | None = None
        self.num_below = {Tier.HOST: num_host, Tier.DISK: num_disk}
        self.caches = Reservations(
            num_pages=num_pages,
            page_size=SIZE,
            fingerprint="f",
            layout="l",
            num_below=self.num_below,
            clock=lambda: self.now,
            on_abort=self.aborted.append,
        )

    # ---- the simulated planes

    def _entry(self, reservation: Reservation, position: int) -> tuple[bytes, tuple[int, ...]]:
        (salt,) = [salt for salt in SALTS if root_hash(salt, "f", "l") == reservation.root]
        return (salt, tuple(reservation.token_ids[: position + 1]))

    def _write(self, reservation: Reservation, first: int, end: int, *, spoilt: bool = False) -> None:
        for position, slot in zip(range(first, end), reservation.slots(first, end), strict=True):
            self.memory[slot] = object() if spoilt else self._entry(reservation, position)

    def _live(self, pick: int) -> Reservation:
        live = self._of_turns()
        return live[pick % len(live)]

    def _of_turns(self) -> list[Reservation]:
        return [reservation for reservation in self.caches._live.by_id.values() if not reservation.is_ahead]

    # ---- rules

    @rule(
        session=st.sampled_from(["", "x", "y", "z"]),
        salt=st.sampled_from([SALTS[0], *SALTS]),
        prompt=prompts,
        step=st.sampled_from(["epoch", "epoch", "attempt", "stale"]),
        extend=st.booleans(),
    )
    def reserve(self, session: str, salt: bytes, prompt: list[int], step: str, extend: bool) -> None:
        self._reserve(session, salt, prompt, step, extend)

    def _reserve(self, session: str, salt: bytes, prompt: list[int], step: str, extend: bool) -> Reservation | None:
        epoch, attempt = self.epochs.get(session, (1, 0))
        if extend and session in self.left:
            salt, prompt = self.left[session][0], (self.left[session][1] + prompt)[:26]
        if step == "stale":
            epoch -= 1
        elif step == "epoch":
            epoch, attempt = epoch + 1, 0
        else:
            attempt += 1
        turn = f"t{len(self.ids)}" if not session else f"t{epoch}"
        before, num_aborted = self.caches.state(), len(self.aborted)
        try:
            reservation = self.caches.reserve(
                session_id=session,
                turn_id=turn,
                epoch=epoch,
                attempt=attempt,
                salt=salt,
                token_ids=prompt,
                time_to_live_s=5,
            )
        except Aborted:
            assert step == "stale"
            assert session in self.epochs
            return None
        except ResourceExhausted:
            if len(self.aborted) == num_aborted:
                assert self.caches.state() == before
            self.epochs[session] = (epoch, attempt)
            return None
        if session:
            assert step != "stale" or session not in self.epochs
            self.epochs[session] = (epoch, attempt)
        assert reservation.id not in self.ids
        assert len(reservation.pages) == len(prompt) // SIZE + 1
        assert reservation.cached_len == reservation.present_len <= len(prompt) - 1
        self.ids.add(reservation.id)
        self.salts[reservation.id] = salt
        return reservation

    @rule(
        session=st.sampled_from(["", "x", "y", "z"]),
        prompt=prompts,
        extend=st.booleans(),
        share=st.sampled_from([0.5, 1.0, 1.0]),
        cut=st.none() | st.integers(0, 9),
        copies=st.booleans(),
        num_bad=st.sampled_from([0, 0, 1, 3]),
    )
    def turn(
        self,
        session: str,
        prompt: list[int],
        extend: bool,
        share: float,
        cut: int | None,
        copies: bool,
        num_bad: int,
    ) -> None:
        """A whole turn at once: so that the others meet caches with something in them."""
        reservation = self._reserve(session, SALTS[0], prompt, "epoch", extend)
        while reservation is not None and reservation.is_restoring and num_bad < 3:
            if self.restore is None:
                self.begin_restore(2)
            if self.restore is not None:
                self.end_restore(num_bad, True)
        if reservation is not None and not reservation.is_restoring:
            first, end = reservation.computed_len, int(share * len(reservation.token_ids))
            self._write(reservation, first, end)
            self.caches.advance(reservation.id, end)
            self.caches.check_invariants()
            self._release(reservation, cut)
        if copies:
            for tier in (Tier.HOST, Tier.DISK):
                self.begin_copies(tier, 20)
                self.end_copies(0, True, 20)

    @rule(num_tokens=st.integers(8, 56))
    def press(self, num_tokens: int) -> None:
        """Somebody takes most pages and computes nothing."""
        num_tokens = min(num_tokens, self.caches.num_pages * SIZE - 1)
        reservation = self._reserve("", SALTS[1], [2] * num_tokens, "epoch", False)
        if reservation is not None:
            self._release(reservation, None)

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks, change=st.booleans())
    def repeat(self, pick: int, change: bool) -> None:
        reservation = self._live(pick)
        prompt = reservation.token_ids[: reservation.prompt_len]
        prompt[-1] += change
        key = reservation.key
        try:
            again = self.caches.reserve(
                session_id=key[0],
                turn_id=key[1],
                epoch=key[2],
                attempt=key[3],
                salt=self.salts[reservation.id],
                token_ids=prompt,
                time_to_live_s=5,
            )
        except AlreadyExists:
            assert change
            return
        assert again is reservation
        assert not change
        assert again.expires_at == self.now + 5

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks, count=st.sampled_from([1, 5, 26]))
    def compute(self, pick: int, count: int) -> None:
        reservation = self._live(pick)
        if reservation.state is not ReservationState.ACTIVE or reservation.num_uses:
            return
        first = reservation.computed_len
        end = min(first + count, len(reservation.token_ids), reservation.capacity)
        self._write(reservation, first, end)
        self.caches.advance(reservation.id, end)
        assert reservation.computed_len == end

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks, token_id=st.integers(0, 1))
    def append(self, pick: int, token_id: int) -> None:
        reservation = self._live(pick)
        if reservation.state is not ReservationState.ACTIVE or len(reservation.token_ids) >= 26:
            return
        if self.caches.ensure_capacity(reservation.id, len(reservation.token_ids) + 1):
            self.caches.append_token(reservation.id, token_id)
        else:
            state = self.caches.state()
            assert state.num_free + state.num_cached == state.num_leased

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks)
    def preempt(self, pick: int) -> None:
        reservation = self._live(pick)
        assert self.caches.preempt(reservation.id) == (reservation.num_uses == 0)

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        reservation = self._live(pick)
        if self.caches.resume(reservation.id):
            assert reservation.capacity > len(reservation.token_ids) - 1

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks, first=st.integers(-3, 2), length=st.integers(1, 12))
    def begin_receive(self, pick: int, first: int, length: int) -> None:
        reservation = self._live(pick)
        first += reservation.computed_len
        end = min(first + length, len(reservation.token_ids))
        try:
            self.caches.uses.begin_receive(reservation.id, first, end)
        except (NotFound, OutOfRange, FailedPrecondition):
            return
        self._write(reservation, reservation.computed_len, end, spoilt=True)
        self.receives.append((reservation, first, end))

    @precondition(lambda self: self.receives)
    @rule(pick=picks, at=st.integers(0, 25))
    def spoil(self, pick: int, at: int) -> None:
        """Bytes arrive that are not (yet) what they should be, perhaps for a dead reservation."""
        reservation, first, end = self.receives[pick % len(self.receives)]
        if reservation.receive == (first, end) and at >= max(first, reservation.computed_len) and at < end:
            self._write(reservation, at, at + 1, spoilt=True)

    @precondition(lambda self: self.receives)
    @rule(pick=picks, share=st.floats(0, 1))
    def end_receive(self, pick: int, share: float) -> None:
        reservation, first, end = self.receives.pop(pick % len(self.receives))
        verified = first + int(share * (end - first))
        self._write(reservation, first, verified)
        self.caches.uses.end_receive(reservation.id, verified)

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks)
    def begin_step(self, pick: int) -> None:
        reservation = self._live(pick)
        if reservation.is_restoring:
            return
        try:
            self.caches.uses.begin(reservation.id)
        except (NotFound, FailedPrecondition):
            return
        self.steps.append((reservation, reservation.computed_len, list(reservation.pages)))

    @precondition(lambda self: self.steps)
    @rule(pick=picks, count=st.integers(0, 9))
    def end_step(self, pick: int, count: int) -> None:
        reservation, first, pages = self.steps.pop(pick % len(self.steps))
        assert reservation.pages[: len(pages)] == pages, "pages changed under a step"
        if first == reservation.computed_len and reservation.receive is None:
            end = min(first + count, len(reservation.token_ids), reservation.capacity)
            self._write(reservation, first, end)
            self.caches.advance(reservation.id, end)
        self.caches.uses.end(reservation.id)

    @precondition(lambda self: self._of_turns())
    @rule(pick=picks, cut=st.none() | st.integers(-2, 9))
    def release(self, pick: int, cut: int | None) -> None:
        self._release(self._live(pick), cut)

    def _release(self, reservation: Reservation, cut: int | None) -> None:
        keep_len = None if cut is None else max(0, reservation.computed_len - cut)
        if reservation.session_id:
            self.left[reservation.session_id] = (self.salts[reservation.id], list(reservation.token_ids[:keep_len]))
        self.caches.release(reservation.id, keep_len)

    @rule(
        session=st.sampled_from(["x", "y", "z"]),
        duration_s=st.sampled_from([0.3, 3.0, 30.0]),
        importance=st.sampled_from(Importance),
    )
    def retain(self, session: str, duration_s: float, importance: Importance) -> None:
        decision = self.caches.sessions.retain(
            session, duration_s=duration_s, importance=importance, prefill_tokens_per_s=0.0
        )
        lease = self.caches._cache.sessions.leases.get(session)
        if decision.outcome is LeaseOutcome.DENIED:
            assert lease is None or lease.expires_at > self.now
        else:
            assert lease is not None
            assert lease.expires_at == self.now + decision.duration_s
            held = self.caches._live.all()
            if any(reservation.session_id == session for reservation in held):
                self.leased.pop(session, None)  # it holds what that one is going to leave
            else:
                pages = [] if any(self.num_below.values()) else list(lease.pages)
                self.leased[session] = lease.expires_at, self.epochs.get(session), list(lease.nodes), pages

    @rule(session=st.sampled_from(["x", "y", "z"]), is_late=st.booleans())
    def delete(self, session: str, is_late: bool) -> None:
        """The session is no more; a message that comes late, for one that was made anew since, changes nothing."""
        epoch = self.epochs.get(session, (1, 0))[0]
        if is_late:
            before = self.caches.state()
            self.caches.sessions.delete(session, epoch - 3)
            if session in self.epochs:
                assert self.caches.state() == before
                return
        num_live = sum(one.session_id == session for one in self.caches._live.by_id.values())
        num_aborted = len(self.aborted)
        self.caches.sessions.delete(session, epoch)
        assert len(self.aborted) == num_aborted + num_live
        self.leased.pop(session, None)
        self.left.pop(session, None)
        assert self.caches._cache.sessions.get(session) is None
        self.epochs[session] = epoch + 1, 0
        assert self._reserve(session, SALTS[0], [1], "stale", False) is None, "its writers are fenced off"

    @precondition(lambda self: self.caches._cache.copies.tiers)
    @rule(count=st.integers(1, 9), is_done=st.sampled_from([True, True, True, False]))
    def erase(self, count: int, is_done: bool) -> None:
        for slot in self.caches.tiers.next_erasures(Tier.DISK, count):
            del self.stored[Tier.DISK, slot]
            self.caches.tiers.erased(Tier.DISK, slot, is_done=is_done)

    # ---- tiers below

    def _page(self, node: PageNode) -> list[object]:
        """The entries of a page of the tree."""
        chain = [node]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        (salt,) = [salt for salt in SALTS if root_hash(salt, "f", "l") == node.root]
        token_ids = array("I", b"".join(one.token_ids for one in reversed(chain))).tolist()
        return [(salt, tuple(token_ids[: end + 1])) for end in range(len(token_ids) - SIZE, len(token_ids))]

    def _read(self, copy: Copy) -> list[object]:
        if copy.source is not None:
            return list(self.stored[Tier.HOST, copy.source.slot])
        assert copy.page is not None
        return [self.memory.get(copy.page * SIZE + offset) for offset in range(SIZE)]

    @rule(tier=st.sampled_from([Tier.HOST, Tier.HOST, Tier.DISK]), limit=st.integers(1, 5))
    def begin_copies(self, tier: Tier, limit: int) -> None:
        copies = self.caches.tiers.next_copies(tier, limit)
        assert len(copies) <= limit
        self.copies.extend((copy, self._read(copy)) for copy in copies)

    @precondition(lambda self: self.copies)
    @rule(pick=picks, late=st.booleans(), count=st.sampled_from([1, 4]))
    def end_copies(self, pick: int, late: bool, count: int) -> None:
        for _ in range(min(count, len(self.copies))):
            self._end_copy(pick, late)

    def _end_copy(self, pick: int, late: bool) -> None:
        tier = self.copies[pick % len(self.copies)][0].tier
        first = next(index for index, (copy, _) in enumerate(self.copies) if copy.tier is tier)
        copy, content = self.copies.pop(first)
        self.stored[tier, copy.slot] = self._read(copy) if late else content
        is_gone = copy.node.page is None and not copy.node.copies
        assert not (self.caches.tiers.copied(copy, 0) and is_gone), "a copy of nothing"

    @precondition(lambda self: self.restore is None)
    @rule(limit=st.integers(1, 3))
    def begin_restore(self, limit: int) -> None:
        self.restore = self.caches.tiers.next_restore(limit)

    @precondition(lambda self: self.restore is not None)
    @rule(num_bad=st.sampled_from([0, 0, 0, 1, 2]), is_damage=st.booleans())
    def end_restore(self, num_bad: int, is_damage: bool) -> None:
        assert self.restore is not None
        restore, self.restore = self.restore, None
        num_good = max(0, len(restore.fetches) - num_bad)
        for fetch in restore.fetches:
            for offset, entry in enumerate(self.stored[fetch.tier, fetch.copy.slot]):
                self.memory[fetch.page * SIZE + offset] = entry
        for fetch in restore.fetches[num_good:]:
            self.memory[fetch.page * SIZE] = object()
        damaged = restore.fetches[num_good] if is_damage and num_good < len(restore.fetches) else None
        if damaged is not None:
            self.leased.clear()
        self.caches.tiers.restored(restore, num_good, damaged)

    @rule(elapsed_s=st.sampled_from([0.2, 0.5, 6.0]))
    def wait(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        for reservation_id in self.caches.expire():
            assert reservation_id in self.aborted

    # ---- what must hold

    @invariant()
    def nothing_is_lost_or_spoilt(self) -> None:
        self.caches.check_invariants()
        held = self.caches._live.all()
        for reservation in held:
            for position, slot in enumerate(reservation.slots(0, reservation.computed_len)):
                assert self.memory[slot] == self._entry(reservation, position)
        sessions = [
            reservation.session_id for reservation in self.caches._live.by_id.values() if reservation.session_id
        ]
        assert len(set(sessions)) == len(sessions)
        assert len(self.aborted) == len(set(self.aborted))
        leases = self.caches._cache.sessions.leases
        for session, (expires_at, epoch, nodes, pages) in self.leased.items():
            if self.now < expires_at and nodes and self.epochs.get(session) == epoch:  # the session has not come back
                assert leases[session].nodes == nodes, "a lease lost a page before its end"
                assert all(node.page is not None or node.copies for node in nodes)
                assert set(leases[session].pages) >= set(pages), "a leased page may leave the device"
        for tier, lower in self.caches._cache.copies.tiers.items():
            for node in lower:
                assert self.stored[tier, node.copies[tier].slot] == self._page(node), "a tier has other bytes"

    def teardown(self) -> None:
        if not hasattr(self, "caches"):
            return
        caches = self.caches
        while self.copies:
            self._end_copy(0, True)
        if self.restore is not None:
            self.end_restore(0, True)
        for reservation in caches._live.all():
            caches.release(reservation.id)
            if reservation.receive is not None:
                caches.uses.end_receive(reservation.id, 0)
            while reservation.num_uses:
                caches.uses.end(reservation.id)
        self.now += MAX_LEASE_S
        caches.expire()
        caches.check_invariants()
        state = caches.state()
        assert state.num_reservations == state.num_leased == 0
        assert state.num_free + state.num_cached == state.num_pages
        whole = caches.reserve(
            session_id="last",
            turn_id="t",
            epoch=1,
            attempt=0,
            salt=b"c" * 32,
            token_ids=[1] * (state.num_pages * SIZE - 1),
            time_to_live_s=1,
        )
        assert sorted(whole.pages) == list(range(state.num_pages)), "a cached page could not be evicted"
        caches.check_invariants()
        if not any(self.num_below.values()):
            assert caches.sessions.cached() == ["last"]


QUICK = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False
)
TestCaches = CacheMachine.TestCase
TestCaches.settings = QUICK


def test_pages_with_colliding_hashes_are_never_served_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine with hashes of three values: most pages collide."""

    def weak_hashes(parent: bytes, token_ids: Sequence[int], page_size: int) -> list[bytes]:
        digests: list[bytes] = []
        for start in range(0, len(token_ids) - page_size + 1, page_size):
            page = bytes(list(token_ids[start : start + page_size]))
            parent = bytes([hashlib.sha256(parent + page).digest()[0] % 3])
            digests.append(parent)
        return digests

    monkeypatch.setattr(holdings, "page_hashes", weak_hashes)
    monkeypatch.setattr(reservation_module, "page_hashes", weak_hashes)
    run_state_machine_as_test(CacheMachine, settings=settings(QUICK, max_examples=60))


def test_threads_reserve_compute_receive_and_release_at_once() -> None:
    """Sessions on several threads over one small pool: no error but refusals, every page back."""
    caches = Reservations(num_pages=40, page_size=SIZE, fingerprint="f", layout="l")
    epochs = itertools.count(1)
    num_done = [0] * 4
    errors: list[BaseException] = []

    def serve(worker: int) -> None:
        rng = random.Random(worker)
        for turn in range(300):
            session = f"s{rng.randrange(3)}"  # shared between threads: they supersede each other
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 50))]
            try:
                reservation = caches.reserve(
                    session_id=session,
                    turn_id=f"{worker}/{turn}",
                    epoch=next(epochs),
                    attempt=0,
                    salt=SALTS[0],
                    token_ids=prompt,
                    time_to_live_s=60,
                )
            except (Aborted, ResourceExhausted):
                continue
            try:
                half = (reservation.cached_len + len(prompt)) // 2
                if reservation.computed_len < half:
                    caches.uses.begin_receive(reservation.id, reservation.computed_len, half)
                    caches.uses.end_receive(reservation.id, half)
                caches.uses.begin(reservation.id)
                caches.advance(reservation.id, len(prompt))
                caches.append_token(reservation.id, 1)
                caches.uses.end(reservation.id)
                caches.check_invariants()
                num_done[worker] += 1
            except NotFound:
                pass
            caches.release(reservation.id, rng.choice([None, len(prompt)]))

    def run(worker: int) -> None:
        try:
            serve(worker)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    assert sum(num_done) > 100, num_done
    caches.check_invariants()
    state = caches.state()
    assert state.num_reservations == 0
    assert state.num_free + state.num_cached == 40
