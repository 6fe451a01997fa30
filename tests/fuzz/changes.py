"""Changes of files, each by random numbers: `(rng, content)` gives the new content."""

import json
import struct

import numpy as np

from ggpy.quant import BLOCK_TYPES, block_type

INTEGERS = [0, 1, 2, 3, 7, 31, 33, 255, 1 << 16, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, -1]
INTEGERS += [4, 5, 6, 8, 16, 60, 64]  # which models have
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-300, 1e38, 3.4e38, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "\0", "a" * 70000, "\x1b[31m", "{{ 1 // 0 }}", "\ud800"]
ARCHITECTURES = ["llama", "qwen2", "bert", "mamba2", "gpt-oss", "deepseek2", "lfm2moe", "gemma4", "qwen3next"]
TEMPLATES = [
    "{{ messages }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(a=[1]) %}" + "{% set n.a = [n.a, n.a] %}" * 60 + "{{ n.a }}",
]
#: NaN, infinities, and the largest there are, as float32 and as the float16 and the exponents that are blocks' scales
PIECES = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, bytes(4), b"\xff\xff\x7f\x7f"]
PIECES += [b"\0\x7e\0\x7e", b"\0\x7c\0\xfc", b"\xff\x7b\xff\x7b", b"\xfe" * 4]


def odd_number(rng, kind):
    """A number that fits a GGUF type, and often no model."""
    if kind.startswith("float"):
        value = rng.choice(FLOATS)
        return value if kind == "float64" or not 3.5e38 < abs(value) < float("inf") else 3e38
    if kind == "bool":
        return rng.choice([0, 1, 2, 255])
    bits = int(kind.lstrip("uint"))
    low, high = (0, (1 << bits) - 1) if kind.startswith("u") else (-(1 << bits - 1), (1 << bits - 1) - 1)
    return min(max(rng.choice(INTEGERS), low), high)


def change_key(rng, model, others):
    """Removes a key, or gives it another value; or takes one that other files have."""
    from tests.file.make import NUMBERS, string, u32, u64

    key = rng.choice(list(model.keys))
    what = rng.randrange(9)
    if what == 0:
        del model.keys[key]
    elif what <= 2:
        kind = rng.choice(list(NUMBERS))
        model.set(key, kind, odd_number(rng, kind))
    elif what == 3:
        text = rng.choice(ARCHITECTURES if "architecture" in key else TEXTS).encode("utf-8", "surrogatepass")
        model.keys[key] = string(key) + u32(8) + string(text)
    elif what == 4:
        kind = rng.choice(list(NUMBERS))
        model.set(key, kind, [odd_number(rng, kind) for _ in range(rng.choice([0, 1, 2, 3, 512]))])
    elif what == 5:
        n = rng.choice([0, 1, 511, 512, 513])
        texts = [rng.choice(["", "a", "b", "<0x0A>", "é"]).encode() + bytes([rng.randrange(256)]) for _ in range(n)]
        model.keys[key] = string(key) + u32(9) + u32(8) + u64(n) + b"".join(map(string, texts))
    elif what == 6 or not others:
        model.set("tokenizer.chat_template", "string", rng.choice(TEMPLATES))
    else:
        name = rng.choice(list(others))
        kind = rng.choice(["uint32", "float32", "bool"])
        own = key.partition(".")[0] + "." + name.partition(".")[2]
        model.keys[name] = others[name]
        if own not in model.keys:
            model.set(own, kind, odd_number(rng, kind))


