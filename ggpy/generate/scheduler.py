"""Runs many generations together: each run takes the next token of those that generate, and pieces of others' prompts."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from ..errors import ContextFullError, Error
from ..graph import pages_of
from ..kernels.table import SLAB
from .interrupts import later
from .page_files import PageFiles
from .prefixes import Prefix, common
from .request import MOST_DRAFTED, Request
from .runner import Runner
from .sequence import TokenSequence
from .snapshots import SNAPSHOT_TOKENS
from .speculation import NextTokens, propose

_MOST_RUNNING = 64  # generations at once; others wait
_PIECE_SECONDS = 0.25  # that pieces of prompts may hold up those that generate
_FIRST_PIECE = 2 * SLAB  # tokens of them before their rate is known
_WORTH_COPYING = 4  # tokens of a page that others have computed
_GIVEN_WAY = 0.001  # seconds in which a thread takes a lock that it waits for: else who released it has it again first
_FAR_BEHIND = 8  # tokens that a state lacks: then a run without guesses makes up for them
_AHEAD = 256  # pieces that nobody takes, before their generation waits


class Scheduler:
    """Steps generations of a model forward, together. Whoever wants a generation's next text steps for all (`advance`).

    What a generation gives doesn't depend on its company: values are the same bits whoever is in a run, and each has its
    own sampler. So it doesn't matter either that runs are cut to measured times.

    Attributes
    ----------
    files : PageFiles or None
        What has been computed in earlier processes, and keeps it for later ones.

    Parameters
    ----------
    runner : Runner
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._lock = threading.Lock()  # of the step: those who wait for it find, mostly, that their text is there
        self._stepping = 0  # the thread that holds it
        self._submitted: deque[Request] = deque()  # by any thread; all else is touched by whoever holds the lock
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # by age
        self._most = min(_MOST_RUNNING, runner.n_batch, runner.n_outputs)
        if runner.has_states:
            self._most = min(self._most, runner.pages.states.n_slots // 2)
        self._hooks: tuple = ()
        self._rate = 0.0  # tokens of prompts per second
        self.files: PageFiles | None = None

    @property
    def most(self) -> int:
        """Generations that are at work at once; others wait."""
        return self._most

    @property
    def room(self) -> int:
        """Generations that are worth having at once, those that wait included."""
        return 2 * self._most

    def give_way(self) -> int:
        """For other users of the runner, between two runs: lets those that generate go first; how many tokens the next run
        may take without holding them up."""
        generating = bool(self._running)
        if generating:
            time.sleep(_GIVEN_WAY)
        return self._limit(generating)

    def submit(self, request: Request) -> None:
        """Adds a generation; it joins the next step that has room."""
        self._submitted.append(request)

    def advance(self, request: Request) -> None:
        """Steps until a generation has text or has ended; one that is cancelled has."""
        while not request.ready:
            self.step(request)

    def step(self, request: Request) -> None:
        """Makes one run, for all, unless the generation has text or has ended."""
        self._check()
        with self._lock:
            self._stepping = threading.get_ident()
            try:
                if not request.ready:
                    self._step(request)
            finally:
                self._stepping = 0

    def _check(self) -> None:
        """Raises Error where waiting for the lock would never end, too: in the handler of a signal that came in a step."""
        self._runner.check()
        if self._stepping == threading.get_ident() and self._lock.locked():
            raise Error(f"{self._runner.file.path}: a signal's handler can't use the model that it interrupts")

    def reap(self) -> None:
        """Gives back what cancelled generations hold, unless a step is under way, which the next one follows."""
        if not self._runner.is_elsewhere and self._lock.acquire(blocking=False):
            try:
                if not self._runner.closed:
                    with self._runner.lock:
                        self._drop_ended()
            finally:
                self._lock.release()

    # A step; everything below runs with both locks held

    def _step(self, wanted: Request) -> None:
        runner = self._runner
        with runner.lock:
            runner.check()
            self._check_hooks()
            self._drop_ended()
            self._find(wanted)
            self._admit()
        drafts = self._drafts(wanted)
        with runner.lock:
            runner.check()
            self._check_hooks()
            self._drop_ended()
            if wanted.done:  # its drafter failed
                return
            single, prompts = self._ready(wanted)
            drafts = {r: draft for r, draft in drafts.items() if draft and r in single}
            for r in drafts:
                r.held.mark()
            # A request may be sent away to make room for another.
            single = [r for r in single if r.sequence is not None and self._make_room(r, r.n_left)]
            work = [(r, r.tokens[-r.n_left :]) for r in single if r.sequence is not None]
            taken = sum(len(ids) for _, ids in work) + sum(map(len, drafts.values()))
            limit = min(runner.n_batch - taken, self._limit(bool(work)))
            n_outputs = runner.n_outputs - len(work) - sum(map(len, drafts.values()))
            prompts = [r for r in prompts if r.sequence is not None]
            work += self._pieces(prompts, limit, n_outputs, [r for r, _ in work])
            work = [(r, ids) for r, ids in work if r.sequence is not None]
            if not work:
                self._prefer(wanted)
                return
            guesses = [self._fitting(r, len(ids), drafts.get(r, [])) for r, ids in work]
            spans = [
                r.held.span(ids + draft, r.n_wanted(len(ids)) + len(draft))
                for (r, ids), draft in zip(work, guesses, strict=True)
            ]
            started = time.perf_counter()
            made: Sequence[np.ndarray | None] = [None] * len(spans)
            if any(isinstance(r.drafter, NextTokens) for r, _ in work):
                results, made = runner.run_both(spans)
            else:
                results = runner.run(spans)
            n_tokens = sum(len(span.ids) for span in spans)
            if n_tokens >= SLAB:
                self._rate = n_tokens / (time.perf_counter() - started)
            for (r, ids), draft in zip(work, guesses, strict=True):
                if not (draft and runner.has_states):  # a state with guesses isn't that of the tokens
                    r.held.advance(ids)
                r.n_evaluated = max(r.n_evaluated, min(len(r.held.ids), r.n_prompt))
            self._check_hooks()  # another thread may have set some before the run
            # A random number that was drawn must become a token, and a token text.
            with later() if all(r.is_ours for r, _ in work) else nullcontext():
                for (r, ids), draft, span, logits, rows in zip(work, guesses, spans, results, made, strict=True):
                    n_right = self._take(r, ids, draft, logits)
                    if isinstance(r.drafter, NextTokens) and rows is not None:
                        r.drafter.see(span.n_past, rows[: len(ids) + n_right])
                    self._share(r)
            self._drop_ended()

    def _drafts(self, wanted: Request) -> dict[Request, list[int]]:
        """What the drafters of those that generate guess: in equal shares, and so few that room for prompts is left.

        The runner isn't locked here: a draft model's lock is never waited for by who holds another's.
        """
        runner, n = self._runner, len(self._running)
        asking = [
            (r, drafter)
            for r in self._running
            if (drafter := r.drafter) is not None
            and _may_go_on(r, wanted)
            and r.first_wanted == len(r.tokens) - 1
            and (r.n_left == 1 or (r.is_behind and r.n_left <= _FAR_BEHIND))
        ]
        share = min((runner.n_batch - n) // 2, runner.n_outputs - n, MOST_DRAFTED) // max(1, len(asking))
        asked = [(r, drafter, most) for r, drafter in asking if (most := min(share, r.n_draftable(runner.n_ctx))) > 0]
        proposals = propose([(drafter, r.tokens, most) for r, drafter, most in asked], runner.arch.n_vocab)
        drafts = {}
        for (r, _, _), proposal in zip(asked, proposals, strict=True):
            if isinstance(proposal, Exception):
                r.error = proposal
            else:
                drafts[r] = proposal
        return drafts

    def _fitting(self, r: Request, n: int, draft: list[int]) -> list[int]:
        """As much of a draft, behind n tokens, as there are pages for: nobody is sent away for it."""
        sequence = r.held
        if self._runner.has_states:  # a snapshot's place is a run's end
            draft = draft[: -(len(sequence.ids) + n) % SNAPSHOT_TOKENS] if sequence.is_marked else []
        if not draft:
            return []
        try:
            while len(sequence.pages) * SLAB < len(sequence.ids) + n + len(draft):
                sequence.pages.append(self._runner.take_page())
        except ContextFullError:
            pass
        return draft[: len(sequence.pages) * SLAB - len(sequence.ids) - n]

    def _take(self, r: Request, ids: list[int], draft: list[int], logits: np.ndarray) -> int:
        """Chooses tokens as long as they are those of the draft, behind `ids`; its rest is dropped. How many were right."""
        sequence, n = r.held, len(logits) - len(draft)
        self._choose(r, logits[:n])
        n_right = 0
        if not draft:
            return n_right
        for guess, row in zip(draft, logits[n:], strict=True):
            if r.error is not None or r.tokens[-1] != guess:
                break
            n_right += 1
            if r.done:
                break
            self._choose(r, row[None])
        r.n_drafted += len(draft)
        r.n_accepted += n_right
        if not self._runner.has_states:
            sequence.advance(draft[:n_right])
            sequence.keep(len(sequence.ids))
        elif n_right == len(draft):
            sequence.advance(ids + draft)
            sequence.unmark()
        else:  # what is right of it is evaluated once more, in the next run
            sequence.back_to_mark()
        return n_right

    def _choose(self, r: Request, logits: np.ndarray) -> None:
        try:
            self._runner.check_finite(logits)
        except Error as error:
            r.error = error
        else:
            r.take(logits, self._runner.n_ctx)

    def _check_hooks(self) -> None:
        """Under other hooks, other values: nothing that was computed before is shared."""
        hooks = tuple(self._runner.hooks.items())
        if hooks != self._hooks:
            self._hooks = hooks
            self._runner.prefixes.clear()
            for r in self._running:
                r.prefix = None

    def _drop_ended(self) -> None:
        """Lets go of those that are done or cancelled."""
        while self._submitted:
            self._waiting.append(self._submitted.popleft())
        for r in [r for r in self._running if r.done or r.cancelled]:
            self._release(r)
            self._running.remove(r)
            r.drafter = None
        if any(r.cancelled for r in self._waiting):
            self._waiting = deque(r for r in self._waiting if not r.cancelled)

    def _find(self, wanted: Request) -> None:
        """An interrupt may have come while a request went from one queue to another: then it is in none."""
        if wanted not in self._running and wanted not in self._waiting:
            self._release(wanted)
            self._waiting.appendleft(wanted)

    def _admit(self) -> None:
        runner = self._runner
        while self._waiting and len(self._running) < self._most:
            request = self._waiting[0]
            need = pages_of(len(request.tokens)) + len(self._running)
            lacks = need - runner.pages.n_free
            if self._running and lacks > 0 and runner.prefixes.n_unused() < lacks:
                return
            self._waiting.popleft()
            request.sequence = TokenSequence(runner)
            request.prefix, request.n_known = runner.prefixes.root, 0
            request.start()
            if self.files is not None:
                self.files.find(request.tokens[: request.first_wanted])
            self._running.append(request)

    def _prefer(self, wanted: Request) -> None:
        """Nobody can go on, since all have text that isn't taken: one of them makes room for the one that is waited for."""
        if wanted.sequence is None and self._running:
            sent_away = self._running.pop()
            self._release(sent_away)
            self._waiting.remove(wanted)
            self._waiting.appendleft(wanted)
            self._waiting.append(sent_away)

    def _ready(self, wanted: Request) -> tuple[list[Request], list[Request]]:
        """Those that go on to their next token, and those with more left than that takes."""
        single: list[Request] = []
        prompts: list[Request] = []
        room = (self._runner.n_batch - len(self._running)) // 2
        for r in self._running:
            if not _may_go_on(r, wanted):
                continue
            if len(r.held.ids) > r.first_wanted or not r.held.is_current:
                # An interrupt came between its run and what its logits are for: once more, with the same bits.
                self._cut(r, min(r.first_wanted, len(r.held.ids)))
            more = r.n_left - 1
            if more and (more > room or not r.is_behind):
                prompts.append(r)
            else:
                room -= more
                single.append(r)
        return single, prompts

    def _limit(self, others_generate: bool) -> int:
        """Tokens of prompts in a run."""
        if not others_generate:
            return self._runner.n_batch
        return max(SLAB, int(self._rate * _PIECE_SECONDS)) if self._rate else _FIRST_PIECE

    def _pieces(
        self, requests: list[Request], limit: int, n_outputs: int, single: list[Request]
    ) -> list[tuple[Request, list[int]]]:
        """The next tokens of prompts: equal shares, and the rest to the oldest."""
        active: list[Request] = []
        pages: dict[Prefix, list[Request]] = {}  # who works on a page after these
        for r in single:
            if r.prefix is not None:
                pages.setdefault(r.prefix, []).append(r)
        for r in requests:
            waits = self._reuse_states(r, active) if self._runner.has_states else self._reuse(r, pages)
            if not waits:
                active.append(r)
        work = []
        for i, r in enumerate(active):
            if r.sequence is None:  # sent away for an older one
                continue
            past = len(r.sequence.ids)
            share = max(SLAB, limit // (len(active) - i))
            n = min(r.n_left, share, limit, r.first_wanted - past + n_outputs)
            if self._runner.has_states:
                n = min(n, r.next_stop() - past)
            if n > 0 and self._make_room(r, n):
                work.append((r, r.tokens[past : past + n]))
                limit -= n
                n_outputs -= r.n_wanted(n)
        return work

    def _reuse(self, r: Request, pages: dict[Prefix, list[Request]]) -> bool:
        """Takes what others have computed of a prompt; True if it waits for one that computes the same now."""
        prefixes, sequence = self._runner.prefixes, r.held
        if r.prefix is None:
            return False
        known = r.prefix
        while (past := len(sequence.ids)) % SLAB == 0 and past + SLAB <= r.first_wanted:
            ids = tuple(r.tokens[past : past + SLAB])
            child = r.prefix.children.get(ids)
            if child is None:
                break
            sequence.adopt([child.page], ids)
            r.prefix, r.n_known = child, r.n_known + 1
            self._count_reused(r, SLAB)
        if r.prefix is not known:
            prefixes.touch(r.prefix)
        workers = pages.setdefault(r.prefix, [])
        if past % SLAB == 0 and past < r.first_wanted:
            ids = tuple(r.tokens[past : min(past + SLAB, r.first_wanted)])
            page, most = prefixes.nearest(r.prefix, ids)
            for other in workers:
                own = other.held
                n = common(other.tokens[past : past + SLAB], ids)
                there = min(n, len(own.ids) - past)
                if n >= _WORTH_COPYING and n > most:
                    if there < n:
                        return True
                    page, most = own.pages[past // SLAB], n
            if most >= _WORTH_COPYING:
                sequence.adopt([page], ids[:most])
                self._count_reused(r, most)
        workers.append(r)
        return False

    def _reuse_states(self, r: Request, active: list[Request]) -> bool:
        """The same in models with states, where what others have computed is of use up to a snapshot, and one who waits
        asks for it."""
        sequence, tokens, n_most = r.held, r.tokens, r.first_wanted
        if r.prefix is None:
            return False
        past = len(sequence.ids)
        if past == r.n_known * SLAB:
            path, at = [r.prefix], past
            while at + SLAB <= n_most and (child := path[-1].children.get(tuple(tokens[at : at + SLAB]))) is not None:
                path.append(child)
                at += SLAB
            reached = at
            for n in range(min(SLAB - 1, n_most - at), 0, -1):  # where a sequence ended
                if (child := path[-1].children.get(tuple(tokens[at : at + n]))) is not None and child.slot >= 0:
                    path.append(child)
                    at += n
                    break
            while len(path) > 1 and path[-1].slot < 0:
                at -= len(path.pop().ids)
            if at > past:
                sequence.adopt([p.page for p in path[1:]], tokens[past:at], path[-1].slot)
                self._runner.snapshots.touch(path[-1].slot)
                r.prefix = path[-1] if at % SLAB == 0 else path[-2]
                r.n_known = at // SLAB
                self._runner.prefixes.touch(path[-1])
                self._count_reused(r, at - past)
            if reached > at:  # others began alike: there may be more
                r.stops.add(reached)
        past = len(sequence.ids)
        for other in active:
            alike = _pages_alike(tokens[:n_most], other.tokens) * SLAB
            if alike > max(past, len(other.held.ids)):
                other.stops.add(alike)
                return True
        return False

    def _count_reused(self, r: Request, n: int) -> None:
        if len(r.tokens) == r.n_prompt:  # not when it comes back after it was sent away
            r.n_reused += n

    def _share(self, r: Request) -> None:
        """Lets others have the pages that are full now."""
        sequence, prefixes = r.held, self._runner.prefixes
        while r.prefix is not None and (r.n_known + 1) * SLAB <= len(sequence.ids):
            at = r.n_known
            page = sequence.pages[at]
            r.prefix = prefixes.add(r.prefix, tuple(sequence.ids[at * SLAB : (at + 1) * SLAB]), page)
            r.n_known += 1
            if r.prefix.page != page:  # somebody was first, with the same bits
                self._runner.pages.share(r.prefix.page)
                sequence.pages[at] = r.prefix.page
                self._runner.pages.give(page)
            if self.files is not None:
                self.files.keep(r.prefix)
        n = len(sequence.ids)
        if n in r.stops or n % SNAPSHOT_TOKENS == 0:
            r.stops.discard(n)
            self._leave_snapshot(sequence, r.prefix if n == r.n_known * SLAB else None)

    def _leave_snapshot(self, sequence: TokenSequence, prefix: Prefix | None) -> None:
        """Makes a sequence's state that of a prefix, which has all of its tokens."""
        if sequence.slot >= 0 and sequence.is_current and prefix is not None and prefix.slot < 0:
            prefix.snapshot = self._runner.snapshots.add(sequence.slot, len(sequence.ids))
            if self.files is not None:
                self.files.keep(prefix)

    def _cut(self, r: Request, n: int) -> None:
        """Lets a sequence forget all but its first n tokens, or some more in models with states."""
        has_states = self._runner.has_states
        while r.prefix is not None and r.n_known and (r.n_known * SLAB > n or (has_states and r.prefix.slot < 0)):
            r.prefix, r.n_known = r.prefix.parent, r.n_known - 1
        if not has_states:
            r.held.go_back(n)
        elif r.prefix is None or not r.n_known:
            r.held.go_back(0)
        else:
            r.held.go_back(r.n_known * SLAB, r.prefix.slot)

    def _make_room(self, r: Request, n: int) -> bool:
        """Takes pages for n tokens, if need be from the youngest, which waits; False if that is the request itself."""
        while r.sequence is not None:
            try:
                r.sequence.make_room(n)
                return True
            except ContextFullError as error:
                youngest = self._running[-1]
                if len(self._running) == 1:
                    r.error = error
                    self._running.remove(r)
                    self._release(r)
                    return False
                self._running.remove(youngest)
                self._release(youngest)
                self._waiting.appendleft(youngest)
        return False

    def _release(self, r: Request) -> None:
        """Gives a request's pages back; what is in them stays known until others need the room."""
        sequence = r.sequence
        if sequence is None:
            return
        rest = tuple(sequence.ids[r.n_known * SLAB :])
        whole = None if rest else r.prefix
        if r.prefix is not None and rest and len(rest) < SLAB:
            page = sequence.pages[r.n_known]
            if self._runner.pages.holders(page) == 1:  # a page of two prefixes would never be free again
                whole = self._runner.prefixes.add(r.prefix, rest, page)
        self._leave_snapshot(sequence, whole)
        sequence.close()
        r.sequence = r.prefix = None

    # What prompts may begin with, as sequences

    def remember(self, sequence: TokenSequence) -> None:
        """Lets prompts that begin like a sequence have its pages.

        Raises
        ------
        Error
            The model has hooks, which would have changed the values in them.
        """
        self._check()
        runner, prefixes = self._runner, self._runner.prefixes
        with self._lock, runner.lock:
            self._check_hooks()
            if runner.hooks:
                raise Error(f"{runner.file.path}: the model has hooks, which would have changed these values")
            at: Prefix | None = prefixes.root
            for first, page in zip(range(0, len(sequence.ids), SLAB), sequence.pages, strict=True):
                ids = tuple(sequence.ids[first : first + SLAB])
                whole = len(ids) == SLAB or runner.pages.holders(page) == 1  # as in _release
                at = prefixes.add(at, ids, page) if at is not None and whole else None
            self._leave_snapshot(sequence, at)

    def recall(self, request: Request) -> TokenSequence:
        """A sequence of as many of a request's tokens as are known. The request is for nothing else."""
        self._check()
        sequence = TokenSequence(self._runner)
        with self._lock, self._runner.lock:
            self._check_hooks()
            request.sequence, request.prefix = sequence, self._runner.prefixes.root
            request.tokens.append(request.tokens[-1])  # what may be taken ends before the last one
            if self._runner.has_states:
                self._reuse_states(request, [])
            else:
                self._reuse(request, {})
            request.sequence = request.prefix = None
        return sequence

    def close(self) -> None:
        """Ends all generations. Waits for a step of another thread."""
        self._check()
        with self._lock, self._runner.lock:
            for r in [*self._running, *self._waiting, *self._submitted]:
                r.error = Error(f"{self._runner.file.path}: the model is closed")
                r.sequence = r.prefix = None
            self._running.clear()
            self._waiting.clear()
            self._submitted.clear()
        if self.files is not None:
            self.files.close()


def _may_go_on(r: Request, wanted: Request) -> bool:
    """Whether its text is taken, or will be."""
    return len(r.pieces) < _AHEAD or r is wanted


def _pages_alike(a: list[int], b: list[int]) -> int:
    """How many pages two sequences have in common at their beginning."""
    n = 0
    while (n + 1) * SLAB <= min(len(a), len(b)) and a[n * SLAB : (n + 1) * SLAB] == b[n * SLAB : (n + 1) * SLAB]:
        n += 1
    return n
