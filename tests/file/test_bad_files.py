"""Broken files are refused with a GGUFError that says where.

The cases are those of llama.cpp's tests/test-gguf.cpp, and more.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import GGUFError, UnsupportedError
from ggpy.file import GGUFFile, cursor
from ggpy.kernels import build, faults

from . import make
from .make import array, gguf, info, scalar, string, u32, u64

HUGE = 2**64 - 1
F32_DATA = bytes(64)

BAD = {
    # header
    "too short for the magic": (b"GG", "header, byte 0: not a GGUF file"),
    "bad magic": (gguf(magic=b"FUGG"), r"header, byte 0: not a GGUF file, it starts with b'FUGG'"),
    "magic alone": (b"GGUF", "header, byte 4: the file ends after 0 of 4 bytes"),
    "version 0": (gguf(version=0), "header, byte 4: GGUF version 0; ggpy reads versions 2 and 3"),
    "version 1": (gguf(version=1), "header, byte 4: GGUF version 1; ggpy reads versions 2 and 3"),
    "future version": (gguf(version=4), "header, byte 4: GGUF version 4; ggpy reads"),
    "big endian": (gguf(version=3 << 24), "header, byte 4: a big-endian GGUF file"),
    "no counts": (gguf()[:8], "header, byte 8: the file ends after 0 of 8 bytes"),
    "absurd tensor count": (gguf(n_tensors=HUGE), f"header, byte 8: {HUGE} tensors can't be"),
    "absurd key count": (gguf(n_key_values=HUGE), f"header, byte 16: {HUGE} key-values can't be"),
    "fewer keys than counted": (
        gguf([scalar("k", "uint8", 1)] * 1, n_key_values=2),
        "header, byte 16: 2 key-values can't be",
    ),
    "fewer tensors than counted": (gguf([], [info("a", [1])], n_tensors=2), "tensor 1 of 2"),
    # key-values
    "absurd key length": (
        gguf([string("key", HUGE) + u32(0) + b"\0"]),
        r"key 0 of 1, byte 24: \d+ bytes of a key can't be",
    ),
    "key longer than allowed": (
        gguf([scalar("k" * 65536, "uint8", 1)]),
        "key 0 of 1, byte 24: a key of 65536 bytes; 65535 are",
    ),
    "key that is not UTF-8": (gguf([scalar(b"a\xff", "uint8", 1)]), r"key 0 of 1, byte 32: the key b'a\\xff' isn't UTF-8"),
    "empty key": (gguf([scalar("", "uint16", 1)]), "key '', byte 32: a key must not be empty"),
    "key twice": (gguf([scalar("k", "uint8", 1), scalar("k", "int8", 1)]), "key 'k', byte 47: the key is there twice"),
    "unknown value type": (gguf([string("k") + u32(13) + u64(0)]), "key 'k', byte 33: unknown value type 13"),
    "negative value type": (gguf([string("k") + u32(2**32 - 1) + u64(0)]), "key 'k', byte 33: unknown value type"),
    "unknown item type": (gguf([string("k") + u32(9) + u32(77) + u64(0)]), "key 'k', byte 37: unknown value type 77"),
    "array of arrays": (
        gguf([string("k") + u32(9) + u32(9) + u64(1) + u32(0) + u64(0)]),
        "key 'k', byte 37: arrays of arrays aren't supported",
    ),
    "number cut short": (
        gguf([string("k") + u32(10) + b"\0"]),
        "key 'k', byte 37: the file ends after 1 of the value's 8 bytes",
    ),
    "absurd string length": (
        gguf([string("k") + u32(8) + string("v", HUGE)]),
        "key 'k', byte 37: string 0 of 1 reaches beyond",
    ),
    "absurd number count": (
        gguf([array("k", "uint8", [1], HUGE)]),
        f"key 'k', byte 41: {HUGE} items can't be in the 1 bytes",
    ),
    "count times size beyond 64 bits": (gguf([array("k", "uint64", [1], 2**61)]), "key 'k', byte 41: .* items can't be"),
    "absurd string count": (
        gguf([array("k", "string", ["a"], 2**63)]),
        f"key 'k', byte 41: {2**63} items can't be in the 9",
    ),
    "string in an array beyond the end": (
        gguf([string("k") + u32(9) + u32(8) + u64(2) + string("ab") + string("c", 2**40)]),
        "key 'k', byte 59: string 1 of 2 reaches beyond the file's end",
    ),
    "alignment of another type": (
        gguf([scalar("general.alignment", "int32", 32)]),
        "'general.alignment', byte 53: must be a uint32",
    ),
    "alignment is an array": (
        gguf([array("general.alignment", "uint32", [32])]),
        "'general.alignment', byte 65: must be a uint32",
    ),
    "alignment is a string": (
        gguf([scalar("general.alignment", "string", "32")]),
        "'general.alignment', byte 53: must be a uint32",
    ),
    "alignment 0": (
        gguf([scalar("general.alignment", "uint32", 0)]),
        "'general.alignment', byte 53: 0 isn't a power of two",
    ),
    "alignment 13": (gguf([scalar("general.alignment", "uint32", 13)]), "'general.alignment', byte 53: 13 isn't a power"),
    # tensors
    "name too long": (
        gguf([], [info("t" * 65, [4])], F32_DATA),
        "tensor 0 of 1, byte 24: a tensor's name of 65 bytes; 64 are allowed",
    ),
    "absurd name length": (gguf([], [string("t", HUGE) + bytes(32)], F32_DATA), "tensor 0 of 1, byte 24: .* can't be"),
    "name that is not UTF-8": (
        gguf([], [info(b"\xc3", [4])], F32_DATA),
        r"tensor 0 of 1, byte 32: the tensor's name b'\\xc3'",
    ),
    "5 dimensions": (gguf([], [info("t", [1] * 5)], F32_DATA), "tensor 't', byte 33: 5 dimensions; at most 4"),
    "absurd number of dimensions": (
        gguf([], [info("t", [1], n_dims=2**32 - 1)], F32_DATA),
        "'t', byte 33: 4294967295 dimensions",
    ),
    "negative dimensions": (
        gguf([], [info("t", [HUGE, HUGE])], F32_DATA),
        r"'t', byte 33: the shape \(\d+, \d+\) is too large",
    ),
    "too many values": (gguf([], [info("t", [2**33, 2**33])], F32_DATA), "'t', byte 33: the shape .* is too large"),
    "product of 2^64": (gguf([], [info("t", [2**32, 2**32])], F32_DATA), "'t', byte 33: the shape .* is too large"),
    "product of 2^64 and a 0": (gguf([], [info("t", [0, 2**62, 4])], F32_DATA), "'t', byte 33: the shape .* is too large"),
    "bytes beyond 64 bits": (
        gguf([], [info("t", [2**31, 2**31], 27)], F32_DATA),
        "'t', byte 33: the shape .* is too large",
    ),
    "removed type": (gguf([], [info("t", [32], 4)], F32_DATA), "tensor 't', byte 33: unknown tensor type 4"),
    "unknown type": (
        gguf([], [info("t", [32], 2**32 - 1)], F32_DATA),
        "tensor 't', byte 33: unknown tensor type 4294967295",
    ),
    "rows that are not whole blocks": (
        gguf([], [info("t", [33], 2)], F32_DATA),
        "tensor 't', byte 33: rows of 33 values can't be cut into Q4_0 blocks of 32",
    ),
    "absurd offset": (
        gguf([], [info("t", [4], 0, HUGE)], F32_DATA),
        f"'t', byte 33: the data's offset {HUGE} isn't a multiple",
    ),
    "absurd aligned offset": (
        gguf([], [info("t", [4], 0, 2**64 - 32)], F32_DATA),
        r"'t', byte 33: the data, 16 bytes at byte \d+, reach beyond the end",
    ),
    "name twice": (
        gguf([], [info("t", [4]), info("t", [4], 0, 32)], F32_DATA),
        "'t', byte 66: there are two tensors of this name",
    ),
    "offset that is not aligned": (
        gguf([], [info("a", [4]), info("t", [4], 0, 16)], F32_DATA),
        "'t', byte 66: the data's offset 16 isn't a multiple of the alignment 32",
    ),
    "offset that is not aligned as the file says": (
        gguf([scalar("general.alignment", "uint32", 64)], [info("a", [4]), info("t", [4], 0, 32)], bytes(99), alignment=64),
        "'t', byte 99: the data's offset 32 isn't a multiple of the alignment 64",
    ),
    # data
    "one byte of data too few": (
        gguf([], [info("t", [16])], F32_DATA[:-1]),
        "tensor 't', byte 33: the data, 64 bytes at byte 64, reach beyond the end of the file at byte 127",
    ),
    "no data": (gguf([], [info("t", [16])]), "tensor 't', byte 33: the data, 64 bytes at byte 64, reach beyond"),
    "sizes whose sum overflows": (
        gguf([], [info("a", [2**58], 24), info("b", [2**58], 24, 2**58)], F32_DATA),
        "tensor 'a', byte 33: the data, .* reach beyond",
    ),
}


@pytest.fixture
def refused(tmp_path):
    """Opens a file of the given bytes, which must fail with a GGUFError; gives its text behind the file's name."""

    def open_bytes(content):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(GGUFError) as caught:
            GGUFFile(path)
        start = f"{path}: "
        message = str(caught.value)
        assert message.startswith(start)
        assert "\n" not in message
        return message[len(start) :]

    return open_bytes


