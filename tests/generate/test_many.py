"""Many generations and sequences of a model at once: each gives, bit for bit, what it gives alone."""

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import ggpy
from ggpy.generate.generation import Generation
from ggpy.generate.request import Request
from ggpy.generate.sampling import StandardSampler
from ggpy.generate.scheduler import Scheduler
from ggpy.generate.sequence import TokenSequence
from ggpy.generate.speculation import DraftModel, Lookup
from tests.converters.conftest import N_VOCAB
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
KINDS = {"dense": ("qwen3", "f16"), "experts": ("qwen2moe", "q8_0"), "latent": ("V2-Lite", "f16")}
SYSTEM = ids(150, seed=1)  # what prompts begin with: two pages and some


def page_bytes(path, kv_type):
    with ggpy.load(path, n_ctx=64, n_threads=1, kv_type=kv_type) as model:
        return model.kv_bytes // 512


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("many"), made(KINDS[request.param][0]), "q8_0")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("dense"), made("qwen3"), "q8_0")


@pytest.fixture
def model(dense):
    with ggpy.load(dense, n_ctx=512, n_threads=2) as model:
        yield model


class Recorder(StandardSampler):
    """Keeps the bytes of all logits."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def sample(self, logits, recent=()):
        self.seen.append(logits.tobytes())
        return super().sample(logits, recent)


def start(model, prompt, seed=0, max_tokens=12):
    """A generation, and what records its logits."""
    recorder = Recorder(temperature=1.0, seed=seed, top_k=0, top_p=1.0, min_p=0.0)
    request = Request(model.tokenizer, prompt, recorder, max_tokens, ())
    return Generation(model._scheduler, request), recorder


def by_itself(model, generation):
    """The bytes of each logits that led to a token, evaluated token by token."""
    tokens = generation.prompt_ids + generation.ids[:-1]
    with model.new_sequence() as sequence:
        logits = [sequence.extend([t]).tobytes() for t in tokens]
    return logits[len(generation.prompt_ids) - 1 :]


#: what happens, and a number for it
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "advance", "advance", "cancel", "extend", "fork", "cut", "save"]),
        st.integers(0, 200),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
@SETTINGS
@given(
    steps=STEPS,
    n_threads=st.integers(1, 2),
    n_batch=st.sampled_from([512, 70, 16]),
    contexts=st.floats(1.0, 3.0),
)
def test_any_company_gives_the_same_logits(path, tmp_path, kv_type, steps, n_threads, n_batch, contexts):
    memory = int(contexts * 5 * page_bytes(path, kv_type))
    in_any_company(path, tmp_path, steps, n_threads=n_threads, n_batch=n_batch, kv_type=kv_type, kv_memory=memory)


def in_any_company(path, tmp_path, steps, **options):
    """Generations that join, end, wait for room and share beginnings, beside sequences that fork, are cut and saved."""
    n_ctx = 320
    with ggpy.load(path, n_ctx=n_ctx, **options) as model:
        generations, sequences = [], [(model.new_sequence(), [])]
        for what, x in steps:
            if what == "start":
                prompt = SYSTEM[: x % 151] + ids(1 + x % 40, seed=x)
                generations.append(start(model, prompt, seed=x))
                if x % 3 and not model._runner.has_states:
                    drafter = Lookup() if x % 3 == 1 else DraftModel(model._runner, N_VOCAB, 0.0)
                    generations[-1][0]._request.drafter = drafter
                    del drafter  # which holds pages
            elif what == "advance" and generations:
                try:
                    next(generations[x % len(generations)][0], None)
                except ggpy.ContextFullError:  # the sequences hold all pages
                    generations.pop(x % len(generations))
            elif what == "cancel" and generations and x % 3 == 0:
                generations[x % len(generations)][0].cancel()
            sequence, seen = sequences[x % len(sequences)]
            try:
                if what == "extend" and len(sequence) + x % 70 + 1 <= n_ctx:
                    more = SYSTEM[len(sequence) : len(sequence) + 30] or ids(1 + x % 70, seed=x)
                    seen.append((len(sequence) + len(more), sequence.extend(more).tobytes()))
                elif what == "fork" and len(sequences) < 4:
                    sequences.append((sequence.fork(), list(seen)))
                elif what == "cut":
                    sequence.keep(x)
                    seen[:] = [s for s in seen if s[0] <= x]
                elif what == "save":
                    sequence.save(tmp_path / "saved")
                    sequence.close()
                    sequences[x % len(sequences)] = (model.load_sequence(tmp_path / "saved"), seen)
            except ggpy.ContextFullError:
                sequence.close()
                seen.clear()
        # One may have found all pages held by sequences while another was waited for.
        generations = [g for g in generations if not isinstance(g[0]._request.error, ggpy.ContextFullError)]
        held = [(list(s.ids), seen) for s, seen in sequences]
        while sequences:
            sequences.pop()[0].close()
        for generation, _ in generations:
            generation.run()
        for tokens, seen in held:
            with model.new_sequence() as alone:
                logits = [alone.extend([t]).tobytes() for t in tokens]
            assert all(logits[n - 1] == value for n, value in seen)
        for generation, recorder in generations:
            if recorder.seen:
                assert recorder.seen == by_itself(model, generation)[: len(recorder.seen)]
            assert generation.finish_reason in ("stop", "length", "context", "cancelled")
        model._runner.prefixes.clear()
        model._runner.take_page()
        assert model._runner.pages.n_free == model._runner.pages.n_pages - 1, "every page is given back"
        while model._runner.snapshots.evict():
            pass
        assert model._runner.pages.states.n_free == model._runner.pages.states.n_slots, "and every slot"


def test_generations_at_once_give_the_text_of_each_alone(model):
    prompts = [ids(20, seed=i) for i in range(5)]
    alone = [model.generate(p, max_tokens=20, temperature=1, seed=3).run().text for p in prompts]
    together = [model.generate(p, max_tokens=20, temperature=1, seed=3) for p in prompts]
    texts = ["" for _ in prompts]
    for turn in range(100):
        i = turn * 7 % 5
        texts[i] += next(together[i], "")
    assert [t + "".join(g) for t, g in zip(texts, together, strict=True)] == alone
    model.logits(ids(30))
    ggpy_text = model.generate(prompts[0], max_tokens=20, temperature=1, seed=3)
    next(ggpy_text)
    model.logits(ids(30))
    assert ggpy_text.run().text == alone[0]


def test_a_batch_gives_each_as_it_ends(model):
    prompts = [ids(3 + i % 50, seed=i) for i in range(150)]
    ended = list(model.generate_batch(prompts, max_tokens=5, temperature=1, seed=10))
    assert sorted(g.index for g in ended) == list(range(150))
    for g in ended[::13]:
        assert g.text == model.generate(prompts[g.index], max_tokens=5, temperature=1, seed=10 + g.index).run().text
        assert g.prompt_ids == prompts[g.index]


def test_threads_generate_at_once(model):
    prompts = [ids(30, seed=i) for i in range(8)]
    alone = [model.generate(p, max_tokens=15, temperature=1, seed=1).run().text for p in prompts]
    texts = [""] * 8

    def work(i):
        texts[i] = model.generate(prompts[i], max_tokens=15, temperature=1, seed=1).run().text
        model.logits(prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert texts == alone


def test_tasks_generate_at_once(model):
    prompts = [ids(30, seed=i) for i in range(20)]
    alone = [model.generate(p, max_tokens=10, temperature=1, seed=1).run().text for p in prompts]

    async def text(prompt):
        return "".join([piece async for piece in model.generate(prompt, max_tokens=10, temperature=1, seed=1)])

    async def all_texts():
        return await asyncio.gather(*map(text, prompts))

    assert asyncio.run(all_texts()) == alone


def test_common_beginnings_are_computed_once(model):
    counts = []
    model.hooks["blk.0.out"] = lambda name, value: counts.append(len(value))
    system, n = ids(230, seed=5), 12
    generations = [model.generate(system + ids(9, seed=i), max_tokens=3, temperature=0) for i in range(n)]
    for g in generations:
        g.run()
    assert sum(counts) == 230 + n * 9 + sum(len(g.ids) - 1 for g in generations)
    assert sorted(g.n_reused for g in generations) == [0] + [230] * (n - 1)
    # And a conversation that goes on after the others have ended.
    counts.clear()
    longer = system + ids(9, seed=3) + generations[3].ids + ids(5, seed=99)
    again = model.generate(longer, max_tokens=1, temperature=0).run()
    assert again.n_reused == 230 + 9 + len(generations[3].ids) - 1 and sum(counts) == len(longer) - again.n_reused


def test_when_pages_are_few_the_youngest_waits_and_gives_the_same(dense):
    with ggpy.load(dense, n_ctx=256, n_threads=1) as model:
        alone = [model.generate(ids(60, seed=i), max_tokens=150, temperature=1, seed=i).run().ids for i in range(6)]
    with ggpy.load(dense, n_ctx=256, n_threads=1, kv_memory=5 * page_bytes(dense, "f16")) as model:
        together = [model.generate(ids(60, seed=i), max_tokens=150, temperature=1, seed=i) for i in range(6)]
        assert [g.run().ids for g in together] == alone


def test_a_generation_that_nobody_wants_holds_nothing(model):
    generation = model.generate(ids(200), max_tokens=100, temperature=0)
    next(generation)
    assert len(model._scheduler._running) == 1
    del generation
    model.generate(ids(3), max_tokens=2, temperature=0).run()
    assert model._scheduler._running == []


def test_text_that_nobody_takes_does_not_pile_up(dense, monkeypatch):
    monkeypatch.setattr("ggpy.generate.scheduler._AHEAD", 5)
    monkeypatch.setattr("ggpy.generate.scheduler._MOST_RUNNING", 2)
    with ggpy.load(dense, n_ctx=512, n_threads=1) as model:
        lazy = [model.generate(ids(3, seed=i), max_tokens=100, temperature=1, seed=i) for i in range(2)]
        busy = model.generate(ids(3, seed=9), max_tokens=100, temperature=1, seed=9).run()
        assert len(busy.ids) == 100 or busy.finish_reason == "stop"
        assert all(len(g._request.pieces) <= 5 for g in lazy)
        for i, g in enumerate(lazy):
            assert g.run().ids == model.generate(ids(3, seed=i), max_tokens=100, temperature=1, seed=i).run().ids


def test_cancelling_from_another_thread_ends_at_once(model):
    generation = model.generate(ids(5), max_tokens=400, temperature=1, seed=7)
    pieces = []

    def cancel():
        while len(pieces) < 3:
            pass
        generation.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    for piece in generation:
        pieces.append(piece)
    thread.join()
    assert generation.finish_reason == "cancelled" and len(generation.ids) < 400


def test_a_sampler_that_fails_ends_its_generation_alone(model):
    class Fails(StandardSampler):
        def sample(self, logits, recent=()):
            raise ValueError("no choice")

    bad = Generation(model._scheduler, Request(model.tokenizer, ids(5), Fails(), 5, ()))
    good = model.generate(ids(6), max_tokens=5, temperature=0)
    text = good.run().text
    with pytest.raises(ValueError, match="no choice"):
        next(bad)
    assert text == model.generate(ids(6), max_tokens=5, temperature=0).run().text


def test_an_interrupt_within_a_run_loses_nothing(model):
    alone = model.generate(ids(100), max_tokens=20, temperature=1, seed=2).run().ids
    calls = iter(range(1000))
    generation = model.generate(ids(100), max_tokens=20, temperature=1, seed=2)
    others = [model.generate(ids(10, seed=i), max_tokens=9, temperature=1, seed=i) for i in range(3)]

    class Interrupts(StandardSampler):
        def sample(self, logits, recent=()):
            if next(calls) % 2:
                raise KeyboardInterrupt
            return super().sample(logits, recent)

    others.append(Generation(model._scheduler, Request(model.tokenizer, ids(4), Interrupts(seed=1), 9, ())))
    n_interrupts = 0
    for g in [*others, generation]:
        while True:
            try:
                g.run()
                break
            except KeyboardInterrupt:
                n_interrupts += 1
    assert n_interrupts > 3 and generation.ids == alone
    for i in range(3):
        assert others[i].ids == model.generate(ids(10, seed=i), max_tokens=9, temperature=1, seed=i).run().ids


def test_hooks_of_many_sequences_know_whose_tokens_they_see(model):
    seen = []

    def hook(name, value):
        assert len(value) == len(model.batch.ids)
        seen.extend(zip(model.batch.ids.tolist(), model.batch.positions.tolist(), strict=True))

    prompts = [ids(7, seed=i) for i in range(3)]
    with model.hooked({"blk.0.out": hook}):
        generations = [model.generate(p, max_tokens=2, temperature=0) for p in prompts]
        for g in generations:
            g.run()
    assert model.hooks == {} and model.batch is None
    expected = [(t, i) for g in generations for i, t in enumerate(g.prompt_ids + g.ids[:1])]
    assert sorted(seen) == sorted(expected)


def test_programs_are_bounded_and_derived_weights_go_with_the_model(tmp_path):
    path = converted(tmp_path, made("V2-Lite"))
    model = ggpy.load(path, n_ctx=64, n_threads=1, mla="naive")
    for _ in range(10):
        with model.hooked({"blk.0.out": lambda name, value: None}):
            model.logits(ids(5))
            model.new_sequence().extend(ids(1))
    assert len(model._runner._programs) <= 6
    derived = [weakref.ref(w) for w in model._runner._derived.values()]
    assert derived
    model.close()
    del model
    gc.collect()
    assert not any(r() for r in derived)


def test_a_hook_cannot_use_the_model(model):
    def hook(name, value):
        model.logits(ids(3))

    with model.hooked({"blk.0.out": hook}), pytest.raises(ggpy.Error, match="a hook can't use the model"):
        model.logits(ids(3))
    model.hooks["blk.0.out"] = lambda name, value: model.close()
    with pytest.raises(ggpy.Error, match="a hook can't use the model"):
        model.logits(ids(3))
    model.hooks["blk.0.out"] = lambda name, value: next(other)
    other = model.generate(ids(3), max_tokens=2)
    with pytest.raises(ggpy.Error, match="a hook can't use the model"):
        other.run()


def test_a_closed_model_says_so(dense, tmp_path):
    model = ggpy.load(dense, n_ctx=128, n_threads=2)
    generation, sequence = model.generate(ids(5), max_tokens=50), model.new_sequence()
    sequence.extend(ids(3))
    next(generation)
    model.close()
    model.close()
    for use in (
        lambda: list(generation),
        lambda: sequence.extend(ids(1)),
        lambda: model.logits(ids(3)),
        lambda: model.generate(ids(3)),
        lambda: model.embed([ids(3)]),
        lambda: model.hidden_states(ids(3)),
        lambda: model.score(ids(3), [ids(2)]),
        lambda: list(model.generate_batch([ids(3)])),
        lambda: model.save_cache(tmp_path / "cache", ids(3)),
        model.new_sequence,
    ):
        with pytest.raises(ggpy.Error, match="the model is closed"):
            use()
    for use in (lambda: model.chat([]), lambda: model.metadata["general.name"]):
        with pytest.raises(ggpy.Error, match="closed"):
            use()


def test_closing_while_another_thread_generates(dense):
    for _ in range(5):
        model = ggpy.load(dense, n_ctx=512, n_threads=2)
        errors = []

        def work(model=model, errors=errors):
            try:
                model.generate(ids(5), max_tokens=400, temperature=1, seed=1).run()
                errors.append("ended")
            except ggpy.Error as error:
                errors.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        while not model._scheduler._running:
            pass
        model.close()
        for t in threads:
            t.join(30)
        assert len(errors) == 3 and all("the model is closed" in e for e in errors), errors


def _in_a_fork(model, generation, queue):
    found = []
    for use in (lambda: next(generation), lambda: model.logits([1]), model.new_sequence, lambda: model.generate([1])):
        try:
            use()
            found.append("no error")
        except ggpy.Error as error:
            found.append(str(error))
    model.close()
    queue.put(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_is_told_to_open_the_model_anew(model):
    generation = model.generate(ids(5), max_tokens=20, temperature=0)
    next(generation)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(model, generation, queue))
    process.start()
    found = queue.get(timeout=60)
    process.join(30)
    assert process.exitcode == 0
    assert len(found) == 4 and all("opened in another process" in f for f in found), found
    assert generation.run().ids == model.generate(ids(5), max_tokens=20, temperature=0).run().ids


def test_nothing_of_a_model_can_be_pickled_or_copied(model):
    for thing in (model, model.new_sequence(), model.generate(ids(3))):
        with pytest.raises(ggpy.Error, match="can't be"):
            pickle.dumps(thing)
        with pytest.raises(ggpy.Error, match="can't be"):
            copy.deepcopy(thing)


def test_sequences_are_extended_together(model):
    tokens = [ids(n, seed=n) for n in (1, 70, 5, 1, 130)]
    alone = [model.new_sequence().extend(t) for t in tokens]
    sequences = [model.new_sequence() for _ in tokens]
    together = sequences[0].extend_together(sequences, tokens)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [s.ids for s in sequences] == tokens
    with pytest.raises(ggpy.Error, match="token 99999"):
        sequences[0].extend_together(sequences, [[99999]] * 5)


def test_a_saved_sequence_goes_on_with_the_same_bits(dense, tmp_path):
    tokens = ids(200)
    with ggpy.load(dense, n_ctx=256, n_threads=2) as model, model.new_sequence() as sequence:
        sequence.extend(tokens[:130])
        sequence.save(tmp_path / "saved")
        expected = sequence.extend(tokens[130:])
        with pytest.raises(ggpy.Error, match="has hooks"), model.hooked({"blk.0.out": lambda name, value: None}):
            sequence.save(tmp_path / "other")
        assert not (tmp_path / "other").exists()
    with ggpy.load(dense, n_ctx=256, n_threads=1) as model:
        sequence = model.load_sequence(tmp_path / "saved")
        assert sequence.ids == tokens[:130]
        np.testing.assert_array_equal(sequence.extend(tokens[130:]), expected)
    for other, options in ((converted(tmp_path, made("qwen3"), "f16"), {}), (dense, {"kv_type": "f32"})):
        with (
            ggpy.load(other, n_ctx=256, n_threads=1, **options) as model,
            pytest.raises(ggpy.Error, match="of another model"),
        ):
            model.load_sequence(tmp_path / "saved")


def test_damaged_sequences_are_refused_in_a_line(dense, tmp_path):
    with ggpy.load(dense, n_ctx=256, n_threads=1) as model:
        with model.new_sequence() as sequence:
            sequence.extend(ids(100))
            sequence.save(tmp_path / "saved")
        whole = (tmp_path / "saved").read_bytes()
        for damaged in (b"", b"GGUF" * 10, whole[:100], whole[:-1], whole[:8] + b"\xff" * 40 + whole[48:]):
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(ggpy.Error, match="damaged"):
                model.load_sequence(tmp_path / "damaged")
        for missing in (tmp_path / "missing", tmp_path):
            with pytest.raises(ggpy.Error):
                model.load_sequence(missing)


def test_sequences_from_strangers_are_refused_in_a_line(dense, tmp_path):
    path = tmp_path / "saved"
    with ggpy.load(dense, n_ctx=256, n_threads=1) as model:
        with model.new_sequence() as sequence:
            sequence.extend(ids(100))
            sequence.save(path)
        with safe_open(path, "numpy") as file:
            metadata, whole = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        page = next(name for name in whole if name != "ids")
        n = 10**6
        for changed in (
            {page: whole[page].astype(np.float32)},
            {page: whole[page].view(np.int8)},
            {page: whole[page][:, :-1].copy()},
            {"more": whole[page]},
            *({"ids": np.full(100, x, t)} for x, t in ((1.5, "f4"), (1, "?"), (1, "i8"), (-1, "i4"), (N_VOCAB, "i4"))),
            *({"ids": np.zeros(shape, np.int32)} for shape in ((), (100, 2), (200,), (n,))),
            {name: np.zeros((n // 64, a.shape[-1]) if name != "ids" else n, a.dtype) for name, a in whole.items()},
        ):
            save_file({**whole, **changed}, path, metadata)
            with pytest.raises(ggpy.Error, match=r"damaged|context|vocabulary"):
                model.load_sequence(path)
        save_file(whole, path, metadata)
        assert len(model.load_sequence(path)) == 100


def test_a_generation_may_be_submitted_while_another_thread_steps(model):
    """Nothing is lost, and no queue changes while it is walked."""

    class Sly(Request):
        """Asked whether it is cancelled, it adds another generation, as another thread may at that moment."""

        @property
        def cancelled(self):
            if not others and model._runner.lock._is_owned() and self in model._scheduler._waiting:
                others.append(model.generate(ids(9), max_tokens=3, temperature=0))
            return False

        @cancelled.setter
        def cancelled(self, value):
            pass

    others = []
    sampler = StandardSampler(temperature=0)
    sly = [Generation(model._scheduler, Sly(model.tokenizer, ids(5), sampler, 3, ())) for _ in range(2)]
    for g in sly:
        g.run()
    assert len(others) == 1 and len(others[0].run().ids) == 3


def test_a_token_without_text_ends_its_generation_alone(model):
    """Models may have more tokens than their tokenizer."""

    class Beyond(StandardSampler):
        def sample(self, logits, recent=()):
            return 10**6

    bad = Generation(model._scheduler, Request(model.tokenizer, ids(5), Beyond(), 5, ()))
    good = model.generate(ids(6), max_tokens=5, temperature=0).run()
    assert good.finish_reason
    with pytest.raises(ggpy.Error, match="1000000"):
        bad.run()


def test_a_handler_of_a_signal_cannot_use_the_model_that_it_interrupts(model):
    """Such a handler runs anywhere in the main thread, as this sampler does."""

    class Interrupted(StandardSampler):
        def sample(self, logits, recent=()):
            for use in (model.close, lambda: model.generate(ids(3), max_tokens=2).run()):
                with pytest.raises(ggpy.Error, match="handler can't use"):
                    use()
            other.cancel()
            return super().sample(logits, recent)

    other = model.generate(ids(9), max_tokens=9)
    generation = Generation(model._scheduler, Request(model.tokenizer, ids(5), Interrupted(temperature=0), 5, ()))
    assert generation.run().ids == model.generate(ids(5), max_tokens=5, temperature=0).run().ids
    assert other.finish_reason == "cancelled"


@pytest.mark.parametrize("place", ["_share", "_drop_ended", "_release", "TokenSequence", "make_room", "_reuse"])
def test_an_interrupt_between_runs_loses_nothing(dense, monkeypatch, place):
    prompts = [ids(70)[:65] + ids(40, seed=i) for i in range(4)]
    with ggpy.load(dense, n_ctx=256, n_threads=1, kv_memory=5 * page_bytes(dense, "f16")) as model:
        alone = [model.generate(p, max_tokens=40, temperature=1, seed=i).run().ids for i, p in enumerate(prompts)]
        generations = [model.generate(p, max_tokens=40, temperature=1, seed=i) for i, p in enumerate(prompts)]
        owner = next(
            o for o in (Scheduler, ggpy.generate.scheduler, ggpy.generate.scheduler.TokenSequence) if hasattr(o, place)
        )
        original, calls = getattr(owner, place), iter(range(10**9))

        def interrupted(*args):
            if next(calls) % 5 == 4:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(owner, place, interrupted)
        for g in generations:
            for _ in range(300):
                try:
                    g.run()
                    break
                except KeyboardInterrupt:
                    pass
        assert next(calls) > 5
        assert [g.ids for g in generations] == alone


def test_pages_that_were_shared_come_back(dense):
    """Also of a generation that took another's page and was sent away before it ran."""
    with ggpy.load(dense, n_ctx=320, n_threads=1, kv_memory=5 * page_bytes(dense, "f16")) as model:
        prompts = [SYSTEM[:x] + ids(1 + x % 40, seed=x) for x in (0, 4, 4, 126, 0, 4, 126)]
        for g in [start(model, p, seed=i)[0] for i, p in enumerate(prompts)]:
            g.run()
        assert model._runner.prefixes.n_unused() + model._runner.pages.n_free == 5
        model.logits(ids(320))


