"""Teams of threads: runs that Ctrl-C meets anywhere, forks, the end, and several callers at once."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from ggpy.errors import Error
from ggpy.graph import Graph, Pages, Program, Team
from ggpy.graph.threads import aligned
from ggpy.kernels.build import load
from ggpy.kernels.waiting import FUTEX

from .runs import alone
from .weights import random_weight

SECONDS = 120  # what no process here takes; a hang ends by it


def small_program(team, n=64):
    """A program with several barriers, its input, and what it gives."""
    rng = np.random.default_rng(0)
    g = Graph(5)
    x = g.input("x", (n,))
    for i in range(3):
        x = g.op("MUL_MAT", g.weight(random_weight(f"w{i}", "F32", (n, n), rng)), x)
    g.output(x, "out")
    inputs = {"x": rng.standard_normal((5, n)).astype(np.float32)}
    program = Program(g, Pages(1), team)
    return program, inputs, program.run(inputs, alone(5))["out"].copy()


def in_a_process(body):
    """Runs Python source, after imports, in a process of its own; what it prints."""
    head = """
    import os, signal, sys, threading, time
    import numpy as np
    from ggpy.errors import Error
    from ggpy.graph import Team
    from tests.graph.test_threads import alone, small_program
    """
    source = textwrap.dedent(head) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def team():
    team = Team(3)
    yield team
    team.close()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals as POSIX has them")
@pytest.mark.parametrize("pause", [0, 0.002], ids=["awake", "asleep"])
def test_runs_go_on_after_ctrl_c_anywhere(pause):
    """With pauses, in which the workers fall asleep, Ctrl-C also meets their waking."""
    said = in_a_process(
        f"""
        team = Team(3)
        program, inputs, expected = small_program(team)
        ending = threading.Event()
        armed = False

        def once(*_):  # an interrupt that falls between two tries would end the test
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, once)
        started = time.perf_counter()
        program.run(inputs, alone(5))
        most = max(0.003, 3 * (time.perf_counter() - started))  # else nothing is ever right on a busy machine

        def interrupt():
            rng = np.random.default_rng(1)
            while not ending.wait(rng.uniform(0, most)):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        n_interrupts = n_right = 0
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        while n_interrupts < 400 or n_right < 100:
            try:
                armed = True
                got = program.run(inputs, alone(5))["out"]
                assert (got == expected).all()
                n_right += 1
                time.sleep({pause})
                armed = False
            except KeyboardInterrupt:
                n_interrupts += 1
        ending.set()
        interrupter.join()
        assert (program.run(inputs, alone(5))["out"] == expected).all()
        team.close()
        print("right")
        """
    )
    assert said == "right\n"


def run_with_an_exception_at(team, program, inputs, n):
    """Runs a program, but raises KeyboardInterrupt before the team's n-th bytecode; whether there was one."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.endswith("threads.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if count == n:
                raise KeyboardInterrupt
            count += 1
        return trace

    sys._getframe().f_trace_opcodes = True  # Python 3.12 gives no such events otherwise, the first time
    sys.settrace(trace)
    try:
        program.run(inputs, alone(5))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="traces bytecodes")
@pytest.mark.parametrize("pause", [0, 0.01], ids=["awake", "asleep"])
def test_an_exception_at_any_bytecode_leaves_a_team_that_works(team, pause):
    program, inputs, expected = small_program(team)
    n = 0
    while True:
        time.sleep(pause)
        interrupted = run_with_an_exception_at(team, program, inputs, n)
        np.testing.assert_array_equal(program.run(inputs, alone(5))["out"], expected)
        if not interrupted:
            break
        n += 1
    assert n > 50


def test_workers_that_fall_asleep_as_a_run_begins_take_part(team):
    """Pauses about as long as workers wait before they sleep."""
    program, inputs, expected = small_program(team)
    rng = np.random.default_rng(2)
    for _ in range(300):
        until = time.perf_counter() + rng.uniform(0, 0.003)
        while time.perf_counter() < until:
            pass
        np.testing.assert_array_equal(program.run(inputs, alone(5))["out"], expected)


