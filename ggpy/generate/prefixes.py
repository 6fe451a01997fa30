"""Keys and values of token sequences that have been computed, to be shared with those that begin alike."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..graph import Pages
from .snapshots import Snapshot


class Prefix:
    """A page of a known sequence: the ids in it, and what stood before.

    Attributes
    ----------
    page : int
    ids : tuple of int
        SLAB of them, or fewer where a sequence ended; then nothing comes after it.
    parent : Prefix or None
    children : dict of tuple of int to Prefix
        Pages that come after, by their ids.
    in_order : list of tuple of int
        Their ids in rising order: those that begin most alike are neighbours.
    snapshot : Snapshot or None
        Of the state after these ids, in models with states.
    digest : bytes
        Of all ids up to its end, where `PageFiles` has needed it.
    is_kept : bool
        Whether a file has the page.
    """

    __slots__ = ("children", "digest", "ids", "in_order", "is_kept", "page", "parent", "snapshot")

    def __init__(self, page: int, ids: tuple[int, ...], parent: "Prefix | None"):
        self.page, self.ids, self.parent = page, ids, parent
        self.children: dict[tuple[int, ...], Prefix] = {}
        self.in_order: list[tuple[int, ...]] = []
        self.snapshot: Snapshot | None = None
        self.digest = b""
        self.is_kept = False

    @property
    def slot(self) -> int:
        """That of its snapshot; -1 without."""
        return -1 if self.snapshot is None else self.snapshot.slot


class Prefixes:
    """A tree of pages. It holds each, until room is needed: then those go first that were used longest ago.

    Parameters
    ----------
    pages : Pages
    """

    def __init__(self, pages: Pages):
        self._pages = pages
        self.root = Prefix(-1, (), None)
        self._recent: OrderedDict[Prefix, None] = OrderedDict()  # the latest at the end; parents behind their children

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, parent: Prefix, ids: tuple[int, ...], page: int) -> Prefix:
        """The page that holds `ids` after `parent`: the one given, or the one that was there before."""
        found = parent.children.get(ids)
        if found is None:
            self._pages.share(page)
            insort(parent.in_order, ids)
            found = parent.children[ids] = Prefix(page, ids, parent)
        self.touch(found)
        return found

    def touch(self, prefix: Prefix) -> None:
        """Makes a page, and those before it, the latest used."""
        at: Prefix | None = prefix
        while at is not None and at is not self.root:
            self._recent[at] = None
            self._recent.move_to_end(at)
            at = at.parent

    def nearest(self, parent: Prefix, ids: tuple[int, ...]) -> tuple[int, int]:
        """Of the pages after `parent` one that begins with most of `ids`, and with how many; (-1, 0) if none does."""
        best, most = -1, 0
        at = bisect_left(parent.in_order, ids)
        for other in parent.in_order[max(0, at - 1) : at + 1]:
            n = common(other, ids)
            if n > most:
                best, most = parent.children[other].page, n
        return best, most

    def n_unused(self) -> int:
        """Pages that nobody else holds: `evict` can free them."""
        return sum(self._pages.holders(p.page) == 1 for p in self._recent)

    def evict(self) -> bool:
        """Frees the page used longest ago that nobody else holds; False if there is none."""
        for prefix in self._recent:
            if not prefix.children and self._pages.holders(prefix.page) == 1:
                self._remove(prefix)
                return True
        return False

    def paths(self) -> Iterator[tuple[list[int], list[int], list[tuple[int, int]]]]:
        """The ids and pages of each known sequence, from its beginning to its last page; and after how many ids there are
        snapshots, and in which slots."""
        for last in self._recent:
            if not last.children:
                path: list[Prefix] = []
                at: Prefix | None = last
                while at is not None and at is not self.root:
                    path.insert(0, at)
                    at = at.parent
                ends = accumulate(len(p.ids) for p in path)
                slots = [(n, p.slot) for n, p in zip(ends, path, strict=True) if p.slot >= 0]
                yield [i for p in path for i in p.ids], [p.page for p in path], slots

    def _remove(self, prefix: Prefix) -> None:
        assert prefix.parent is not None
        siblings = prefix.parent.in_order
        del siblings[bisect_left(siblings, prefix.ids)]
        del prefix.parent.children[prefix.ids]
        del self._recent[prefix]
        self._pages.give(prefix.page)

    def clear(self) -> None:
        """Forgets all."""
        for prefix in self._recent:
            self._pages.give(prefix.page)
        self._recent.clear()
        self.root = Prefix(-1, (), None)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