@pytest.mark.parametrize("case", BAD)
def test_refused(case, refused):
    content, problem = BAD[case]
    message = refused(content)
    assert re.search(problem, message), message


@pytest.mark.parametrize("case", BAD)
def test_refusing_allocates_next_to_nothing(case, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[case][0])
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(BAD[case][0]) + 200_000


def test_a_file_of_51_bytes_that_claims_2_to_the_63_values_fails_at_once(refused):
    content = gguf([array("key", "float32", [], 2**63)])
    assert len(content) == 51
    assert "items can't be in the" in refused(content)


def test_long_keys_do_not_flood_the_message(refused):
    assert len(refused(gguf([string("k" * 60000) + u32(99) + b"\0"]))) < 200


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\x9b2J", "a\u202eb", "a\u2028b", "a\x7f"])
def test_names_that_a_terminal_would_obey_are_refused(refused, name):
    for content in (gguf([string(name) + u32(0) + b"\0"]), gguf([], [info(name, [4])], bytes(16))):
        message = refused(content)
        assert "has control characters" in message and repr(name) in message


def test_strings_that_a_hole_in_the_file_stands_for_are_refused(refused, monkeypatch):
    monkeypatch.setattr(cursor, "MOST_STRINGS", 6)
    assert "7 strings in the file; ggpy reads up to 6" in refused(
        gguf([array("a", "string", [""] * 3), scalar("b", "string", ""), array("c", "string", [""] * 3)])
    )


