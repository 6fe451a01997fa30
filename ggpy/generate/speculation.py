"""Speculation: cheap guesses of the next tokens, which one run then checks all at once.

Nothing here changes a text. A run evaluates the last token and the guessed ones, and the generation's own sampler chooses
token after token by the same bits as ever; at the first that isn't the guessed one, the rest is dropped.
"""

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from ..errors import ContextFullError, Error
from .options import Drafter
from .runner import Runner
from .sequence import TokenSequence

#: guesses for one generation in a run, at most
MOST = 31

_COST = 0.1  # of checking one more token, in runs of one token: 0.02 to 0.14 were measured
_LEARN = 0.1  # weight of the latest token in the moving rates

_SHORTEST, _LONGEST = 2, 16  # tokens of a match that are told apart
_CANDIDATES = 8  # earlier places that are looked at

_DISTRUST = 0.4  # share of right guesses below which a draft model is asked at every _REST-th token only
_REST = 8


class _Worth:
    """Whether guessing goes on: as long as a further guess brings more for its time than the run does without it.

    Parameters
    ----------
    cost : float
        Of a guess, in tokens' time.
    """

    def __init__(self, cost: float):
        self._cost, self._time = cost, 1.0
        self._all_right, self._expected = 1.0, 1.0  # how likely all guesses are right; how many tokens the run gives

    def one_more(self, rate: float) -> bool:
        """Whether a guess pays that is right so often where those before it are."""
        self._all_right *= rate
        pays = self._all_right > self._cost * self._expected / self._time
        self._expected += self._all_right
        self._time += self._cost
        return pays


class Lookup:
    """Guesses that the sequence goes on as it did where it had the same last tokens before.

    Of the latest such places it takes the one with the longest match. How often matches of each length were right it
    learns from every token, proposed or not, so that it proposes many in a copied text and next to none in prose.

    Parameters
    ----------
    most : int
        Guesses at once, at most.
    """

    def __init__(self, most: int = MOST):
        self._most = most
        self._latest: dict[tuple[int, int], int] = {}  # the place behind the latest occurrence of two tokens
        self._earlier: list[int] = []  # for each place, that behind the occurrence before; 0: none
        self._rates = [n / (n + 2) for n in range(_LONGEST + 1)]  # of right guesses, by the length of the match
        self._guess = (0, 0, 0)  # the latest: for which place, from which, and the length of the match

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        self._learn(ids)
        end = len(ids)
        source, length = self._find(ids)
        self._guess = (end, source, length)
        if not source:
            return []
        guesses: list[int] = []
        worth = _Worth(_COST)
        while len(guesses) < min(most, self._most) and worth.one_more(self._rates[min(length + len(guesses), _LONGEST)]):
            at = source + len(guesses)
            guesses.append(ids[at] if at < end else guesses[at - end])
        return guesses

    def _learn(self, ids: Sequence[int]) -> None:
        end, source, length = self._guess
        if source:
            for i in range(len(ids) - end):
                right = ids[source + i] == ids[end + i]
                at = min(length + i, _LONGEST)
                self._rates[at] += _LEARN * (right - self._rates[at])
                if not right:
                    return

    def _find(self, ids: Sequence[int]) -> tuple[int, int]:
        """The place to go on from, and the length of its match; (0, 0) if there is none."""
        end = len(ids)
        for at in range(len(self._earlier), end):
            pair = (ids[at - 2], ids[at - 1]) if at >= _SHORTEST else (-1, -1)
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = at
        guessed_for, source, _ = self._guess
        candidates = [source + end - guessed_for] if source else []  # first: a copy goes on where it was
        at = self._latest.get((ids[-2], ids[-1]), 0) if end >= _SHORTEST else 0
        while at and len(candidates) < _CANDIDATES:
            candidates.append(at)
            at = self._earlier[at]
        best, longest = 0, _SHORTEST - 1
        for at in candidates:
            n = 0
            while n < min(at, _LONGEST) and ids[at - 1 - n] == ids[end - 1 - n]:
                n += 1
            if n > longest:
                best, longest = at, n
        return (best, longest) if best else (0, 0)