def change_vocabulary(rng, model, _):
    """Changes texts of a list: tokens, merges, datasets."""
    from tests.file.make import string, u32, u64

    lists = [key for key, raw in model.keys.items() if raw[8 + len(key) :][:8] == u32(9) + u32(8)]
    if not lists:
        return
    key = rng.choice(lists)
    raw, texts = model.keys[key][8 + len(key.encode()) + 16 :], []
    at = 0
    while at + 8 <= len(raw):
        (n,) = struct.unpack_from("<Q", raw, at)
        texts.append(raw[at + 8 : at + 8 + n])
        at += 8 + n
    for _ in range(rng.choice([1, 2, 10])):
        if texts:
            i, other = rng.randrange(len(texts)), rng.choice(texts)
            odd = [b"", b" ", b"\xff\xfe", b"\0", b"a" * 5000, b"a b c", "\u2581".encode(), b"<|im_end|>", rng.randbytes(3)]
            texts[i : i + 1] = rng.choice([[], [other], [other, other], [rng.choice(odd)], [texts[i] + b" " + other]])
    model.keys[key] = string(key) + u32(9) + u32(8) + u64(len(texts)) + b"".join(map(string, texts))


def change_value(rng, model, _):
    """Overwrites the value of a number, or items of an array, where they are."""
    key = rng.choice([k for k, raw in model.keys.items() if len(raw) > len(k) + 12])
    raw = bytearray(model.keys[key])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(8 + len(key.encode()) + 4, len(raw))
        if rng.random() < 0.5:
            raw[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        else:
            raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 6, 0x7FC00000, 0x7F800000, 0xFFFFFFFF]))[: len(raw) - at]
    model.keys[key] = bytes(raw)


