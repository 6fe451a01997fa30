"""Keys and values of prompts in files."""

import pytest

import ggpy
from ggpy.kernels.table import SLAB
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

OPTIONS = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("cache"), made("qwen3"), "q8_0")


@pytest.fixture
def load(path):
    opened = []

    def load(**options):
        opened.append(ggpy.load(path, n_ctx=256, n_threads=1, **options))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def free_in_the_end(model):
    """Whether no page is lost: each is free, or can be freed."""
    return model._runner.pages.n_free + model._runner.prefixes.n_unused() == model._runner.pages.n_pages


@pytest.mark.parametrize("n", [40, SLAB, 150])
def test_a_prompt_from_a_file_gives_the_same_text(load, tmp_path, n):
    first, second = load(), load()
    prompt = ids(n)
    expected = first.generate(prompt, **OPTIONS).run()
    first.save_cache(tmp_path / "cache", prompt)
    second.load_cache(tmp_path / "cache")
    same = second.generate(prompt, **OPTIONS).run()
    assert same.ids == expected.ids and same.n_reused == n - 1
    other = [*prompt[: n - 10], *ids(30, seed=1)]
    assert second.generate(other, **OPTIONS).run().n_reused == n - 10
    assert second.generate(other, **OPTIONS).run().ids == first.generate(other, **OPTIONS).run().ids
    assert free_in_the_end(first) and free_in_the_end(second)


def test_only_what_is_not_known_is_computed(load, tmp_path):
    model = load()
    generation = model.generate(ids(150), **OPTIONS).run()
    known = [*generation.prompt_ids, *generation.ids[:-1]]
    runs = []
    with model._scheduler.recall(model._request(known)) as sequence:
        assert sequence.ids == known
    with model._scheduler.recall(model._request([*known[:100], *ids(30, seed=1)])) as sequence:
        assert sequence.ids == known[:100]
        sequence.extend(ids(30, seed=1))  # doesn't write to pages of others
    run, model._runner.run = model._runner.run, lambda *a, **k: runs.append(a) or run(*a, **k)
    model.save_cache(tmp_path / "cache", known)
    assert not runs
    model.save_cache(tmp_path / "cache", [*known, 5])
    assert len(runs) == 1
    assert model.generate(ids(150), **OPTIONS).run().ids == generation.ids
    assert free_in_the_end(model)


def test_a_cache_of_a_text_is_that_of_its_tokens(load, tmp_path):
    model = load()
    model.save_cache(tmp_path / "cache", "the hand of the law")
    assert model.load_sequence(tmp_path / "cache").ids == model.tokenizer.encode_prompt("the hand of the law")


def test_a_cache_makes_room_for_others(load, tmp_path):
    model = load()
    model.save_cache(tmp_path / "cache", ids(200))
    for seed in range(2 * model._runner.pages.n_pages):
        model.load_cache(tmp_path / "cache")
        model.generate(ids(200, seed=seed), max_tokens=1).run()
    assert free_in_the_end(model)


def test_what_does_not_fit_is_refused_in_a_line(load, tmp_path):
    model = load()
    model.save_cache(tmp_path / "cache", ids(100))
    for cache in (tmp_path / "none", tmp_path):
        with pytest.raises(ggpy.Error):
            model.load_cache(cache)
    with pytest.raises(ggpy.Error, match="of another model, or of this one with other options"):
        load(kv_type="f32").load_cache(tmp_path / "cache")
    with pytest.raises(ggpy.ContextFullError):
        model.save_cache(tmp_path / "other", ids(300))
    with pytest.raises(ggpy.Error, match="token 99999 is not one"):
        model.save_cache(tmp_path / "other", [99999])
    with model.hooked({"blk.0.out": lambda name, value: None}):
        with pytest.raises(ggpy.Error, match="has hooks"):
            model.load_cache(tmp_path / "cache")
        with pytest.raises(ggpy.Error, match="has hooks"):
            model.save_cache(tmp_path / "other", ids(100))
    assert not (tmp_path / "other").exists()


def test_values_under_hooks_reach_no_file(load, tmp_path):
    model = load()
    with model.hooked({"blk.0.out": lambda name, value: value * 2}):
        changed = model.generate(ids(150), **OPTIONS).run()
    model.save_cache(tmp_path / "cache", ids(150))
    other = load()
    other.load_cache(tmp_path / "cache")
    plain = other.generate(ids(150), **OPTIONS).run()
    assert plain.n_reused == 149 and plain.ids == load().generate(ids(150), **OPTIONS).run().ids != changed.ids
