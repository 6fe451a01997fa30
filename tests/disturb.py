"""A model that is disturbed at random moments, hundreds of times: never a crash or a hang, and the next text is right.

    python -m tests.disturb --rounds 300 interrupts closes forks pools

- interrupts: SIGINT while a text, a constrained one, one with guesses, a batch or embeddings are made. What is made next
  is what it was before; what was interrupted goes on to its right end, where it can.
- closes: several threads generate while another closes the model. Each has its whole text or one line that says so; what
  comes after says so too, and nothing waits.
- forks: `os.fork` while threads generate. The child's model says that it is another process's, a new one there works.
- pools: the same through multiprocessing.

Each kind runs in a process of its own, so that a signal or a hang is seen.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import signal
import subprocess
import sys
import threading
import time

SECONDS = 120  # what no round takes, on however busy a machine: then each thread's place is shown
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PROMPT = "And the king said unto the men of the land, "


def make(model, what, seed):
    """Something that a model makes; the same for the same seed."""
    options = {"max_tokens": 12, "temperature": 1, "seed": seed}
    if what == "batch":
        return sorted((g.index, g.ids) for g in model.generate_batch([PROMPT, PROMPT * 2, "In the"], **options))
    if what == "embed":
        return model.embed([PROMPT, "a" * (seed + 1), "In the beginning"]).tobytes()
    return generation(model, what, options).run().ids


def generation(model, what, options):
    more = {"schema": {"json_schema": SCHEMA}, "lookup": {"lookup": True}}.get(what, {})
    return model.generate(PROMPT * 3, **options, **more)


def one_more():
    """A round begins."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)


def interrupts(path, rounds, rng):
    import ggpy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start behind them ignore it
    kinds = ("text", "schema", "lookup", "batch", "embed")
    with ggpy.load(path, n_ctx=256, n_threads=2) as model:
        right, seconds = {}, {}
        for what in kinds:
            for seed in range(3):
                began = time.perf_counter()
                right[what, seed] = make(model, what, seed)
                seconds[what] = min(time.perf_counter() - began, seconds.get(what, 1.0))
        met = went_on = 0
        while met < rounds:
            one_more()
            what, seed = rng.choice(kinds), rng.randrange(3)
            options = {"max_tokens": 12, "temperature": 1, "seed": seed}
            kept = []
            timer = threading.Timer(
                rng.uniform(0, 1.2 * seconds[what]), signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
            )
            try:
                timer.start()
                if what in ("batch", "embed"):
                    make(model, what, seed)
                else:
                    kept.append(generation(model, what, options))
                    kept[0].run()
                timer.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                met += 1
            timer.join()
            if kept and kept[0].finish_reason is None:
                assert kept[0].run().ids == right[what, seed], (what, seed, "going on")
                went_on += 1
            del kept
            what, seed = rng.choice(kinds), rng.randrange(3)
            assert make(model, what, seed) == right[what, seed], (what, seed)
    return f"{met} interrupts, {went_on} went on"


def closes(path, rounds, rng):
    import ggpy

    with ggpy.load(path, n_ctx=256, n_threads=2) as model:
        options = {"max_tokens": 40, "temperature": 1, "seed": 1}
        began = time.perf_counter()
        expected = model.generate(PROMPT, **options).run().ids
        seconds = time.perf_counter() - began
    whole = refused = 0
    for _ in range(rounds):
        one_more()
        model = ggpy.load(path, n_ctx=256, n_threads=2)
        ends = []

        def work(model=model, ends=ends):
            generation = None
            try:
                generation = model.generate(PROMPT, **options)
                ends.append(generation.run().ids == expected)
            except ggpy.Error as error:
                ends.append(str(error))
                after = generation if generation is not None else iter(())
                with contextlib.suppress(ggpy.Error):
                    list(after)

        idle = model.generate(PROMPT, **options)
        next(idle)
        sequence = model.new_sequence()
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 1.5 * seconds))
        model.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread hangs"
        assert len(ends) == 3 and all(e is True or "the model is closed" in str(e) for e in ends), ends
        whole += ends.count(True)
        refused += 3 - ends.count(True)
        check_refused(model, sequence)
        with contextlib.suppress(ggpy.Error):  # others may have moved it to its end
            list(idle)
            assert idle.ids == expected
        sequence.close()
        idle.cancel()
        model.close()
    return f"{whole} whole, {refused} refused"


