"""Layers in several processes: the same bits as in one, also when some of them die."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ggpy
from ggpy.file import GGUFFile
from ggpy.graph import Span
from ggpy.pipeline import split_layers
from ggpy.pipeline.stages import _pieces
from tests.models import test_states
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors are handed on")
HOW = {"n_ctx": 256, "n_threads": 1}
PROMPTS = [f"And the king said {i}" for i in range(9)]


@pytest.fixture(scope="module", params=[2, 3])
def both(request):
    with ggpy.load("demo", **HOW) as one, ggpy.load("demo", **HOW, stages=request.param) as many:
        yield one, many


def processes(model):
    return model._runner._stages._links._processes


def texts(model, **options):
    done = model.generate_batch(PROMPTS, max_tokens=12, **options)
    return [g.text for g in sorted(done, key=lambda g: g.index)]


def test_the_same_bits(both):
    one, many = both
    tokens = one.tokenize("And it came to pass in those days, that the king sent unto all the land. " * 10)[:250]
    for n in (1, 2, 63, 64, 65, 250):
        assert np.array_equal(one.logits(tokens[:n]), many.logits(tokens[:n]))
    with one.new_sequence() as a, many.new_sequence() as b:
        for at in (0, 70, 71, 72, 140):
            assert np.array_equal(a.extend(tokens[at : at + 45]), b.extend(tokens[at : at + 45]))
            with a.fork() as c, b.fork() as d:  # pages are copied in each stage before they are written
                assert np.array_equal(c.extend([7, 8]), d.extend([7, 8]))
        a.keep(90), b.keep(90)
        assert np.array_equal(a.extend([9]), b.extend([9]))
    assert texts(one, seed=3) == texts(many, seed=3)
    assert np.array_equal(one.embed(PROMPTS), many.embed(PROMPTS))
    assert one.score("In the", [" beginning", " end"]) == many.score("In the", [" beginning", " end"])


def test_stages_that_die_are_started_again(both):
    one, many = both
    expected = texts(one, temperature=0)
    first = one.generate("In the beginning", max_tokens=30, temperature=0).run().text
    with one.new_sequence() as a, many.new_sequence() as b:
        a.extend(one.tokenize(PROMPTS[0] * 8)), b.extend(one.tokenize(PROMPTS[0] * 8))
        for i in range(len(processes(many))):
            generation = many.generate("In the beginning", max_tokens=30, temperature=0)
            for _ in range(5):
                next(generation)
            processes(many)[i].send_signal(signal.SIGKILL)
            assert generation.run().text == first
        with ThreadPoolExecutor(1) as pool:  # while they run
            found = pool.submit(texts, many, temperature=0)
            for process in processes(many):
                os.kill(process.pid, signal.SIGKILL)
            assert found.result() == expected
        for i in (40, 41):
            assert np.array_equal(a.extend([i]), b.extend([i]))


def test_an_interrupt_leaves_no_answer_to_another_run(both, monkeypatch):
    one, many = both
    links = many._runner._stages._links
    first = one.logits([1, 2, 3])
    with many.new_sequence() as sequence:
        sequence.extend([5, 6])

        def interrupted(stages):
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(links, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            many.logits([7] * 90)
        assert np.array_equal(many.logits([1, 2, 3]), first)
        assert np.array_equal(sequence.extend([7]), one.logits([5, 6, 7])[-1])


def test_experts_and_other_layers(tmp_path):
    path = converted(tmp_path, made("qwen2moe"), "q8_0")
    with ggpy.load(path, **HOW) as one, ggpy.load(path, **HOW, stages=2, kv_type="f16") as many:
        assert np.array_equal(one.logits(ids(100)), many.logits(ids(100)))


def test_a_batch_through_stages(tmp_path):
    rows = [{"id": i, "prompt": text} for i, text in enumerate(PROMPTS)]
    for name, n in (("one", 1), ("many", 2)):
        ggpy.batch("demo", rows, tmp_path / name, ordered=True, max_tokens=9, load={**HOW, "stages": n})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_sequences_are_saved_and_loaded_while_others_run(both, tmp_path):
    one, many = both
    expected = texts(one, temperature=0)
    with many.new_sequence() as sequence, ThreadPoolExecutor(1) as pool:
        sequence.extend([*range(70)])
        wanted = one.logits([*range(70), 7])[-1]
        found = pool.submit(texts, many, temperature=0)
        while not found.done():
            sequence.save(tmp_path / "saved")
            with many.load_sequence(tmp_path / "saved") as other:
                assert np.array_equal(other.extend([7]), wanted)
        assert found.result() == expected


@pytest.mark.parametrize(
    "name, stages", [("qwen35", 2), ("mamba2", 3), ("lfm2", 3), ("granitehybrid", 2), ("nemotron_h", 3)]
)
def test_layers_with_states(tmp_path, name, stages):
    path, tokens = converted(tmp_path, test_states.made(name)), ids(900)
    how = {**HOW, "n_ctx": 1024, "n_batch": 128}
    with ggpy.load(path, **how) as one, ggpy.load(path, **how, stages=stages) as many:

        def texts(model):
            """Prompts that begin alike: states of one are gone on with by others; drafts that are wrong are taken back."""
            prompts = [tokens[:150] + tokens[150:170] * 2 + [i] for i in range(3)] + [tokens[:300], tokens[:150]]
            done = model.generate_batch(prompts, max_tokens=12, seed=1, lookup=True)
            return [g.ids for g in sorted(done, key=lambda g: g.index)]

        expected = texts(one)
        with one.new_sequence() as a:
            logits = [a.extend(tokens[:513]), a.extend(tokens[513:700]), a.fork().extend([8])]
            a.keep(600)
            logits.append(a.extend([9]))
            logits.append(a.extend([10, 11]))
            a.save(tmp_path / "one")
            logits.append(a.extend([12]))
        assert texts(many) == expected
        with many.new_sequence() as b:
            found = [b.extend(tokens[:513]), b.extend(tokens[513:700]), b.fork().extend([8])]
            processes(many)[0].kill()  # and with it states of then and now
            b.keep(600)
            found.append(b.extend([9]))
            with b.fork() as c:
                found.append(b.extend([10, 11]))
                assert np.array_equal(c.extend([10, 11]), found[-1])
            b.save(tmp_path / "many")
            found.append(b.extend([12]))
        assert all(np.array_equal(x, y) for x, y in zip(logits, found, strict=True))
        with one.load_sequence(tmp_path / "many") as d, many.load_sequence(tmp_path / "one") as e:
            processes(many)[1].kill()  # known prefixes and their states are computed once more
            assert np.array_equal(d.extend([12]), logits[-1]) and np.array_equal(e.extend([12]), logits[-1])
            assert texts(many) == expected


def test_what_stages_cant_do_is_refused(both):
    _, many = both
    for call in (
        lambda: many.hidden_states([1, 2]),
        lambda: many.new_sequence().profile([1]),
    ):
        with pytest.raises(ggpy.UnsupportedError):
            call()
    with many.hooked({"blk.0.out": lambda name, value: None}), pytest.raises(ggpy.UnsupportedError, match="hooks"):
        many.logits([1, 2])
    with pytest.raises(ggpy.Error, match="99 stages"):
        ggpy.load("demo", **HOW, stages=99)


def test_a_model_that_a_stage_cant_open_is_an_error(tmp_path, both):
    from ggpy.pipeline import Processes
    from ggpy.pipeline.stage import How

    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    how = How(str(tmp_path / "x.gguf"), range(1), True, True, None, "absorbed", 64, 8, 8, "F16", 1, 0, 1)
    links = Processes([how])
    with pytest.raises(ggpy.Error, match=r"x\.gguf"):
        links.start([0])
    links.close()


def test_layers_are_split_by_their_bytes():
    with ggpy.load("demo") as model, GGUFFile(model.file.path) as file:
        n = model.architecture.n_layer
        for stages in range(1, n + 1):
            ranges = split_layers(file, n, stages)
            assert [i for r in ranges for i in r] == [*range(n)] and all(len(r) for r in ranges)


def test_spans_are_cut_into_pieces():
    spans = [Span([1], 5, [0], 1), Span([*range(200)], 3, [1, 2, 3, 4], 120), Span([1], 7, [5], 0), Span([4, 5], 0, [6], 2)]
    pieces = _pieces(spans, 3)
    assert len(pieces) == 6
    for index, span in enumerate(spans):
        parts = [part for piece in pieces for i, part in piece if i == index]
        assert [t for part in parts for t in part.ids] == span.ids
        assert sum(part.n_outputs for part in parts) == span.n_outputs
        at = span.n_past
        for part in parts:
            assert part.n_past == at
            at += len(part.ids)
        wanted = [part.n_outputs for part in parts]
        assert all(w == len(p.ids) for w, p, seen in zip(wanted, parts, np.cumsum(wanted), strict=True) if seen > w)