def test_a_fork_after_a_run_that_failed_shares_no_page_that_is_written(model):
    def fail(name, value):
        raise ValueError("of a hook")

    alone = model.new_sequence()
    alone.extend(ids(64))
    alone.extend(ids(30, seed=4))
    expected = alone.extend([5])
    sequence = model.new_sequence()
    sequence.extend(ids(64))
    with model.hooked({"blk.0.out": fail}), pytest.raises(ValueError, match="of a hook"):
        sequence.extend(ids(100, seed=2))
    fork = sequence.fork()
    sequence.extend(ids(30, seed=4))
    fork.extend(ids(30, seed=9))
    np.testing.assert_array_equal(sequence.extend([5]), expected)


def test_a_sequence_without_room_keeps_no_pages(dense):
    with ggpy.load(dense, n_ctx=256, n_threads=1, kv_memory=5 * page_bytes(dense, "f16")) as model:
        first, second = model.new_sequence(), model.new_sequence()
        first.extend(ids(130))
        with pytest.raises(ggpy.ContextFullError):
            second.extend(ids(200))
        first.extend(ids(120))
        assert len(first) == 250 and second.pages == []


def test_only_different_sequences_of_a_model_are_extended_together(model, dense):
    sequences = [model.new_sequence() for _ in range(2)]
    with ggpy.load(dense, n_ctx=64, n_threads=1) as other:
        for wrong, tokens in (
            ([sequences[0]] * 2, [[1], [2]]),
            ([sequences[0], other.new_sequence()], [[1], [2]]),
            (sequences, [[1]]),
            ([], []),
        ):
            with pytest.raises(ggpy.Error, match="sequences"):
                TokenSequence.extend_together(wrong, tokens)
    assert all(s.ids == [] and s.pages == [] for s in sequences)


