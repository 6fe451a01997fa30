"""Keys and values of token sequences that have been computed, to be shared with those that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence

from ..graph import Pages


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
    """

    __slots__ = ("children", "ids", "page", "parent")

    def __init__(self, page: int, ids: tuple[int, ...], parent: "Prefix | None"):
        self.page, self.ids, self.parent = page, ids, parent
        self.children: dict[tuple[int, ...], Prefix] = {}


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
            found = parent.children[ids] = Prefix(page, ids, parent)
            self._pages.share(page)
        self.touch(found)
        return found

    def touch(self, prefix: Prefix) -> None:
        """Makes a page, and those before it, the latest used."""
        at: Prefix | None = prefix
        while at is not None and at is not self.root:
            self._recent[at] = None
            self._recent.move_to_end(at)
            at = at.parent

    def nearest(self, parent: Prefix, ids: Sequence[int]) -> tuple[int, int]:
        """Of the pages after `parent` one that begins with most of `ids`, and with how many; (-1, 0) if none does."""
        best, most = -1, 0
        for child in parent.children.values():
            n = common(child.ids, ids)
            if n > most:
                best, most = child.page, n
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

    def _remove(self, prefix: Prefix) -> None:
        assert prefix.parent is not None
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