@pytest.mark.skipif(not FUTEX, reason="threads that wait only yield here")
def test_more_threads_than_processors_sleep_while_they_wait():
    said = in_a_process(
        """
        import resource

        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        team = Team(8)
        program, inputs, expected = small_program(team)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        for _ in range(100):
            assert (program.run(inputs, alone(5))["out"] == expected).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before)
        """
    )
    assert int(said) > 500  # of 7 workers at 4 barriers of 100 runs


def test_several_threads_run_one_team_in_turn(team):
    programs = [small_program(team, n) for n in (32, 64, 96)]
    wrong = []

    def work(program, inputs, expected):
        for _ in range(100):
            if not np.array_equal(program.run(inputs, alone(5))["out"], expected):
                wrong.append(program)

    threads = [threading.Thread(target=work, args=p) for p in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(t.is_alive() for t in threads)
    assert not wrong


def test_a_closed_team_says_so():
    team = Team(2)
    program, inputs, _ = small_program(team)
    team.close()
    team.close()
    with pytest.raises(Error, match="closed"):
        program.run(inputs, alone(5))


def test_close_waits_for_the_run_that_is_under_way():
    team = Team(2)
    kernel = load(["multiply_int8"])["multiply_int8"]
    out = aligned(512 * team.n_threads)
    params = np.array([1 << 22, out.ctypes.data], np.int64)
    tape = np.array([(kernel, params.ctypes.data, 0)] * 4, np.int64)
    ended, refused = [], []

    def work():
        try:
            while True:
                team.run(tape)
                ended.append(time.perf_counter())
        except Error as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(ended) < 2:
        time.sleep(0.001)
    team.close()
    closed = time.perf_counter()
    for thread in threads:
        thread.join(SECONDS)
    assert refused == ["the model is closed"] * 2
    assert max(ended[:-1]) < closed  # the last may have ended just as `close` came, and was noted later


def test_workers_end_with_their_team():
    names = {f"ggpy-{i}" for i in (1, 2)}
    before = {t for t in threading.enumerate() if t.name in names}
    team = Team(3)
    workers = {t for t in threading.enumerate() if t.name in names} - before
    assert len(workers) == 2
    del team
    for worker in workers:
        worker.join(SECONDS)
    assert not any(w.is_alive() for w in workers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_fork_refuses_the_team_and_can_open_another(n_threads):
    said = in_a_process(
        f"""
        team = Team({n_threads})
        program, inputs, expected = small_program(team)
        # The fork happens in the midst of another thread's run, which holds the team's lock.
        threading.Thread(target=lambda: [program.run(inputs, alone(5)) for _ in range(20000)], daemon=True).start()
        for i in range(5):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                signal.alarm(60)
                try:
                    program.run(inputs, alone(5))
                except Error as error:
                    print("open the model again here" in str(error))
                team.close()
                again = Team({n_threads})
                print((small_program(again)[2] == expected).all())
                again.close()
                sys.exit()  # through atexit's functions and finalizers
            assert os.waitpid(pid, 0)[1] == 0
        """
    )
    assert said == "True\nTrue\n" * 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_process_of_multiprocessing_gets_the_error():
    said = in_a_process(
        """
        import multiprocessing

        team = Team(2)
        program, inputs, expected = small_program(team)

        def work(_):
            try:
                program.run(inputs, alone(5))
            except Error as error:
                return str(error)

        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(*pool.map(work, range(2)), sep="\\n")
        assert (program.run(inputs, alone(5))["out"] == expected).all()
        """
    )
    assert said.count("opened in another process") == 2


@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_teams_are_not_copied(team, act):
    with pytest.raises(Error, match="can't be copied or pickled"):
        act(team)
