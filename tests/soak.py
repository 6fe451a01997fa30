"""A long time of everything at once: memory, descriptors and threads stay as they are, and so does every text.

    python -m tests.soak --minutes 30
    python -m tests.soak --loads 500

One process keeps some models open (latent attention with experts, states, one with and without a LoRA adapter, the demo
model) and does one random thing after the other; what is done follows from `--seed` alone. Each result is a function of the
model and a small number, so that it is compared with the first of its kind, whatever went on beside it. A line a minute
says how much memory the process has (resident, its own share of it, its own alone), its descriptors and its threads. Growth
beyond MOST_SLOPE once it is warm, or one descriptor or thread more, is a failure. `--loads` opens and closes models only,
half of them by the collector; growth of more than MOST_LOADED MB after the first fifth is one, too.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MOST_SLOPE = 0.5  # MB a minute, of memory that is the process's own
MOST_LOADED = 2
WARM = 1 / 3  # of the time: caches and pages of four contexts fill up first
N_CTX = 192
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a"]}
SECONDS = 120  # what nothing here takes
_LIBC = ctypes.CDLL(None)
_MOST_ALIVE = 8  # generations and sequences that go on


class World:
    """What is open, and what was seen."""

    def __init__(self, seeds, seed):
        self.rng = random.Random(seed)
        self.seeds, self.folder = seeds, seeds / "scratch"
        self.folder.mkdir(exist_ok=True)
        self.names = sorted(path.stem for path in seeds.glob("*.gguf"))
        if (seeds / "adapter").exists():
            self.names.append("adapted")
        self.models = {name: self.load(name) for name in self.names}
        self.generations, self.sequences = [], []
        self.seen = {}
        self.counts = collections.Counter()

    def load(self, name):
        import ggpy

        path = self.seeds / f"{'llama' if name == 'adapted' else name}.gguf"
        lora = [self.seeds / "adapter"] if name == "adapted" else []
        return ggpy.load(path, n_ctx=N_CTX, n_threads=2, n_batch=64, lora=lora)

    def ids(self, name, x, n):
        """Tokens of a prompt; those of one `x` begin alike."""
        rng = random.Random(x)
        return [rng.randrange(3, min(self.models[name].architecture.n_vocab, 500)) for _ in range(n)]

    def check(self, what, result):
        """Compares a result with the first of its kind."""
        key, found = (hashlib.sha256(repr(each).encode()).digest() for each in (what, result))  # small: they stay
        if self.seen.setdefault(key, found) != found:
            raise AssertionError(f"{what}: another result than the first time")

    def forget(self, name):
        """Ends what belongs to a model."""
        self.generations = [g for g in self.generations if g[0][0] != name]
        self.sequences = [s for s in self.sequences if s[0] != name]


# What is done, each with a random model and number


def start(world, name, x):
    """A generation that others move on. Half have drafts."""
    prompt = world.ids(name, x % 5, 20 + x % 40)
    lookup = {"lookup": True} if x % 2 else {}
    generation = world.models[name].generate(prompt, max_tokens=30, temperature=1, seed=x, **lookup)
    world.generations.append(((name, "text", x), generation))


def advance(world, name, x):
    for _, generation in world.generations[: 1 + x % 3]:
        next(generation, None)


def finish(world, name, x):
    if world.generations:
        what, generation = world.generations.pop(x % len(world.generations))
        world.check(what, generation.run().ids)


def cancel(world, name, x):
    if world.generations:
        world.generations.pop(x % len(world.generations))[1].cancel()


def abandon(world, name, x):
    if world.generations:
        del world.generations[x % len(world.generations)]


def extend(world, name, x):
    sequence = world.models[name].new_sequence()
    sequence.extend(world.ids(name, x, 10 + x * 7 % 100))
    world.sequences.append((name, sequence))


def fork(world, name, x):
    if world.sequences:
        name, sequence = world.sequences[x % len(world.sequences)]
        tokens = world.ids(name, x, 5)
        if len(sequence) + 5 <= N_CTX:
            with sequence.fork() as other:
                world.check((name, "fork", tuple(sequence.ids), x), other.extend(tokens).tobytes())


def cut(world, name, x):
    if world.sequences:
        name, sequence = world.sequences[x % len(world.sequences)]
        sequence.keep(len(sequence) // 2)
        world.check((name, "cut", tuple(sequence.ids)), sequence.fork().extend([5]).tobytes())


def close_sequence(world, name, x):
    if world.sequences:
        world.sequences.pop(x % len(world.sequences))[1].close()


def save_and_load(world, name, x):
    if world.sequences:
        name, sequence = world.sequences[x % len(world.sequences)]
        sequence.save(world.folder / "sequence")
        with world.models[name].load_sequence(world.folder / "sequence") as again:
            if len(again) < N_CTX:
                world.check((name, "loaded", tuple(again.ids)), again.extend([7]).tobytes())


def cache(world, name, x):
    model = world.models[name]
    model.save_cache(world.folder / "cache", world.ids(name, x % 5, 70))
    model.load_cache(world.folder / "cache")


def embed(world, name, x):
    tokens = [world.ids(name, x + i, 3 + 5 * i) for i in range(4)]
    world.check((name, "embed", x), world.models[name].embed(tokens).tobytes())


def score(world, name, x):
    prompt = world.ids(name, x % 5, 20)
    scores = world.models[name].score(prompt, [world.ids(name, x + i, 4) for i in range(3)])
    world.check((name, "score", x), [s.logprob for s in scores])


def batch(world, name, x):
    prompts = [world.ids(name, x % 5, 10 + 9 * i) for i in range(6)]
    ended = world.models[name].generate_batch(prompts, max_tokens=4, temperature=1, seed=x)
    world.check((name, "batch", x), sorted((g.index, g.ids) for g in ended))


def constrained(world, name, x):
    generation = world.models["demo"].generate("A list: ", max_tokens=16, temperature=1, seed=x, json_schema=SCHEMA)
    world.check(("demo", "schema", x), generation.run().ids)


def hooked(world, name, x):
    seen = []
    model = world.models[name]
    with model.hooked({"blk.0.out": lambda name, value: seen.append(value.shape)}):
        model.logits(world.ids(name, x, 9))
    assert seen


def at_once(world, name, x):
    """Three threads, one of which cancels."""
    model, prompt, ids = world.models[name], world.ids(name, x % 5, 30), {}

    def work(i):
        generation = model.generate(prompt, max_tokens=8, temperature=1, seed=x + i)
        if i == 2:
            next(generation, None)
            generation.cancel()
        ids[i] = generation.run().ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ids) == 3, "a thread hangs"
    for i in range(2):
        world.check((name, "thread", x, i), ids[i])


def reload(world, name, x):
    """Closes a model, with or without what goes on in it, and opens it anew."""
    from ggpy.errors import Error

    running = [g for what, g in world.generations if what[0] == name]
    world.forget(name)
    if x % 2:
        running = []
    world.models[name].close()
    for generation in running:
        with contextlib.suppress(Error):
            list(generation)
    world.models[name] = world.load(name)


def another(world, name, x):
    """Opens a model once more for a moment, and leaves closing to the collector in half of all cases."""
    again = world.load(name)
    world.check((name, "logits", x), again.logits(world.ids(name, x, 12)).tobytes())
    if x % 2:
        again.close()


def child(world, name, x):
    """A fork, in which the model is refused, whatever happened here."""
    from ggpy.errors import Error

    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                world.models[name].generate([5, 6], max_tokens=1).run()
            except Error:
                code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


#: how often each is done
DEEDS = {
    start: 8,
    advance: 12,
    finish: 5,
    cancel: 2,
    abandon: 2,
    extend: 3,
    fork: 3,
    cut: 2,
    close_sequence: 3,
    save_and_load: 2,
    cache: 1,
    embed: 2,
    score: 2,
    batch: 1,
    constrained: 1,
    hooked: 1,
    at_once: 1,
    reload: 1,
    another: 0.5,
    child: 0.3 if hasattr(os, "fork") else 0,
}


def usage():
    """MB that are resident, its share of them, and its own alone; descriptors; threads.

    What C's allocator keeps of freed memory is given back first: it is no growth, and comes and goes by tens of MB.
    """
    gc.collect()
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = int(value) / 1024
    n_files = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    return fields["Rss"], fields["Pss"], fields["Anonymous"], n_files, threading.active_count()


def slope(points):
    """Of the line that fits (minute, value) best."""
    n = len(points)
    x, y = (sum(p[i] for p in points) / n for i in range(2))
    below = sum((p[0] - x) ** 2 for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / below if below else 0.0


def soak(seeds, minutes, seed=0, say=print):
    """Does things for so long; what was counted, and what grew."""
    world = World(seeds, seed)
    began, every = time.monotonic(), minutes / 60 if minutes < 10 else 1 / 6
    samples, lines = [], 0
    while (now := (time.monotonic() - began) / 60) < minutes:
        deed = world.rng.choices(list(DEEDS), DEEDS.values())[0]
        deed(world, world.rng.choice(world.names), world.rng.randrange(40))
        world.counts[deed.__name__] += 1
        del world.generations[:-_MOST_ALIVE], world.sequences[:-_MOST_ALIVE]
        if now >= len(samples) * every:
            samples.append((now, *usage()))
        if now >= lines:
            rss, pss, own, files, threads = samples[-1][1:]
            n = sum(world.counts.values())
            loads = world.counts["reload"] + world.counts["another"]
            say(
                f"{now:4.0f} min: {n} deeds, {loads} loads, {len(world.seen)} results; RSS {rss:.1f} MB, PSS {pss:.1f} MB, "
                f"own {own:.1f} MB, {files} descriptors, {threads} threads"
            )
            lines += 1
    warm = [s for s in samples if s[0] >= minutes * WARM]
    found = {name: slope([(s[0], s[i]) for s in warm]) for i, name in ((1, "RSS"), (2, "PSS"), (3, "own"))}
    # PSS grows, too, as other processes that share libraries end.
    grown = [f"{name} {value:+.2f} MB a minute" for name, value in found.items() if value > MOST_SLOPE and name != "PSS"]
    for i, name in ((4, "descriptors"), (5, "threads")):
        least = min(s[i] for s in warm[: len(warm) // 2 + 1])
        if warm[-1][i] > least + (2 * len(world.names) if name == "threads" else 0):  # workers of constraints come and go
            grown.append(f"{name}: {least}, then {warm[-1][i]}")
    say(f"{dict(world.counts.most_common())}")
    say("a minute, once warm: " + ", ".join(f"{name} {value:+.3f} MB" for name, value in found.items()))
    for model in world.models.values():
        model.close()
    return world.counts, grown


def loads(seeds, n, say=print):
    """Opens and closes models n times; what grew."""
    world, found = World(seeds, 0), []
    for i in range(n + 1):
        if i in (n // 5, n):
            found.append(usage())
            rss, pss, own, files, threads = found[-1]
            say(f"{i} loads: RSS {rss:.1f} MB, PSS {pss:.1f} MB, own {own:.1f} MB, {files} descriptors, {threads} threads")
        another(world, world.names[i % len(world.names)], i)
    first, last = found
    grown = [name for name, a, b in zip(("RSS", "PSS", "own"), first, last, strict=False) if b > a + MOST_LOADED]
    return grown + ["descriptors or threads"] * (first[3:] != last[3:])


def make_seeds(folder):
    """The models, made by transformers and PEFT in a process whose memory doesn't count."""
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.soak", "--make", str(folder)], check=True)


def _make(folder):
    import ggpy
    from tests.converters.test_lora import LINEAR, adapted
    from tests.models.checkpoints import converted
    from tests.models.test_adapters import saved
    from tests.models.test_moe import made
    from tests.models.test_states import made as with_states

    for name, model in (("latent", made("V3")), ("states", with_states("qwen35"))):
        (folder / "work" / name).mkdir(parents=True)
        converted(folder / "work" / name, model).rename(folder / f"{name}.gguf")
    (folder / "work" / "llama").mkdir()
    saved(folder / "work" / "llama", "Llama").rename(folder / "llama.gguf")
    adapted(folder / "work" / "llama" / "base", folder / "adapter", target_modules=LINEAR)
    ggpy.convert(Path(ggpy.__file__).parent / "demo_model", folder / "demo.gguf", "q8_0")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--loads", type=int, default=0, help="open and close models so often instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        _make(options.make)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_seeds(Path(folder))
        if options.loads:
            grown = loads(Path(folder), options.loads)
        else:
            _, grown = soak(Path(folder), options.minutes, options.seed, lambda line: print(line, flush=True))
    for line in grown:
        print(f"grows: {line}")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