def test_a_cancelled_task_loses_no_text(model):
    expected = model.generate(ids(9), max_tokens=30, temperature=1, seed=3).run()

    async def main():
        generation, pieces = model.generate(ids(9), max_tokens=30, temperature=1, seed=3), []

        async def some():
            async for piece in generation:
                pieces.append(piece)

        for pause in (0, 0.001, 0.002, 0.005):
            task = asyncio.create_task(some())
            await asyncio.sleep(pause)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await some()
        return generation, pieces

    generation, pieces = asyncio.run(main())
    assert "".join(pieces) == generation.text == expected.text and generation.ids == expected.ids


def test_hooks_of_two_threads_leave_each_others(model):
    first, second = (model.hooked({f"blk.{i}.out": lambda name, value: None}) for i in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert list(model.hooks) == ["blk.1.out"]
    second.__exit__(None, None, None)
    assert model.hooks == {}


def test_values_of_hooks_that_come_just_before_a_run_are_not_shared(model, monkeypatch):
    """As another thread may set them while a run is prepared."""
    expected = model.generate(ids(150), max_tokens=5, temperature=0).run().ids
    model._runner.prefixes.clear()
    original = Scheduler._admit

    def admit(self):
        original(self)
        model.hooks["blk.0.out"] = lambda name, value: -value

    monkeypatch.setattr(Scheduler, "_admit", admit)
    model.generate(ids(150), max_tokens=1, temperature=0).run()
    monkeypatch.undo()
    model.hooks.clear()
    again = model.generate(ids(150), max_tokens=5, temperature=0).run()
    assert again.n_reused == 0 and again.ids == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_during_a_run_waits_for_no_lock(model):
    """Locks that another thread held at the fork are held in it for ever."""
    generation, sequence = model.generate(ids(5), max_tokens=20), model.new_sequence()
    held, end = threading.Event(), threading.Event()

    def hold():
        with model._runner.lock:
            held.set()
            end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def use():
        generation.cancel()
        sequence.close()

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    process.join(20)
    alive = process.is_alive()
    process.kill()
    end.set()
    thread.join()
    assert not alive


def test_odd_sizes_are_refused_or_do_their_best(dense, monkeypatch):
    with ggpy.load(dense, n_ctx=70, n_batch=3, n_threads=1, kv_memory=1 << 62) as model:
        assert model.generate(ids(69), max_tokens=9, temperature=0).run().finish_reason == "context"
        for wrong in (2.5, "3"):
            with pytest.raises(ggpy.Error, match="max_tokens"):
                model.generate([1], max_tokens=wrong)
        with pytest.raises(ggpy.Error, match="NoneType"):  # not the end of the batch
            list(model.generate_batch([[1], None, [2]], max_tokens=1))
        prompts = iter([[i] for i in range(500)])
        next(model.generate_batch(prompts, max_tokens=1))
        assert next(prompts)[0] <= model._scheduler.room, "prompts are read as there is room"

    def no_memory(n):
        raise MemoryError

    monkeypatch.setattr("ggpy.graph.pages.aligned", no_memory)
    with pytest.raises(ggpy.Error, match="no memory for"):
        ggpy.load(dense, n_ctx=70, n_threads=1)


def test_memory_for_less_than_a_context_is_refused(dense):
    with pytest.raises(ggpy.Error, match="hold one context"):
        ggpy.load(dense, n_ctx=512, kv_memory=1000)


def test_an_interrupt_loses_no_random_number(model, monkeypatch):
    """It comes behind the draw, where a lost number would change what follows."""
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 1}
    expected = model.generate(ids(5), **options).run()
    sample, places = StandardSampler.sample, iter([0, 1, 0, 0, 1])

    def interrupted(sampler, logits, before=()):
        token = sample(sampler, logits, before)
        if next(places, 0):
            signal.raise_signal(signal.SIGINT)
        return token

    monkeypatch.setattr(StandardSampler, "sample", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start behind them ignore it
    generation, n_interrupts = model.generate(ids(5), **options), 0
    try:
        while generation.finish_reason is None:
            try:
                generation.run()
            except KeyboardInterrupt:
                n_interrupts += 1
    finally:
        handler = signal.signal(signal.SIGINT, before)
    assert n_interrupts == 2 and generation.ids == expected.ids and generation.text == expected.text
    assert handler is signal.default_int_handler
