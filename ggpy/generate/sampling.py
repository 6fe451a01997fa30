"""Choosing the next token from its logits: small functions over candidates, and the sampler that takes them in order.

The steps and their order are those of llama.cpp (`common/sampling.cpp`): what changes logits, what leaves tokens out, the
temperature, the draw. What options there are stands in `options.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import Error
from .options import Logits, Processor, Sampler, SamplingOptions, checked_options, option_table, with_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .constraints import CallsConstraint, Constraint
    from .tokenizer import Tokenizer

Ids: TypeAlias = NDArray[np.intp]

#: DRY's sequence breakers: by the token that begins one, the tokens that may go on.
Breakers: TypeAlias = Mapping[int, Sequence[tuple[int, ...]]]

# How many groups of logits have one maximum each when the highest are looked for. Groups are interleaved: maxima of columns
# are several times as fast as those of rows.
_GROUPS = 1024
# How many of the most likely tokens are ranked first when only a share of the probability bounds them, and how many times
# as many after that.
_FIRST_RANKED, _MORE_RANKED = 256, 8
# Sums of probabilities that come this near to a share have reached it: float32 logits don't tell them apart.
_SHARE_ROUNDING = 2.0**-24
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
# Temperatures beyond act as these: numbers stay finite.
_COLDEST, _HOTTEST = 1e-30, 1e30


class Candidates(NamedTuple):
    """Tokens that may be chosen.

    Attributes
    ----------
    ids : intp array (n,)
    logits : float32 array (n,)
    ranked : bool
        The most likely comes first, of equal ones the lower id; otherwise ids rise.
    """

    ids: Ids
    logits: Logits
    ranked: bool = False

    @property
    def highest(self) -> float:
        """The highest logit."""
        return float(self.logits[0] if self.ranked else self.logits.max())

    def taken(self, which: slice | NDArray[np.bool_] | Ids) -> Candidates:
        """Some of them, in the same order."""
        return Candidates(self.ids[which], self.logits[which], self.ranked)

    def best(self, places: Ids, n: int | None = None) -> Candidates:
        """The n most likely of those at some rising places, ranked; for candidates that aren't."""
        logits = self.logits[places]
        order = np.argsort(-logits, kind="stable")[:n]
        return Candidates(self.ids[places[order]], logits[order], True)


# ---- What changes logits ----


def biased(logits: Logits, bias: Mapping[int, float]) -> Logits:
    """Adds to the logits of some tokens (OpenAI's `logit_bias`)."""
    ids = _inside(np.fromiter(bias, np.intp, len(bias)), logits)
    added = np.fromiter(bias.values(), np.float64, len(bias))
    logits = _changed(logits, ids, added + logits[ids])
    logits[ids[added == -np.inf]] = -np.inf
    return logits


def penalized(logits: Logits, recent: Sequence[int], repetition: float, frequency: float, presence: float) -> Logits:
    """Penalizes recent tokens.

    Positive logits are divided by `repetition`, others multiplied with it (Keskar et al. 2019, "CTRL", section 4.1, which
    only divides); then `frequency` for each time that the token is there, and `presence` once, are subtracted (OpenAI's
    API reference).
    """
    ids, counts = np.unique(np.asarray(recent, np.intp), return_counts=True)
    values = logits[_inside(ids, logits)].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.where(values > 0, values / repetition, values * repetition)
        values = np.clip(values, -_HIGHEST, _HIGHEST)  # infinite, they would be no numbers where the rest is, too
        return _changed(logits, ids, values - counts * frequency - presence)


