"""Batches on a Ray cluster: nodes as processes of this machine, of which some are lost."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import ggpy

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

LOAD = {"n_ctx": 256, "n_threads": 1}
ROWS = [{"id": i, "prompt": f"And the king said {i}", "options": {"max_tokens": 5 + i * 7 % 30}} for i in range(400)]


@pytest.fixture
def nodes():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()


def workers():
    """The processes that have the model open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")
def test_a_worker_and_a_node_are_lost_and_no_row_is(nodes, tmp_path):
    second = nodes.add_node(num_cpus=1)
    ggpy.batch("demo", ROWS, tmp_path / "alone", ordered=True, load=LOAD)
    lost = []

    def progress(summary):
        if summary.n_new >= 100 and not lost:
            lost.append(workers()[0])
            os.kill(lost[0], signal.SIGKILL)
        if summary.n_new >= 200 and len(lost) == 1:
            lost.append(second)
            nodes.remove_node(second, allow_graceful=False)

    summary = ggpy.batch("demo", ROWS, tmp_path / "out", ordered=True, load=LOAD, ray=nodes.address, progress=progress)
    assert len(lost) == 2 and summary.n_new == len(ROWS) and not summary.n_errors
    assert (tmp_path / "out").read_bytes() == (tmp_path / "alone").read_bytes()


def test_nodes_with_another_version_or_model_are_refused(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(ggpy, "__version__", "9.9")
    with pytest.raises(ggpy.Error, match=r"^node \S+ has ggpy [\d.]+, this process 9\.9$"):
        ggpy.batch("demo", ROWS, tmp_path / "out", load=LOAD, ray=nodes.address)
    monkeypatch.undo()
    monkeypatch.setattr(ggpy.Model, "digest", "another")
    with pytest.raises(ggpy.Error, match=r"^node \S+: \S+\.gguf is another model there$"):
        ggpy.batch("demo", ROWS, tmp_path / "out", load=LOAD, ray=nodes.address)
    for how, words in (({"n_threads": 9}, "no process with 9 threads"), ({"stages": 2}, "1 of 2 processes with 1 threads")):
        with pytest.raises(ggpy.Error, match=words):
            ggpy.batch("demo", ROWS, tmp_path / "out", load={**LOAD, **how}, ray=nodes.address)
    assert not (tmp_path / "out").exists()


def test_a_node_that_comes_later_is_refused_by_its_worker():
    from ggpy.batching.cluster import Worker
    from ggpy.hub import model_file

    path = str(model_file("demo"))
    with pytest.raises(ggpy.Error, match=r"^node \S+ has ggpy [\d.]+, this process 9\.9$"):
        Worker(path, LOAD, "9.9", "another")
    with pytest.raises(ggpy.Error, match=r"^node \S+: \S+\.gguf is another model there$"):
        Worker(path, LOAD, ggpy.__version__, "another")


def test_no_cluster_is_an_error_in_a_line(tmp_path):
    for address, words in (
        ("127.0.0.1:9", "no Ray cluster at 127.0.0.1:9"),
        ("ray://127.0.0.1:9", "no Ray cluster at ray://127.0.0.1:9"),
        ("nowhere", "no address"),
        ("127.0.0.1:port", "no Ray cluster"),
    ):
        with pytest.raises(ggpy.Error, match=words) as refused:
            ggpy.batch("demo", ROWS, tmp_path / "out", load=LOAD, ray=address)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_layers_on_several_nodes(nodes, tmp_path):
    nodes.add_node(num_cpus=1)
    with ggpy.load("demo", **LOAD) as one, ggpy.load("demo", **LOAD, stages=2, ray=nodes.address) as many:
        tokens = one.tokenize("And it came to pass in those days, that the king sent unto all the land. " * 9)[:200]
        assert np.array_equal(one.logits(tokens), many.logits(tokens))
        expected = one.generate("In the beginning", max_tokens=30, temperature=0).run().text
        generation = many.generate("In the beginning", max_tokens=30, temperature=0)
        for _ in range(5):
            next(generation)
        ray.kill(many._runner._stages._links._actors[0])
        assert generation.run().text == expected
        with many.new_sequence() as sequence:
            sequence.extend(tokens)
            sequence.save(tmp_path / "saved")
        with many.load_sequence(tmp_path / "saved") as a, one.load_sequence(tmp_path / "saved") as b:
            assert np.array_equal(a.extend([7]), b.extend([7]))
    with ggpy.load("demo", **LOAD) as one:
        ggpy.batch(one, ROWS[:20], tmp_path / "one", ordered=True)
    ggpy.batch("demo", ROWS[:20], tmp_path / "many", ordered=True, ray=nodes.address, load={**LOAD, "stages": 2})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