class DraftModel:
    """Guesses what a smaller model of the same vocabulary finds likeliest, as long as that is likely enough.

    Parameters
    ----------
    runner : Runner
        The smaller model's.
    n_vocab : int
        Tokens of the model that checks.
    cost : float
        What a token costs, in tokens of the model that checks.
    """

    def __init__(self, runner: Runner, n_vocab: int, cost: float):
        self._runner, self._sequence = runner, TokenSequence(runner)
        self._n_vocab, self._cost = min(n_vocab, runner.arch.n_vocab), cost + _COST
        self._n_same = 0  # tokens of its sequence that are the text's
        self._guesses: list[tuple[int, float]] = []  # the latest, with their probabilities, those not proposed too
        self._guessed_for = 0  # where the first of them stands
        self._trust = 1.0  # how many guesses are right, of those that should be
        self._full = False

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        return self.propose_together([(self, ids, most)])[0]

    @classmethod
    def propose_together(cls, asked: "Sequence[tuple[DraftModel, Sequence[int], int]]") -> list[list[int]]:
        """As `propose`, for several drafters of one model in common runs.

        A drafter that is far behind, at the beginning of a long prompt, evaluates a piece of that and proposes nothing.
        """
        runner = asked[0][0]._runner
        runner.check()
        proposals: list[list[int]] = [[] for _ in asked]
        with runner.lock:
            n_left = runner.n_batch
            work: list[tuple[DraftModel, list[int], int, _Worth, list[int]]] = []
            for (drafter, ids, most), proposal in zip(asked, proposals, strict=True):
                behind = drafter._catch_up(ids)
                n = min(len(behind), n_left)
                if n and len(work) < runner.n_outputs:
                    n_left -= n
                    work.append((drafter, behind[:n], most if n == len(behind) else 0, _Worth(drafter._cost), proposal))
            while work := [w for w in work if w[0]._make_room(len(w[1]))]:
                logits = cls._extend([w[0] for w in work], [w[1] for w in work])
                for drafter, *_, proposal in work:
                    if not proposal:  # its sequence is the text
                        drafter._sequence.mark()
                going_on = []
                for (drafter, _, most, worth, proposal), row in zip(work, logits, strict=True):
                    if most and worth.one_more(drafter._guess(row)):
                        proposal.append(drafter._guesses[-1][0])
                        if len(proposal) < most:
                            going_on.append((drafter, proposal[-1:], most, worth, proposal))
                work = going_on
        return proposals

    @staticmethod
    def _extend(drafters: "Sequence[DraftModel]", ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Evaluates tokens of each; the logits after the last, float32 (n_vocab,)."""
        return TokenSequence.extend_together([d._sequence for d in drafters], ids)

    def _rests(self, ids: Sequence[int]) -> bool:
        """Learns from the text; whether it is not to guess now."""
        self._learn(ids)
        return self._full or (self._trust < _DISTRUST and len(ids) - self._guessed_for < _REST)

    def _catch_up(self, ids: Sequence[int]) -> list[int]:
        """The tokens that its sequence lacks; none if it is not to guess now."""
        if self._rests(ids):
            return []
        there, n = self._sequence.ids, self._n_same
        while n < min(len(there), len(ids) - 1) and there[n] == ids[n]:
            n += 1
        if self._sequence.is_marked and n < len(there):
            self._sequence.back_to_mark()
            n = min(n, len(there))
        self._sequence.keep(n)
        self._n_same, self._guesses, self._guessed_for = n, [], len(ids)
        return list(ids[n:])

    def _learn(self, ids: Sequence[int]) -> None:
        for (guess, probability), token in zip(self._guesses, ids[self._guessed_for :], strict=False):
            self._trust += _LEARN * ((guess == token) - self._trust * probability)
            if guess != token:
                break
        self._guesses = []

    def _make_room(self, n: int) -> bool:
        try:
            self._sequence.make_room(n)
        except ContextFullError:  # it can only get worse
            self._full = True
            self._sequence.close()
        return not self._full

    def _guess(self, logits: np.ndarray) -> float:
        """Guesses one more token; how likely it is right."""
        logits = logits[: self._n_vocab]
        token = int(logits.argmax())
        probability = float(1 / np.exp(logits - logits[token]).sum())
        self._guesses.append((token, probability))
        return self._trust * probability


class NextTokens(DraftModel):
    """Guesses by the layer that the model itself carries for that (`NextN`): one token by what the model made of those
    before, and further ones by what the layer made of its own.

    Of a text it knows what `see` has told it. Its sequence has, at place i, the token behind the i-th that it was told of.

    Parameters
    ----------
    runner : Runner
        The layer's.
    n_vocab, cost
        As those of `DraftModel`.
    """

    def __init__(self, runner: Runner, n_vocab: int, cost: float):
        super().__init__(runner, n_vocab, cost)
        self._start = self._end = 0  # the positions that it was told of
        self._seen: list[np.ndarray] = []  # what it was told and hasn't evaluated, (n, n_embd) each
        self._latest = np.empty((1, runner.arch.n_embd), np.float32)  # what its own last guess was made of

    def see(self, position: int, hidden: np.ndarray) -> None:
        """Tells it what logits were made of, float32 (n_tokens, n_embd), for a text's tokens from this position on."""
        if position > self._end or not self._end:  # others have evaluated those before
            self._sequence.keep(0)
            self._n_same, self._seen, self._start, self._end = 0, [], position, position
        new = hidden[self._end - position :]
        if len(new):
            self._seen.append(new.copy())
            self._end += len(new)

    def _catch_up(self, ids: Sequence[int]) -> list[int]:
        if self._rests(ids) or self._end != len(ids) - 1:
            return []
        self._sequence.keep(self._n_same)  # without what it made of its own guesses
        self._guesses, self._guessed_for = [], len(ids)
        return list(ids[self._start + self._n_same + 1 :])

    @staticmethod
    def _extend(drafters: "Sequence[DraftModel]", ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        runner, own = drafters[0]._runner, [d for d in drafters if isinstance(d, NextTokens)]
        hidden = np.concatenate([d._take(len(more)) for d, more in zip(own, ids, strict=True)])
        spans = [d._sequence.span(more, 1) for d, more in zip(own, ids, strict=True)]
        logits, made = runner.run_both(spans, hidden)
        for drafter, more, rows in zip(own, ids, made, strict=True):
            drafter._sequence.advance(more)
            drafter._latest = rows[-1:].copy()
        return [rows[0] for rows in logits]

    def _take(self, n: int) -> np.ndarray:
        """What the model made of the next n tokens; where it hasn't any, what the layer made of its last."""
        if not self._seen:
            return self._latest
        rows = np.concatenate(self._seen)
        self._seen = [rows[n:]] if len(rows) > n else []
        self._n_same += n
        return rows[:n]


def propose(asked: Sequence[tuple[Drafter, list[int], int]], n_vocab: int) -> "list[list[int] | Exception]":
    """What several generations' drafters propose, or what each failed with.

    Parameters
    ----------
    asked : sequence of (Drafter, list of int, int)
        See `Drafter.propose`. The ids are not changed: others than this module's own drafters get copies.
    n_vocab : int
    """
    results: list[list[int] | Exception] = [[] for _ in asked]
    models: dict[Runner, list[int]] = {}
    for i, (drafter, ids, most) in enumerate(asked):
        if isinstance(drafter, DraftModel):
            models.setdefault(drafter._runner, []).append(i)
            continue
        try:
            if isinstance(drafter, Lookup):
                results[i] = drafter.propose(ids, most)
            else:
                results[i] = _checked(drafter, drafter.propose(list(ids), most), n_vocab)[:most]
        except Exception as error:
            results[i] = error
    for places in models.values():
        try:
            kind = type(asked[places[0]][0])
            together = kind.propose_together([asked[i] for i in places])  # type: ignore[attr-defined]
            for i, proposal in zip(places, together, strict=True):
                results[i] = proposal
        except Exception as error:
            for i in places:
                results[i] = error
    return results


def _checked(drafter: Drafter, proposal: Sequence[int], n_vocab: int) -> list[int]:
    name = type(drafter).__name__
    try:
        ids = list(proposal)
    except TypeError:
        raise Error(f"the drafter {name} must propose a list of token ids, not {type(proposal).__name__}") from None
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= i < n_vocab:
            raise Error(f"the drafter {name} proposed {i!r}, which is no token of {n_vocab}")
    return [int(i) for i in ids]