def test_more_tensors_and_keys_than_models_have_are_refused(refused):
    assert "reads up to 262144" in refused(gguf(n_tensors=2**18 + 1, data=bytes(24 * 2**18 + 100)))
    assert "reads up to 65536" in refused(gguf(n_key_values=2**16 + 1, data=bytes(14 * 2**16 + 100)))


@pytest.fixture
def opened(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([], [info("t", [16])], F32_DATA))
    with GGUFFile(path) as file:
        yield path, file


@pytest.mark.skipif(sys.platform == "win32", reason="open files can't be changed there")
@pytest.mark.parametrize("change", ["shorten", "lengthen", "overwrite"])
def test_a_file_that_is_changed_in_place_is_found(opened, change):
    path, file = opened
    assert file.tensors["t"].data.shape == (64,)
    with path.open("r+b") as writer:
        if change == "shorten":
            writer.truncate(70)
        else:
            writer.seek(0, os.SEEK_END if change == "lengthen" else os.SEEK_SET)
            writer.write(b"GGUF")
    os.utime(path, ns=(0, 1))  # clocks may stand still meanwhile
    for use in (file.check, lambda: file.tensors["t"].data):
        with pytest.raises(GGUFError, match=r"model.gguf: the file was changed after it was opened"):
            use()


@pytest.mark.skipif(not faults.IS_SUPPORTED, reason="the system ends the process there")
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    build.load(["run_tape"])  # sets the handler
    path = tmp_path / "model.gguf"
    n = 1 << 16
    path.write_bytes(gguf([], [info("t", [n])], np.ones(n, np.float32).tobytes()))
    with GGUFFile(path) as file:
        data = file.tensors["t"].data.view(np.float32)
        stamp = path.stat()
        with path.open("r+b") as writer:
            writer.truncate(stamp.st_size // 2)
        read = data.sum()  # without the handler this ends the process
        assert n // 2 - 4096 < read <= n // 2
        with path.open("r+b") as writer:  # as long as it was, and as old; what was read was wrong all the same
            writer.truncate(stamp.st_size)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        with pytest.raises(GGUFError, match=r"model.gguf: the file was changed after it was opened, or can't be read"):
            file.check()
    with GGUFFile(path) as file:  # watched in the other's place
        file.check()


@pytest.mark.skipif(not faults.IS_SUPPORTED, reason="nothing is set there")
def test_other_bus_errors_go_to_whom_they_went(tmp_path):
    source = f"""
import faulthandler, mmap, sys
faulthandler.enable()
from ggpy.kernels import build
build.load(["run_tape"])
with open({str(tmp_path / "other")!r}, "w+b") as file:
    file.write(bytes(8192))
    file.flush()
    view = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
    view[4096]
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


def test_a_file_that_is_replaced_or_gone_stays_as_it_was(opened, tmp_path):
    path, file = opened
    if sys.platform != "win32":
        (tmp_path / "new").write_bytes(b"something else")
        os.replace(tmp_path / "new", path)
        assert file.tensors["t"].data.tobytes() == F32_DATA
        path.unlink()
    assert file.tensors["t"].data.tobytes() == F32_DATA


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_floats_that_no_model_has_are_refused_where_they_are_asked_for(tmp_path, kind, value):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([scalar("eps", kind, value), scalar("one", "int32", 1)]))
    with GGUFFile(path) as file:
        assert file.get("one", float) == 1.0
        with pytest.raises(GGUFError, match=r"key 'eps': .* is no number for a model"):
            file.get("eps", float)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("missing.gguf", "No such file"), (".", "not a regular file"), ("empty.gguf", "is empty"), ("a\0b", "null")],
)
def test_what_is_no_file_is_refused(tmp_path, path, problem):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(GGUFError, match=problem):
        GGUFFile(tmp_path / path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile(tmp_path / "pipe")


def use_everything(path):
    """Opens a file and touches all that it holds. Raises GGUFError alone."""
    with GGUFFile(path) as file:
        for value in file.metadata.values():
            if not isinstance(value, bool | int | float | str):
                assert len(value.tolist()) == len(value)
        for tensor in file.tensors.values():
            assert tensor.data.nbytes == tensor.n_bytes
            assert int(tensor.data.sum(dtype=np.int64)) >= 0
            with contextlib.suppress(UnsupportedError):
                assert tensor.dequantize().shape == tensor.shape
        repr((file, file.metadata, list(file.tensors.values())))


CONTENT, ENDS = make.small()


def test_the_small_file_is_sound(tmp_path):
    (tmp_path / "small.gguf").write_bytes(CONTENT)
    use_everything(tmp_path / "small.gguf")


@pytest.mark.parametrize(
    "length", sorted({*ENDS, *(end + 1 for end in ENDS), *range(1, len(CONTENT), 37), len(CONTENT) - 1})
)
def test_a_file_that_ends_too_early_is_refused(length, refused):
    assert "byte" in refused(CONTENT[:length])


@given(
    changes=st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.just(len(CONTENT)) | st.integers(0, len(CONTENT)),
)
@settings(max_examples=400, deadline=None)
def test_changed_bytes_give_a_gguf_error_or_a_sound_file(tmp_path_factory, changes, length):
    content = bytearray(CONTENT)
    for place, byte in changes:
        content[place] = byte
    fuzz(tmp_path_factory, bytes(content[:length]))


numbers = st.sampled_from([0, 1, 2, 4, 5, 8, 9, 31, 32, 2**31, 2**32 - 1, 2**61, 2**63, HUGE]) | st.integers(0, HUGE)
names = st.binary(max_size=4) | st.just(b"general.alignment") | st.just(b"split.count")
wild_values = st.builds(
    lambda key, kind, item, count, rest: string(key) + u32(kind) + (u32(item) + u64(count) if kind == 9 else b"") + rest,
    names,
    st.integers(0, 13),
    st.integers(0, 13),
    numbers,
    st.binary(max_size=20) | st.builds(string, st.binary(max_size=4), numbers | st.none()),
)
wild_infos = st.builds(
    lambda name, dims, kind, offset: info(name, dims, kind, offset),
    names,
    st.lists(numbers, max_size=5),
    st.integers(0, 42),
    st.sampled_from([0, 32, 64]) | numbers,
)


@given(
    key_values=st.lists(wild_values, max_size=4),
    infos=st.lists(wild_infos, max_size=3),
    n_tensors=st.none() | numbers,
    n_key_values=st.none() | numbers,
    data=st.integers(0, 200).map(bytes),
)
@settings(max_examples=600, deadline=None)
def test_random_headers_give_a_gguf_error_or_a_sound_file(
    tmp_path_factory, key_values, infos, n_tensors, n_key_values, data
):
    fuzz(tmp_path_factory, gguf(key_values, infos, data, n_tensors=n_tensors, n_key_values=n_key_values))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_give_a_gguf_error_or_a_sound_file(tmp_path_factory, content):
    fuzz(tmp_path_factory, b"GGUF" + u32(3) + content)


def fuzz(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    with contextlib.suppress(GGUFError):
        use_everything(path)


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "but a Git LFS pointer",
    b"\n<!DOCTYPE html>\n<html>": "but a web page",
    b'{"error":"Access to this model is restricted"}': "but a server's error message",
    b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{}}': "but a safetensors file: name the checkpoint's folder",
    b"PK\x03\x04 and more": "but a zip archive or PyTorch's weights",
    b"tjgg\x03\x00\x00\x00": "but a GGML file from before GGUF",
    b"\x1f\x8b\x08": "but a compressed archive",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_other_files_are_called_what_they_are(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=f"model.gguf: header, byte 0: not a GGUF file, {FOREIGN[content]}"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("type_id", "what"),
    [
        (4, "2023"),
        (31, "Q4_0 file"),
        (33, "Q4_0 file"),
        (36, "IQ4_NL file"),
        (38, "IQ4_NL file"),
        (137, "ik_llama"),
        (144, "ik_llama"),
    ],
)
def test_types_of_other_times_and_programs_are_called_what_they_are(type_id, what, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(make.gguf(infos=[make.info("w", [256], type_id)], data=bytes(1024)))
    with pytest.raises(GGUFError, match=f"model.gguf: tensor 'w'.* unknown tensor type {type_id}: .*{what}"):
        GGUFFile(path)