def dry_penalized(
    logits: Logits, recent: Sequence[int], multiplier: float, base: float, allowed_length: int, breakers: Breakers
) -> Logits:
    """Penalizes tokens that would go on with a repetition ("Don't repeat yourself", p-e-w,
    github.com/oobabooga/text-generation-webui/pull/5677).

    If the last n tokens stand in `recent` before, a token that followed them there loses
    multiplier · base^(n - allowed_length), for its longest n, from `allowed_length` on. Sequences don't reach over a
    breaker, and what is a breaker by itself loses nothing.
    """
    tokens = np.asarray(recent, np.intp)
    _inside(tokens, logits)
    n = len(tokens)
    # Beyond this the penalty is higher than any float32.
    longest_told_apart = allowed_length + (math.log(_HIGHEST) / math.log(base) if base > 1 else 0)
    limit = int(min(n, longest_told_apart, _since_breaker(recent, breakers)))
    if n <= allowed_length or limit < allowed_length:
        return logits
    lengths = np.zeros(n - 1, np.intp)  # how much of the end also ends here
    ends = np.arange(n - 1)
    for length in range(limit):
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[n - 1 - length]]
        if not len(ends):
            break
        lengths[ends] = length + 1
    ends = np.flatnonzero(lengths >= allowed_length)
    ends = ends[np.argsort(lengths[ends], kind="stable")]
    longest = dict(zip(tokens[ends + 1].tolist(), lengths[ends].tolist(), strict=True))  # the last, longest one counts
    longest = {token: length for token, length in longest.items() if () not in breakers.get(token, ())}
    ids = np.fromiter(longest, np.intp, len(longest))
    more = np.fromiter(longest.values(), np.float64, len(longest)) - allowed_length
    penalties = np.exp(np.minimum(math.log(multiplier) + more * math.log(base), math.log(_HIGHEST)))
    return _changed(logits, ids, logits[ids] - penalties)


def _since_breaker(recent: Sequence[int], breakers: Breakers) -> int:
    """How many tokens stand after the last sequence breaker."""
    n = len(recent)
    for i in range(n if breakers else 0):
        matches = [t for t in breakers.get(recent[n - 1 - i], ()) if t == tuple(recent[n - i : n - i + len(t)])]
        if matches:
            return i - max(map(len, matches))
    return n


def sequence_breakers(tokenizer: Tokenizer, texts: Sequence[str]) -> Breakers:
    """The tokens by which texts may be written: tokens that hold one, and those that end with the beginning of one, with
    the tokens of its rest."""
    known = _breakers.setdefault(tokenizer, {})
    key = tuple(texts)
    if key not in known:
        found: dict[int, list[tuple[int, ...]]] = {}
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        for text in dict.fromkeys(texts):
            whole = text.encode()
            starts = [(whole[:n], whole[n:]) for n in range(1, len(whole))]
            rests: dict[bytes, tuple[int, ...]] = {}
            for i, piece in enumerate(pieces):
                if whole in piece:
                    found.setdefault(i, []).append(())
                    continue
                for start, rest in starts:
                    if piece.endswith(start):
                        if rest not in rests:
                            text_left = rest.decode(errors="replace")
                            rests[rest] = tuple(tokenizer.encode(text_left, special=False, bos=False))
                        found.setdefault(i, []).append(rests[rest])
        known[key] = found
    return known[key]


_breakers: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], Breakers]] = WeakKeyDictionary()


def _changed(logits: Logits, ids: Ids, values: NDArray[np.floating]) -> Logits:
    """A copy with other values: what is finite stays so as float32, since no penalty rules a token out; the rest stays."""
    logits = logits.copy()
    old = logits[ids]
    logits[ids] = np.where(np.isfinite(old), np.minimum(np.maximum(values, _LOWEST), _HIGHEST), old)
    return logits


def _inside(ids: Ids, logits: Logits) -> Ids:
    if len(ids) and (ids.min() < 0 or ids.max() >= len(logits)):
        raise Error(f"ids must be from 0 to {len(logits) - 1}, got {ids.min()} to {ids.max()}")
    return ids


# ---- What leaves tokens out ----


def top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    """Leaves logits up to n standard deviations below the highest (Tang et al. 2024, "Top-nσ", algorithm 1)."""
    logits = candidates.logits.astype(np.float64)
    finite = logits[logits > -np.inf]
    return candidates.taken(logits >= float(finite.max()) - n * float(finite.std()))


