"""Speculation against plain decoding: prompt lookup where a text is copied with changes and where it isn't, a draft model
beside a bigger one.

    python benchmarks/speculation.py MODEL.gguf [-t 2] [-r 3]
    python benchmarks/speculation.py MODEL.gguf --draft SMALL.gguf [--layers 8] [-t 2] [-r 3]

With --draft the model is made bigger, in a temporary file: it gets --layers times as many layers, of which the new ones,
copies of the old, have outputs of zero. It gives the same bits as before and takes that much longer; its draft model agrees
with it as it does with the original. Plain and speculating generations take turns; each pair must give the same tokens.
Medians count.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import gguf
import numpy as np

import ggpy
from ggpy.file import GGUFFile

TEXT = """\
The library on Mill Street opened in 1907, when the town had four thousand people and one paved road. Its first \
librarian, Clara Whitman, ordered two hundred books by post and carried them from the station in a borrowed cart. She \
kept the reading room open until nine in the evening so that the men from the mill could come after work. In the first \
winter the stove smoked so badly that readers sat in their coats, and the town council voted eighty dollars for a new \
chimney. By 1920 the shelves held six thousand volumes, and a second room had been added for children, with low tables \
and a painted map of the world. During the flood of 1936 the staff carried every book to the upper floor in a single \
night, passing them from hand to hand along the stairs. Only eleven were lost. The building was closed for repairs in \
1974 and opened again two years later with a new roof, electric heating and a garden behind it. Today the library \
lends about forty thousand books a year, and the old stove stands in the entrance hall, where children are allowed to \
open its door and look inside. On the first Saturday of each month volunteers read stories aloud in the garden, and in \
bad weather they read beneath the painted map."""
TASKS = {
    "edit": f"Copy the text below word for word, but write Mary Stone instead of Clara Whitman.\n\n{TEXT}",
    "prose": "Tell me how a small town got its library, and what became of it.",
}
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.5, "seed": 1}}


def deeper(path: Path, times: int, out: Path) -> Path:
    """A model that predicts the same with `times` as many layers: the outputs of those that are added are zero."""
    with GGUFFile(path) as file:
        reader = gguf.GGUFReader(path)
        arch = str(file.metadata["general.architecture"])
        n_layers = int(file.metadata[f"{arch}.block_count"])
        writer = gguf.GGUFWriter(out, arch)
        for key, field in reader.fields.items():
            kind = field.types[0]
            if key == f"{arch}.block_count":
                writer.add_uint32(key, times * n_layers)
            elif not key.startswith("GGUF.") and key != "general.architecture":
                sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, sub_type)
        for name, tensor in file.tensors.items():
            data = tensor.data.view(np.float32) if tensor.type == "F32" else tensor.data
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor(name, data, raw_dtype=kind)
            if not name.startswith("blk."):
                continue
            _, layer, rest = name.split(".", 2)
            is_output = rest in ("attn_output.weight", "ffn_down.weight")
            for i in range(1, times):
                more = f"blk.{int(layer) + i * n_layers}.{rest}"
                writer.add_tensor(more, np.zeros_like(data) if is_output else data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def compare(model: ggpy.Model, draft: ggpy.Model | None, rounds: int, n: int) -> None:
    """Prints, for each task and way of sampling, what plain decoding and speculation take."""
    print(
        f"{'':16} {'tokens':>6} {'runs':>5} {'tok/run':>7} {'guessed':>7} {'right':>6} {'plain':>7} {'now':>7} {'ratio':>6}"
    )
    for task, question in TASKS.items():
        prompt = model.chat_prompt([{"role": "user", "content": question}])
        for name, sampling in SAMPLING.items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            ids: list[list[int]] = []
            for _ in range(rounds):
                for speculates in (False, True):
                    how = {} if not speculates else {"lookup": True} if draft is None else {"draft": draft}
                    generation = model.generate(prompt, max_tokens=n, **sampling, **how).run()
                    seconds[speculates].append(generation.decode_seconds)
                    ids.append(generation.ids)
            assert all(i == ids[0] for i in ids), "speculation changed the text"
            n_tokens, guessed, right = len(ids[0]) - 1, generation.n_drafted, generation.n_accepted
            runs = n_tokens - right
            plain, now = (n_tokens / statistics.median(seconds[s]) for s in (False, True))
            ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
            print(
                f"{task + ', ' + name:16} {n_tokens:6} {runs:5} {n_tokens / runs:7.2f} {guessed:7} "
                f"{right / max(1, guessed):6.0%} {plain:7.1f} {now:7.1f} {ratio:6.2f}"
            )


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="a smaller model; without it: prompt lookup")
    parser.add_argument("--layers", type=int, default=8, help="times as many layers")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", "--tokens", type=int, default=300)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    a = parser.parse_args()
    if a.draft is None:
        with ggpy.load(a.model, n_threads=a.threads) as model:
            compare(model, None, a.rounds, a.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = deeper(a.model, a.layers, Path(folder) / "deeper.gguf")
        with ggpy.load(path, n_threads=a.threads) as model, ggpy.load(a.draft, n_threads=a.threads) as draft:
            compare(model, draft, a.rounds, a.tokens)


if __name__ == "__main__":
    main()
