"""The tree of pages that prompts may begin with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggpy.generate.prefixes import Prefixes, common
from ggpy.graph import Pages

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(known=st.lists(IDS, unique=True, max_size=20), n_evicted=st.integers(0, 5), ids=IDS)
def test_the_nearest_page_begins_with_most_of_the_ids(known, n_evicted, ids):
    pages = Pages(20)
    prefixes, at = Prefixes(pages), {}
    for k in known:
        at[k] = pages.take()
        prefixes.add(prefixes.root, k, at[k])
        pages.give(at[k])
    for k in known[:n_evicted]:  # the oldest first
        prefixes.evict()
        del at[k]
    page, most = prefixes.nearest(prefixes.root, ids)
    assert most == max((common(k, ids) for k in at), default=0)
    assert page == -1 if not most else any(at[k] == page and common(k, ids) == most for k in at)


def test_few_pages_are_looked_at_however_many_there_are(monkeypatch):
    pages = Pages(3000)
    prefixes, looked = Prefixes(pages), []
    for i in range(3000):
        prefixes.add(prefixes.root, (1, 2, i), pages.take())
    monkeypatch.setattr("ggpy.generate.prefixes.common", lambda a, b: looked.append(a) or common(a, b))
    assert prefixes.nearest(prefixes.root, (1, 2, 1500, 7))[1] == 3
    assert len(looked) <= 2


def test_pages_that_others_hold_stay():
    pages = Pages(2)
    prefixes = Prefixes(pages)
    first = prefixes.add(prefixes.root, (1,), pages.take())
    prefixes.add(first, (2,), pages.take())
    assert not prefixes.evict() and prefixes.n_unused() == 0
    pages.give(1)
    assert prefixes.n_unused() == 1 and prefixes.evict() and not prefixes.evict()
    with pytest.raises(KeyError):
        first.children[(2,)]