def top_k(candidates: Candidates, k: int) -> Candidates:
    """Leaves the k most likely (Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4)."""
    if candidates.ranked:
        return candidates.taken(slice(k))
    logits = candidates.logits
    n = len(logits)
    groups = max(_GROUPS, 4 * k)
    if n >= 4 * groups:
        # The k-th highest of the groups' maxima is no higher than the k-th highest logit: few logits reach it, and one
        # cheap pass finds them.
        maxima = logits[: n // groups * groups].reshape(-1, groups).max(axis=0)
        bound = np.partition(maxima, groups - k)[groups - k]
    elif n > k:
        bound = np.partition(logits, n - k)[n - k]
    else:
        return ranked(candidates)
    # Where nearly all are ruled out, those aren't worth ranking.
    places = np.flatnonzero(logits >= bound if bound > -np.inf else logits > bound)
    return candidates.best(places, k)


def typical_p(candidates: Candidates, p: float) -> Candidates:
    """Leaves the fewest tokens that hold the share p of the probability, those first whose surprise is nearest to its mean
    (Meister et al. 2023, "Locally Typical Sampling", section 3)."""
    probabilities = softmax(candidates)
    seen = probabilities > 0
    surprise = -np.log(probabilities, where=seen, out=np.full(len(seen), -np.inf))
    entropy = probabilities[seen] @ surprise[seen]
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    n = _n_holding(probabilities[order], p)
    return candidates.taken(np.sort(order[:n]))


def top_p(candidates: Candidates, p: float) -> Candidates:
    """Leaves the fewest most likely tokens that hold the share p of the probability (Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration", section 3.1)."""
    highest = candidates.highest
    n = len(candidates.ids)
    if candidates.ranked or n <= _FIRST_RANKED:
        candidates = ranked(candidates)
        weights = np.exp(candidates.logits.astype(np.float64) - highest)
        return candidates.taken(slice(_n_holding(weights, p)))
    with np.errstate(over="ignore"):
        total = float(np.exp(candidates.logits - np.float32(highest)).sum(dtype=np.float64))
    n_ranked = _FIRST_RANKED
    while True:
        first = top_k(candidates, n_ranked)
        enough = _n_holding(np.exp(first.logits.astype(np.float64) - highest), p, total)
        if enough < n_ranked or n_ranked == n:
            return first.taken(slice(enough))
        n_ranked = min(n, n_ranked * _MORE_RANKED)


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Leaves tokens at least p times as likely as the most likely one (Nguyen et al. 2024, "Min-p Sampling", section 3);
    one of them at least."""
    if p > 1:
        return top_k(candidates, 1)
    bound = np.float32(max(_LOWEST, candidates.highest + math.log(p)))
    kept = candidates.logits >= bound
    return candidates.taken(slice(np.count_nonzero(kept))) if candidates.ranked else candidates.best(np.flatnonzero(kept))


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Leaves out all but the least likely of the tokens whose probability reaches the threshold ("Exclude top choices",
    p-e-w, github.com/oobabooga/text-generation-webui/pull/6335)."""
    probabilities = softmax(candidates)
    likely = np.flatnonzero((probabilities >= threshold) & (probabilities > 0))
    if len(likely) < 2:
        return candidates
    kept = np.ones(len(probabilities), np.bool_)
    kept[likely] = False
    kept[likely[::-1][np.argmin(probabilities[likely[::-1]])]] = True
    return candidates.taken(kept)


def mirostat(candidates: Candidates, temperature: float, most: float) -> Candidates:
    """Leaves tokens whose surprise, in bits, is no higher than `most`; the most likely one at least (Basu et al. 2021,
    "Mirostat", algorithm 2)."""
    scaled = (candidates.logits.astype(np.float64) - candidates.highest) / temperature
    bits = (np.log(np.exp(scaled).sum()) - scaled) / math.log(2)
    kept = bits <= most
    return ranked(candidates.taken(kept)) if kept.any() else top_k(candidates, 1)


def ranked(candidates: Candidates) -> Candidates:
    """The most likely first, of equal ones the lower id."""
    if candidates.ranked:
        return candidates
    return candidates.best(np.arange(len(candidates.ids)))


def _n_holding(weights: NDArray[np.float64], share: float, total: float | None = None) -> int:
    """How many of the first weights hold a share of the total, by default of their sum; one at least, all if they don't."""
    sums = np.cumsum(weights)
    wanted = share * float(sums[-1] if total is None else total) * (1 - _SHARE_ROUNDING)
    return min(int(np.searchsorted(sums, wanted, side="left")) + 1, len(sums))


# ---- Temperature and probabilities ----


def softmax(candidates: Candidates, temperature: float = 1.0) -> NDArray[np.float64]:
    """The candidates' probabilities."""
    weights = np.exp((candidates.logits.astype(np.float64) - candidates.highest) / temperature)
    return weights / weights.sum()


def log_probabilities(logits: Logits, token: int, n: int) -> tuple[float, dict[int, float]]:
    """The natural logarithm of a token's probability, and those of the n likeliest tokens by id, the likeliest first."""
    highest = float(logits.max())
    # float32 exponentials, each good to 1e-7, added up in float64.
    log_sum = highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best = top_k(Candidates(_all_ids(len(logits)), logits), n) if n else None
    top = (
        {}
        if best is None
        else dict(zip(best.ids.tolist(), (best.logits.astype(np.float64) - log_sum).tolist(), strict=True))
    )
    return float(logits[token]) - log_sum, top


def dynamic_temperature(candidates: Candidates, temperature: float, spread: float, exponent: float) -> float:
    """A temperature from max(0, temperature - spread) to temperature + spread, by how near the tokens' entropy comes to its
    maximum (Zhu et al. 2023, "Hot or Cold? Adaptive Temperature Sampling", in the form of llama.cpp)."""
    n = len(candidates.ids)
    if n < 2:
        return temperature
    probabilities = softmax(candidates)
    seen = probabilities[probabilities > 0]
    share = min(max(float(-(seen @ np.log(seen))) / math.log(n), 0.0), 1.0)
    lowest = max(0.0, temperature - spread)
    return lowest + (temperature + spread - lowest) * share**exponent


# ---- The sampler ----

# What leaves tokens out, in llama.cpp's order, by the option that it takes.
_CUTS: dict[str, Callable[[Candidates, Any], Candidates]] = {
    "top_n_sigma": top_n_sigma,
    "top_k": top_k,
    "typical_p": typical_p,
    "top_p": top_p,
    "min_p": min_p,
}


@with_options(SamplingOptions)
class StandardSampler:
    """Chooses tokens by the usual options, in llama.cpp's order.

    First logits change (bias, penalties, DRY), then tokens are left out (top-n-sigma, top-k, typical, top-p, min-p, XTC),
    then come temperature and the draw. Mirostat takes the place of what leaves tokens out; penalties are kept beside it,
    where llama.cpp drops them. For the same options, seed and logits the tokens are the same.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        Finds the tokens of DRY's sequence breakers.
    **options

    Raises
    ------
    Error
        An option is out of its range.
    TypeError
        There is no such option.
    """

    def __init__(self, *, tokenizer: Tokenizer | None = None, **sampling: Unpack[SamplingOptions]):
        options = self.options = checked_options(sampling)
        self._random = np.random.default_rng(options["seed"])
        self._temperature: float = min(options["temperature"], _HOTTEST)
        self._changes = self._changes_of(tokenizer)
        off = {name: option.off for name, (_, option) in option_table().items()}
        plain = not options["mirostat"]
        self._cuts = [(cut, options[name]) for name, cut in _CUTS.items() if plain and options[name] != off[name]]
        self._xtc = plain and options["xtc_probability"] > 0 and options["xtc_threshold"] <= 0.5
        self._spread = min(options["dynatemp_range"], _HOTTEST) if plain else 0.0
        self._most_surprise = 2.0 * options["mirostat_tau"]
        # Nothing leaves the likeliest token out, and that one is taken.
        atypical = plain and options["typical_p"] != off["typical_p"]
        self._greedy = self._temperature == 0 and not (self._spread or self._xtc or atypical)

    def _changes_of(self, tokenizer: Tokenizer | None) -> list[Callable[[Logits, Sequence[int]], Logits]]:
        o = self.options
        changes: list[Callable[[Logits, Sequence[int]], Logits]] = []
        if o["logit_bias"]:
            changes.append(lambda logits, ids: biased(logits, o["logit_bias"]))
        strengths = (o["repetition_penalty"], o["frequency_penalty"], o["presence_penalty"])
        if strengths != (1, 0, 0) and o["penalty_window"]:
            changes.append(lambda logits, ids: penalized(logits, _last(ids, o["penalty_window"]), *strengths))
        if o["dry_multiplier"] and o["dry_window"]:
            if o["dry_sequence_breakers"] and tokenizer is None:
                raise Error("DRY's sequence breakers are texts: give a tokenizer, or dry_sequence_breakers=()")
            texts = o["dry_sequence_breakers"]
            breakers = sequence_breakers(tokenizer, texts) if tokenizer is not None and texts else {}
            how = (o["dry_multiplier"], o["dry_base"], o["dry_allowed_length"], breakers)
            changes.append(lambda logits, ids: dry_penalized(logits, _last(ids, o["dry_window"]), *how))
        return changes

    def sample(self, logits: Logits, ids: Sequence[int] = ()) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : float32 array (n_vocab,)
            Not changed. -inf rules a token out.
        ids : sequence of int
            The ids so far, the prompt's among them.

        Raises
        ------
        Error
            The highest logit is NaN or infinite.
        """
        left, probabilities = self.distribution(logits, ids)
        if len(left) == 1:
            at = 0
        else:
            sums = np.cumsum(probabilities)
            at = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
            if at == len(sums):  # the product was rounded up to the sum
                at = int(np.flatnonzero(probabilities)[-1])
        if self.options["mirostat"]:
            error = -math.log2(probabilities[at]) - self.options["mirostat_tau"]
            self._most_surprise -= self.options["mirostat_eta"] * error
        return int(left[at])

    def distribution(self, logits: Logits, ids: Sequence[int] = ()) -> tuple[Ids, NDArray[np.float64]]:
        """What `sample` draws from. With XTC this draws, too: whether it is used.

        Parameters
        ----------
        logits : float32 array (n_vocab,)
        ids : sequence of int

        Returns
        -------
        ids : intp array (n_left,)
            The tokens that can be chosen; most likely first, except where nothing leaves tokens out.
        probabilities : float64 array (n_left,)
            They sum to 1.

        Raises
        ------
        Error
            The highest logit is NaN or infinite.
        """
        if logits.ndim != 1 or not len(logits):
            raise Error(f"logits must have the shape (n_vocab,), got {logits.shape}")
        for change in self._changes:
            logits = change(logits, ids)
        best = int(np.argmax(logits))  # a NaN counts as the highest
        if not math.isfinite(logits[best]):
            raise Error(f"the logits can't be sampled: the highest is {logits[best]}, of token {best}")
        if self._greedy:
            return np.array([best]), np.ones(1)

        candidates = Candidates(_all_ids(len(logits)), logits)
        if self.options["mirostat"]:
            candidates = mirostat(candidates, max(self._temperature, _COLDEST), self._most_surprise)
        for cut, value in self._cuts:
            candidates = cut(candidates, value)
        if self._xtc and len(candidates.ids) > 1 and self._random.random() <= self.options["xtc_probability"]:
            candidates = xtc(candidates, self.options["xtc_threshold"])
        temperature = self._temperature
        if self._spread:
            exponent = self.options["dynatemp_exponent"]
            temperature = dynamic_temperature(candidates, temperature, self._spread, exponent)
        if temperature == 0:
            candidates = top_k(candidates, 1)
        return candidates.ids, softmax(candidates, max(temperature, _COLDEST))


def next_token(
    sampler: Sampler,
    processors: Sequence[Processor],
    logits: Logits,
    ids: Sequence[int],
    constraint: Constraint | CallsConstraint | None = None,
) -> int:
    """What a sampler chooses after processors have seen the logits, of what a constraint leaves; neither is asked where it
    leaves one token.

    Parameters
    ----------
    sampler : Sampler
    processors : sequence of callable
    logits : float32 array (n_vocab,)
        Not changed: others get copies.
    ids : sequence of int
        Likewise.
    constraint : Constraint or CallsConstraint, optional

    Raises
    ------
    Error
        What a processor or the sampler gives is no such thing.
    """
    if constraint is not None and (forced := constraint.forced()):
        return forced[0]
    if isinstance(sampler, StandardSampler) and not processors:
        return sampler.sample(logits if constraint is None else constraint.masked(logits), ids)
    seen = list(ids)
    logits = logits.copy()
    for processor in processors:
        shape = logits.shape
        given = processor(seen, logits)
        if not isinstance(given, np.ndarray) or given.shape != shape or given.dtype != np.float32:
            name = getattr(processor, "__name__", type(processor).__name__)
            got = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
            raise Error(f"the processor {name} must return float32 logits of the shape {shape}, not {got}")
        logits = given
    if constraint is not None:
        logits = constraint.masked(logits)
    token = sampler.sample(logits, seen)
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < len(logits):
        raise Error(f"the sampler chose {token!r}, which is no token of {len(logits)}")
    return int(token)


def _last(ids: Sequence[int], n: int) -> Sequence[int]:
    return ids if n < 0 else ids[-n:]


@lru_cache(4)
def _all_ids(n: int) -> Ids:
    ids = np.arange(n)
    ids.flags.writeable = False
    return ids