def check_refused(model, sequence):
    """What a closed model does."""
    import ggpy

    for use in (lambda: sequence.extend([1]), lambda: model.generate(PROMPT), lambda: model.embed(["a"])):
        try:
            use()
        except ggpy.Error:
            continue
        raise AssertionError("used after its end")


def busy(model, ending, wrong, expected, options):
    """A thread that generates until it shall end."""
    while not ending.is_set():
        if model.generate(PROMPT, **options).run().ids != expected:
            wrong.append("another text")


def in_the_child(path, model, expected, options, again):
    """What a fork does; 0 if all is as it should be."""
    import ggpy

    for use in (lambda: model.generate(PROMPT).run(), model.new_sequence, lambda: model.embed(["a"])):
        try:
            use()
            return 1
        except ggpy.Error as error:
            if "another process" not in str(error):
                return 2
    model.close()
    if again:
        with ggpy.load(path, n_ctx=256, n_threads=2) as mine:
            if mine.generate(PROMPT, **options).run().ids != expected:
                return 3
    return 0


def while_busy(path, fork):
    """Calls `fork(model, expected, options)` while two threads generate."""
    import ggpy

    options = {"max_tokens": 10, "temperature": 1, "seed": 1}
    with ggpy.load(path, n_ctx=256, n_threads=2) as model:
        expected = model.generate(PROMPT, **options).run().ids
        ending, wrong = threading.Event(), []
        threads = [threading.Thread(target=busy, args=(model, ending, wrong, expected, options)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            said = fork(model, expected, options)
        finally:
            ending.set()
            for thread in threads:
                thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        assert model.generate(PROMPT, **options).run().ids == expected
    return said


def forks(path, rounds, rng):
    def fork(model, expected, options):
        for i in range(rounds):
            one_more()
            time.sleep(rng.uniform(0, 0.02))
            pid = os.fork()
            if not pid:
                signal.alarm(60)  # a hang ends by it
                code = 9
                with contextlib.suppress(BaseException):
                    code = in_the_child(path, model, expected, options, again=i % 4 == 0)
                os._exit(code)
            status = os.waitpid(pid, 0)[1]
            assert status == 0, f"the child ended with {status >> 8}, signal {status & 127}"
        return f"{rounds} forks"

    return while_busy(path, fork)


_given = []  # what a process of a pool inherits


def _use(i):
    return in_the_child(*_given, again=i % 4 == 0)


def pools(path, rounds, rng):
    import multiprocessing

    def fork(model, expected, options):
        _given[:] = (path, model, expected, options)
        context, n = multiprocessing.get_context("fork"), 0
        while n < rounds:
            one_more()
            with context.Pool(2) as pool:
                assert pool.map_async(_use, range(8), chunksize=1).get(60) == [0] * 8
            n += 8
        return f"{n} calls in {n // 4} processes"

    return while_busy(path, fork)


KINDS = {f.__name__: f for f in (interrupts, closes, forks, pools)}


def campaign(kind, rounds, seed=0, model="demo"):
    """Runs a kind in a process of its own; what it said, and whether all was right."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.disturb", "--rounds", str(rounds), "--seed", str(seed)]
    done = subprocess.run([*command, "--model", str(model), "--work", kind], capture_output=True, text=True, check=False)
    said = done.stdout.strip() if not done.returncode else f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return f"{kind}: {said}", not done.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo", help="a GGUF file")
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        print(KINDS[options.work](options.model, options.rounds, random.Random(options.seed)))
        return
    right = True
    for kind in options.kinds:
        began = time.monotonic()
        said, well = campaign(kind, options.rounds, options.seed, options.model)
        print(f"{said} ({time.monotonic() - began:.0f} s)", flush=True)
        right &= well
    sys.exit(not right)


if __name__ == "__main__":
    main()
