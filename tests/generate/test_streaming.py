"""What arrives in pieces equals what arrives at once."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import Error, TokenizerError
from ggpy.generate.streaming import StopMatcher, StreamDecoder

from .test_tokenizer import smollm2, spm


def stream(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return [*map(decoder.push, ids), decoder.flush()]


@given(st.lists(st.integers(0, 49151)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_decoded_text(ids, special):
    assert "".join(stream(smollm2(), ids, special=special)) == smollm2().decode(ids, special)


@given(st.lists(st.integers(0, 1499)), st.lists(st.integers(260, 1499)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_continue_a_prompt(ids, prompt, special):
    tokenizer = spm()
    # Whole characters only in the prompt: its last one may not be ended by what follows.
    whole = tokenizer.decode(prompt, special)
    assert whole + "".join(stream(tokenizer, ids, prompt=prompt, special=special)) == tokenizer.decode(
        [*prompt, *ids], special
    )


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_pieces_are_whole_characters(text):
    for tokenizer in (smollm2(), spm()):
        ids = tokenizer.encode(text, special=False)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in tokenizer.decode(ids):
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_with_its_last():
    ids = spm().encode("\U0001f9ff", bos=False)
    assert stream(spm(), ids) == ["", "", "", "", "\U0001f9ff", ""]
    assert stream(spm(), ids[:-1]) == ["", "", "", "", "\ufffd"]


def test_the_space_in_front_is_dropped_only_at_the_start():
    tokenizer = spm()
    ids = tokenizer.encode("the", bos=False)
    assert "".join(stream(tokenizer, ids)) == "the"
    assert "".join(stream(tokenizer, ids, prompt=[tokenizer.bos])) == "the"
    assert "".join(stream(tokenizer, ids, prompt=tokenizer.encode("a"))) == " the"


def test_control_tokens_are_silent_unless_asked_for():
    assert stream(smollm2(), [1, 2]) == ["", "", ""]
    assert stream(smollm2(), [1], special=True) == ["<|im_start|>", ""]


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        StreamDecoder(smollm2()).push(49152)


def stopped_text(stops, pieces):
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        out.append(emit)
        if stopped:
            break
    out.append(matcher.flush())
    return "".join(out), matcher.stopped


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_complete_stop_however_it_is_cut(text, stops, cuts):
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        expected = min((text[: ends[0]].removesuffix(stop) for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert stopped_text(stops, pieces) == (expected, bool(ends))


def test_only_what_may_be_a_stop_is_held_back():
    matcher = StopMatcher(["</s>", "\n\n"])
    assert matcher.push("one <") == ("one ", False)
    assert matcher.push("b>\n") == ("<b>", False)
    assert matcher.push("x</") == ("\nx", False)
    assert matcher.push("s> gone") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_no_stops_hold_nothing_back():
    assert StopMatcher([]).push("abc") == ("abc", False)


def test_one_string_is_one_stop():
    assert stopped_text("ab", ["xa", "by"]) == ("x", True)


def test_empty_stops_are_refused():
    with pytest.raises(Error, match="must not be empty"):
        StopMatcher(["a", ""])
