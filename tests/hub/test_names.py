"""What people type, and which file they mean."""

import pytest

from ggpy.errors import Error
from ggpy.hub.names import Reference, choose, models_among, parse, type_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", Reference("a/b")),
        ("a/b:Q4_K_M", Reference("a/b", type="Q4_K_M")),
        ("a/b:latest", Reference("a/b")),
        ("a/b@v1.0:q8_0", Reference("a/b", "v1.0", type="q8_0")),
        ("a/b@refs/pr/1", Reference("a/b", "refs/pr/1")),
        ("a/b/c.gguf", Reference("a/b", file="c.gguf")),
        ("a/b@v1/Q4/c-00001-of-00002.gguf", Reference("a/b", "v1", "Q4/c-00001-of-00002.gguf")),
        ("hf.co/a/b:UD-Q4_K_XL", Reference("a/b", type="UD-Q4_K_XL")),
        ("hf://a/b", Reference("a/b")),
        ("huggingface.co/a/b/blob/main/c.gguf", Reference("a/b", file="c.gguf")),
        ("https://huggingface.co/a/b", Reference("a/b")),
        ("https://huggingface.co/a/b/", Reference("a/b")),
        ("https://huggingface.co/a/b/tree/v2", Reference("a/b", "v2")),
        ("https://huggingface.co/a/b/blob/main/d/c.gguf", Reference("a/b", file="d/c.gguf")),
        ("https://huggingface.co/a/b/resolve/refs%2Fpr%2F3/c.gguf?download=true", Reference("a/b", "refs/pr/3", "c.gguf")),
        ("https://example.org/a/b", None),
        *((text, None) for text in ("a", "a/b/c", "a/b.gguf", "./a/b", "../b", "/a/b", "~/b", "C:/a/b", "", "a/b c")),
    ],
)
def test_names_and_addresses_are_understood(text, expected):
    assert parse(text) == expected
    if expected:
        assert parse(str(expected)) == expected


def test_addresses_of_ones_own_endpoint_are_understood(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://models.example.org")
    assert parse("https://models.example.org/a/b:Q8_0") == Reference("a/b", type="Q8_0")


@pytest.mark.parametrize(
    ("file", "type"),
    [
        ("Qwen3-30B-UD-Q4_K_XL-00001-of-00002.gguf", "Q4_K_XL"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Qwen3.6-35B-A3B-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("llama-2-7b.Q4_K_M.gguf", "Q4_K_M"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4_K_M"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("Foo-IQ4_XS-imat.gguf", "IQ4_XS"),
        ("X.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("Q8-Chat-Q5_K_S.gguf", "Q5_K_S"),
        ("m-Q4_K_M-v2.gguf", "Q4_K_M"),
        ("Q6_K/model.gguf", "Q6_K"),
        ("model.gguf", ""),
    ],
)
def test_the_type_is_read_from_the_name(file, type):
    assert type_in(file) == type


FILES = [
    *("m-Q2_K.gguf", "m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf", "m-q8_0.gguf", "mmproj-F16.gguf", "m-mmproj-Q8_0.gguf"),
    *("m-imatrix.gguf", "imatrix_m.gguf", "mtp-m-Q8_0.gguf", "m-draft-Q2_K.gguf", "README.md", "m-Q6_K.gguf.txt"),
    *("BF16/m-BF16-00002-of-00002.gguf", "BF16/m-BF16-00001-of-00002.gguf", "Q3_K_M/m-00001-of-00003.gguf"),
]


@pytest.mark.parametrize(
    ("wanted", "usual", "files"),
    [
        ("", "Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("", "F16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
        ("", "Q5_K_M", ["m-Q4_K_M.gguf"]),
        ("", "IQ1_S", ["m-Q2_K.gguf"]),
        ("", "Q6_K", ["m-q8_0.gguf"]),
        ("q8_0", "Q4_K_M", ["m-q8_0.gguf"]),
        ("q4_k", "Q8_0", ["m-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", "Q4_K_M", ["m-UD-Q4_K_M.gguf"]),
        ("bf16", "Q4_K_M", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
    ],
)
def test_the_best_file_of_a_type_is_chosen(wanted, usual, files):
    assert list(choose("a/b", models_among(FILES), wanted, usual).files) == files


def test_a_type_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(Error, match=r"^a/b: no GGUF file of type Q5_0; there are Q2_K, Q4_K_M, Q8_0, BF16$"):
        choose("a/b", models_among(FILES), "Q5_0")
    with pytest.raises(Error, match="no GGUF file of type Q3_K_M"):  # two of its three parts are missing
        choose("a/b", models_among(FILES), "Q3_K_M")


def test_of_two_models_of_a_type_none_is_guessed():
    models = models_among(["one-Q8_0.gguf", "two-Q8_0.gguf"])
    with pytest.raises(Error, match=r"several models of type Q8_0: name one as a/b/FILE, of one-Q8_0.gguf, two-Q8_0.gguf"):
        choose("a/b", models)
    assert choose("a/b", models, "two-q8_0").files == ("two-Q8_0.gguf",)


def test_what_lies_beside_models_is_taken_where_it_is_all_there_is():
    assert [c.files for c in models_among(["m-draft-Q8_0.gguf", "mmproj-m.gguf"])] == [("m-draft-Q8_0.gguf",)]
    assert models_among(["mmproj-m.gguf", "m-imatrix.gguf"]) == []
    assert [c.files for c in models_among(["m-Q4_K_M-imatrix.gguf"])] == [("m-Q4_K_M-imatrix.gguf",)]