def change_tensor(rng, model, _):
    """A tensor's place, type or shape, with data that fit or don't."""
    from tests.file.edit import Stored

    name = rng.choice(list(model.tensors))
    tensor, what = model.tensors[name], rng.randrange(11)
    if not tensor.dims:  # an earlier change took them
        return
    if what == 0:
        del model.tensors[name]
    elif what == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([abs(i) for i in INTEGERS])
    elif what == 2:
        tensor.dims = rng.choice([tensor.dims[::-1], tensor.dims[:1], [*tensor.dims, 1], [1, *tensor.dims], []])
    elif what == 3:
        tensor.type_id = rng.randrange(42)
    elif what == 4:
        tensor.data = tensor.data[: rng.choice([0, 1, len(tensor.data) // 2, len(tensor.data) - 1])]
    elif what == 5:
        other = rng.choice(list(model.tensors))
        model.tensors[name], model.tensors[other] = model.tensors[other], tensor
    elif what == 6:
        model.tensors[name + rng.choice(["", ".x", "\n", "\x1b[0m"])] = Stored(
            list(tensor.dims), tensor.type_id, tensor.data
        )
    elif what == 7:
        tensor.offset = rng.choice([0, 32, 64, 1 << 20, 1 << 62])
    elif what == 8:  # into others
        total = sum(len(t.data) for t in model.tensors.values())
        tensor.offset = rng.randrange(total + 1) // 32 * 32
    else:  # as a sound file of another model has it
        i = rng.randrange(len(tensor.dims))
        factor = rng.choice([1, 1, 2, 0.5])
        tensor.dims[i] = max(1, int(tensor.dims[i] * factor) + rng.choice([-1, 0, 0, 1, 16]))
        if what == 10:
            tensor.type_id = rng.choice([kind.id for kind in BLOCK_TYPES.values()])
        kind = block_type(tensor.type_id)
        n = int(np.prod(tensor.dims)) // kind.block_size * kind.n_bytes
        tensor.data = (tensor.data * (n // max(1, len(tensor.data)) + 1))[:n] if n < 1 << 22 else b""


def change_data(rng, model, _):
    """Damages weights: all, a row, some bytes."""
    tensor = model.tensors[rng.choice(list(model.tensors))]
    tensor.data = with_pieces(rng, tensor.data)


def with_pieces(rng, data):
    """Damages numbers: all, a row, some."""
    data = bytearray(data)
    if not data:
        return b""
    start = rng.choice([0, rng.randrange(len(data)) // 4 * 4])
    n = rng.choice([4, 64, 256, len(data)])
    piece = rng.choice([*PIECES, rng.randbytes(64)])
    data[start : start + n] = (piece * (n // len(piece) + 1))[: len(data[start : start + n])]
    return bytes(data)


def change_bytes(rng, content):
    """Cuts a file off, or overwrites bytes, mostly of its head."""
    content = bytearray(content)
    if not content:
        return b""
    if rng.random() < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice([1, 4, 16])):
        at = rng.randrange(min(len(content), rng.choice([64, 4096, len(content)])))
        content[at] = rng.choice([0, 1, 255, rng.randrange(256)])
    return bytes(content)


def change_json(rng, value, most=2):
    """Replaces, removes or doubles parts of a JSON document."""
    for _ in range(rng.randint(1, most)):
        holder, key, inner = None, None, value
        while isinstance(inner, (dict, list)) and inner and (holder is None or rng.random() < 0.8):
            holder, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = holder[key]
        if holder is None:
            return value
        shapes = [None, True, [], {}, [inner] * 3, {"a": inner}, str(inner)]
        new = rng.choice([*shapes, *TEXTS[:5], *INTEGERS, *FLOATS])
        if rng.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = new
    return value


# Whole files: a function for each suffix, and for others what they are


def gguf(rng, content, others=()):
    from tests.file.edit import Edited

    model = Edited.read(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if model.tensors and model.keys:
            change = rng.choice([change_key, change_value, change_vocabulary, change_tensor, *[change_data] * 3])
            change(rng, model, others)
    content = model.bytes()
    return change_bytes(rng, content) if rng.random() < 0.1 else content


def safetensors(rng, content):
    n = int.from_bytes(content[:8], "little")
    head, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    how = rng.random()
    if how < 0.15:
        return change_bytes(rng, content)
    if how < 0.4:
        data = with_pieces(rng, data)
    elif how < 0.7:
        one, other = (head[rng.choice([name for name in head if name != "__metadata__"])] for _ in range(2))
        what = rng.choice(["data_offsets", "shape", "dtype", "type"])
        if what == "type":  # of as many bytes
            types = {"F32": "I32", "I32": "F32", "BF16": "F16", "U8": "I8"}
            one["dtype"] = types.get(one["dtype"], one["dtype"])
        else:
            one[what], other[what] = other[what], one[what]
    else:
        head = change_json(rng, head)
    head = json.dumps(head).encode()
    lengths = [*[len(head)] * 8, n, 1 << 40]
    return rng.choice(lengths).to_bytes(8, "little") + head + data


def as_json(rng, content):
    """JSON; sometimes with a key twice, without end, or of brackets."""
    text = json.dumps(change_json(rng, json.loads(content)))
    how = rng.random()
    if how < 0.03:
        text = "[" * 100_000
    elif how < 0.06 and len(text) > 2 and text[0] == "{":
        text = text[:-1] + "," + text[1:]
    elif how < 0.1:
        return change_bytes(rng, text.encode())
    return text.encode()


def card(rng, content):
    """A model card."""
    head = ["a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]", "tags: " + "[" * 5000, "tags: {a: [1, {}]}", "license: 1\nlicense: 2"]
    if rng.random() < 0.5:
        return change_bytes(rng, content)
    return f"---\n{rng.choice([*head, *TEXTS[:5], *map(str, FLOATS)])}\n".encode() + content[4:]


def sentencepiece(rng, content):
    """A SentencePiece model: fields of a protocol buffer, most of which hold fields."""
    if rng.random() < 0.15:
        return change_bytes(rng, content)
    fields = list(_fields(content))
    for _ in range(rng.choice([1, 1, 2, 10])):
        i = rng.choice([rng.randrange(len(fields)), rng.randrange(10), -1 - rng.randrange(3)]) % len(fields)
        tag, value = fields[i]
        inner = list(_fields(value))
        _change_field(rng, inner, [v for _, v in _fields(rng.choice(fields)[1])])
        fields[i : i + 1] = rng.choice([[], [fields[i]] * 2, [rng.choice(fields)], *[[(tag, _packed(inner))]] * 9])
        if not fields:
            break
    if rng.random() < 0.05:
        at = rng.randrange(len(fields) + 1)
        wrong = b"\x0a" + _varint(rng.choice([0, 1 << 31, (1 << 64) - 1]))
        return _packed(fields[:at]) + wrong + _packed(fields[at:])
    return _packed(fields)


def _change_field(rng, fields, others):
    """Gives one of a message's fields another value, removes or doubles it, or adds one."""
    how = rng.random()
    if how < 0.2 or not fields:
        fields.append(rng.choice([(8 * rng.randrange(1, 60), rng.choice(INTEGERS)), (10, b""), (21, PIECES[0]), (24, 99)]))
        return
    i = rng.randrange(len(fields))
    tag, value = fields[i]
    if how < 0.4:
        fields[i : i + 1] = rng.choice([[], [fields[i]] * 2])
    elif isinstance(value, int):
        fields[i] = tag, rng.choice(INTEGERS)
    elif tag & 7 == 5:
        fields[i] = tag, rng.choice([piece[:4] for piece in PIECES] + [struct.pack("<f", rng.uniform(-20, 0))])
    else:
        texts = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
        texts += [v for v in others if isinstance(v, bytes)] + ["▁▁".encode(), b"<0x41>", b" ", value * 2, rng.randbytes(6)]
        fields[i] = tag, rng.choice(texts) if rng.random() < 0.7 else change_bytes(rng, value or b"a")


def _fields(content):
    """The tag and value of each field: a number, or bytes."""
    at = 0
    while at < len(content):
        tag, at = _number(content, at)
        if tag & 7:
            n, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or _number(content, at)
            value, at = content[at : at + n], at + n
        else:
            value, at = _number(content, at)
        yield tag, value


def _packed(fields):
    found = []
    for tag, value in fields:
        if isinstance(value, int):
            value = _varint(value)
        elif tag & 7 == 2:
            value = _varint(len(value)) + value
        found += [_varint(tag), value]
    return b"".join(found)


def _number(content, at):
    """A number of seven bits a byte, and where it ends."""
    n = shift = 0
    while True:
        n, shift, at = n | (content[at] & 127) << shift, shift + 7, at + 1
        if content[at - 1] < 128:
            return n, at


def _varint(n):
    n, found = n & (1 << 64) - 1, b""
    while n > 127:
        found, n = found + bytes([n & 127 | 128]), n >> 7
    return found + bytes([n])


def numbers(rng, content):
    """A file of four-byte numbers."""
    content = bytearray(content)
    if rng.random() < 0.5:
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.choice([0, 4, 8, 12, 16, rng.randrange(len(content) // 4) * 4])
            content[at : at + 4] = rng.choice([*PIECES, *(struct.pack("<i", n) for n in (0, 1, -1, 3, 2**31 - 1))])
    return change_bytes(rng, content) if rng.random() < 0.5 else bytes(content)


def jsonl(rng, content):
    """Lines of results: cut anywhere, in another order, twice, changed, or of zeros."""
    sound = content.splitlines(keepends=True)
    lines = list(sound)
    for _ in range(rng.choice([1, 1, 2])):
        i, how = rng.randrange(len(lines)), rng.randrange(6)
        if how == 0:
            del lines[i:]
            lines.append(content[: rng.randrange(200)])
        elif how == 1:
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif how == 2:
            lines[i], lines[0] = lines[0], lines[i]
        elif how == 3:
            lines[i] = as_json(rng, rng.choice(sound)) + b"\n"
        elif how == 4:
            lines[i:] = [rng.choice([bytes(4096), b"\n", b"null\n", b"[]\n", b"\xff\n", lines[i][:-1], b"\r\n"])]
        else:
            lines[i] = change_bytes(rng, lines[i]) if lines[i] else b""
    return b"".join(lines)


#: by a file's suffix
OF = {"gguf": gguf, "safetensors": safetensors, "json": as_json, "md": card, "model": sentencepiece}
