"""Text that keeps to schemas, regular expressions and grammars: checked by jsonschema, re, and llama.cpp's grammars."""

import ctypes
import gc
import json
import re

import jsonschema
import numpy as np
import pydantic
import pytest

import ggpy
from ggpy.generate.constraints import CallsConstraint, Constraints, _Vocabulary
from ggpy.generate.replies import FAMILIES, ReplyParser, calls_schema
from ggpy.generate.streaming import StreamDecoder
from ggpy.generate.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer
from tests.generate.test_tokenizer import (
    LlamaCppLibrary,
    bpe_metadata,
    spm,
    spm_metadata,
    trained_bpe,
    trained_spm,
    write_vocabulary,
)
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "Größe": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 3},
        "tags": {
            "type": "array",
            "items": {"enum": ["rot", "grün", "日本語", 'a"\\b\n', None, 3]},
            "minItems": 1,
            "maxItems": 3,
        },
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "Größe", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "there": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
}
SCHEMAS = {
    "nested": PERSON,
    "any of": {
        "anyOf": [{"type": "integer", "minimum": 7, "maximum": 99}, {"type": "boolean"}, {"const": {"é": [1, None]}}]
    },
    "all of": {
        "allOf": [
            {"properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]},
            {"properties": {"b": {"enum": ["x", "y"]}, "a": {"multipleOf": 2}}, "required": ["b"]},
        ],
        "type": "object",
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "integer", "maximum": 50, "minimum": 0},
        "maxProperties": 2,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    "formats": {
        "type": "object",
        "properties": {"id": {"type": "string", "format": "uuid"}, "ip": {"type": "string", "format": "ipv4"}},
        "required": ["id", "ip"],
        "additionalProperties": False,
    },
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
}


class Place(pydantic.BaseModel):
    town: str = pydantic.Field(max_length=6)
    altitude: int = pydantic.Field(ge=0, le=9000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = converted(tmp_path_factory.mktemp("constraints"), made("qwen3"), "q8_0")
    with ggpy.load(path, n_ctx=512, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def vocabularies():
    """Constraints for each kind of tokenizer; the last with logits that no token has, and a token that nothing needs."""
    tokens, _ = trained_bpe()
    unused = bpe_metadata(token_type=[CONTROL] * 2 + [NORMAL] * (len(tokens) - 3) + [UNUSED])
    kinds = {
        "bpe": Tokenizer.from_metadata(bpe_metadata()),
        "spm": spm(),
        "padded": Tokenizer.from_metadata(unused),
    }
    padding = {"padded": 101}
    return {name: (kind, Constraints(kind, kind.n_vocab + padding.get(name, 0))) for name, kind in kinds.items()}


def followed(vocabulary, rng, most=5000, **how):
    """The ids and the text of a generation whose every token is any of those allowed; None as its end if it had none."""
    tokenizer, constraints = vocabulary
    constraint, chosen = constraints.constraint(**how), []
    logits = np.zeros(constraints._n_vocab, np.float32)
    decoder, text = StreamDecoder(tokenizer, whole=True), ""
    while len(chosen) < most:
        forced = constraint.forced()
        token = forced[0] if forced else int(rng.choice(np.flatnonzero(constraint.masked(logits) == 0)))
        chosen.append(token)
        text += decoder.push(token)
        if constraint.accept(token):
            return chosen, text + decoder.flush()
    return chosen, None


def valid(text, schema):
    checker = jsonschema.Draft202012Validator
    checker.check_schema(schema)
    checker(schema, format_checker=checker.FORMAT_CHECKER).validate(json.loads(text))
    return True


# ---- Whatever is chosen ----


@pytest.mark.parametrize("vocabulary", ["bpe", "spm", "padded"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_of_any_allowed_tokens_is_valid(vocabularies, vocabulary, name):
    rng = np.random.default_rng(0)
    texts = {followed(vocabularies[vocabulary], rng, json_schema=SCHEMAS[name])[1] for _ in range(12)}
    assert all(valid(text, SCHEMAS[name]) for text in texts)
    assert len(texts) > 5


def test_any_json_object(vocabularies):
    rng = np.random.default_rng(1)
    for how in (True, {"type": "object"}):
        texts = [followed(vocabularies["bpe"], rng, most=1500, json_schema=how)[1] for _ in range(6)]
        assert all(isinstance(json.loads(text), dict) for text in texts if text)
        assert sum(text is not None for text in texts) > 1


class Digits:
    """Logits of whoever wants to go on with digits, for ever."""

    def __init__(self, vocabulary):
        tokenizer, self._constraints = vocabulary
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self._logits = np.array([len(re.match(rb"[0-9.]*", t)[0]) for t in tokens], np.float32)
        self._decoder = StreamDecoder(tokenizer, whole=True)

    def text(self, schema):
        constraint, text = self._constraints.constraint(json_schema=schema), ""
        for _ in range(300):
            forced = constraint.forced()
            token = forced[0] if forced else int(np.argmax(constraint.masked(self._logits)))
            text += self._decoder.push(token)
            if constraint.accept(token):
                return text + self._decoder.flush()
        raise AssertionError(f"no end: {text}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number"},
        {"type": "integer"},
        {"type": "integer", "minimum": 5},
        {"type": "number", "exclusiveMinimum": 0.5, "maximum": 7.25},
        {"type": "number", "multipleOf": 0.25},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        {"properties": {"a": {"anyOf": [{"type": "number"}]}}, "required": ["a"], "additionalProperties": False},
        {"type": "string", "format": "time"},
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "string", "format": "date-time"}}},
        {"type": "array", "prefixItems": [{"type": "string", "format": "duration"}], "items": False, "minItems": 1},
    ],
)
def test_who_writes_digits_for_ever_comes_to_an_end(vocabularies, schema):
    text = Digits(vocabularies["bpe"]).text(schema)
    assert valid(text, schema)
    assert re.search("[0-9]{9}", text)
    if schema.get("type") in ("number", "integer"):
        assert max(map(len, re.findall("[0-9]+", text))) == 20


def test_digits_that_a_schema_wants_are_no_concern(vocabularies):
    for schema in (
        {"const": 10**25},
        {"enum": [10**25, f"{10**25}"]},
        {"type": "integer", "minimum": 10**17, "multipleOf": 3},
        {"type": "string", "pattern": "^[0-9]{40}$"},
        {"const": {"\\": '"', "a": [0, "1"]}},
    ):
        assert valid(Digits(vocabularies["bpe"]).text(schema), schema)


def test_schemas_may_be_texts_and_classes(vocabularies):
    for how in (Place, json.dumps(Place.model_json_schema())):
        rng = np.random.default_rng(2)
        assert Place.model_validate_json(followed(vocabularies["bpe"], rng, json_schema=how)[1])


def test_properties_come_in_the_schemas_order(vocabularies):
    names = ["z", "a", "m"]
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": names}
    text = followed(vocabularies["bpe"], np.random.default_rng(0), json_schema={**schema, "additionalProperties": False})[1]
    assert list(json.loads(text)) == names


@pytest.mark.parametrize("vocabulary", ["bpe", "spm", "padded"])
@pytest.mark.parametrize(
    "regex",
    [
        r"[0-9]{3}-[a-f]{1,4}",
        r"(Mon|Tues|Wednes)day",
        r"^a+b*$",
        " ?[ä-ü]{2,5}(日本|中国)?",
        r"(?i)yes|no",
        r"\w{1,3}\s\S",
        "€?",
    ],
)
def test_regular_expressions_match_the_whole_text(vocabularies, vocabulary, regex):
    rng = np.random.default_rng(3)
    texts = {followed(vocabularies[vocabulary], rng, regex=regex)[1] for _ in range(10)}
    assert all(re.fullmatch(regex, text) for text in texts)
    assert len(texts) > 1


ARITHMETIC = {
    "Lark": """
        start: sum
        sum: sum ("+" | "-") product | product
        product: product "*" atom | atom
        atom: NUMBER | "(" sum ")"
        NUMBER: /[1-9][0-9]{0,2}/
        """,
    "GBNF": """
        # left to right
        root    ::= sum
        sum     ::= product (("+" | "-") product){0,3}
        product ::= atom ("*" atom)?
        atom    ::= [1-9] [0-9]{0,2} | "(" sum ")"
        """,
}


@pytest.mark.parametrize("syntax", ARITHMETIC)
def test_grammars(vocabularies, syntax):
    rng = np.random.default_rng(4)
    texts = [followed(vocabularies["bpe"], rng, grammar=ARITHMETIC[syntax])[1] for _ in range(30)]
    texts = [text for text in texts if text is not None]
    assert len(texts) > 15 and len(set(texts)) > 10
    for text in texts:
        assert re.fullmatch(r"[0-9+*()-]+", text)
        assert isinstance(eval(text), int)  # Python's own parser
    assert any("(" in text for text in texts)


GBNF = {
    "greedy": 'root ::= word "s" | word ("ab" "c" | "a" "bd")\nword ::= [a-c]+',
    "recursive and greedy": """root ::= "(" root ")" | word "b"\nword ::= [ab]+ "\u00e9"?""",
    "any": 'root ::= . "\\n"? [^a-z\\x00-\\x1f] (","\n | ";")+ # a comment\n',
    "empty": 'root ::= x x "." \nx ::= | "a" | "é" x',
    "counts": r'root ::= [0-9]{2} "-"{1,} [\]\-x]{ 0 , 3 } "\U0001F600"? ("q" [-+]){2,3}',
    "japanese": "root ::= jp+ ([ \\t\\n] jp+)*\njp ::= [ぁ-ゟ] | [ァ-ヿ] | [一-鿿]",
    "json": r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
    string ":" ws value ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
""",
}


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "bpe.gguf"
    write_vocabulary(path, bpe_metadata())
    reference = LlamaCppLibrary(path)
    yield reference
    reference.close()


def allowed_by_llama_cpp(llama, sampler, n):
    data = (llama.llama_token_data * n)(*((i, 1.0, 0.0) for i in range(n)))
    array = llama.llama_token_data_array(data, n, -1, False)
    llama.llama_sampler_apply(sampler, ctypes.byref(array))
    return {array.data[i].id for i in range(array.size) if array.data[i].logit > -np.inf}


@pytest.mark.parametrize("name", GBNF)
def test_gbnf_allows_the_tokens_that_llama_cpp_allows(vocabularies, llama_cpp, name):
    tokenizer, constraints = vocabularies["bpe"]
    llama = llama_cpp.library
    # Tokens that are parts of characters, llama.cpp takes by less than all of their bits, and texts end for it at U+0000.
    whole = {i for i in range(tokenizer.n_vocab) if is_text(tokenizer.token_bytes(i)) and not tokenizer.is_hidden(i)}
    rng = np.random.default_rng(5)
    n_compared = 0
    for _ in range(4):
        sampler = llama.llama_sampler_init_grammar(llama_cpp.vocab, GBNF[name].encode(), b"root")
        constraint = constraints.constraint(grammar=GBNF[name])
        for _ in range(12):
            expected = allowed_by_llama_cpp(llama, sampler, tokenizer.n_vocab)
            forced = constraint.forced()
            if forced:
                assert forced[0] in expected
                token = forced[0]
            else:
                ours = np.flatnonzero(constraint.masked(np.zeros(tokenizer.n_vocab, np.float32)) == 0)
                assert whole & set(ours.tolist()) == whole & expected
                assert bool(tokenizer.end_tokens & expected) == bool(tokenizer.end_tokens & set(ours.tolist()))
                token = int(rng.choice(sorted(whole & expected)))
                n_compared += 1
            llama.llama_sampler_accept(sampler, token)
            if constraint.accept(token):
                assert allowed_by_llama_cpp(llama, sampler, tokenizer.n_vocab) <= tokenizer.end_tokens
                break
        llama.llama_sampler_free(sampler)
    assert n_compared > 3


def is_text(data):
    try:
        return bool(data.decode().replace("\0", ""))
    except UnicodeDecodeError:
        return False


def test_gbnf_tokens(vocabularies):
    chosen, text = followed(
        vocabularies["bpe"], np.random.default_rng(0), grammar='root ::= <[1]> "ab" <|im_end|> !<[300]>'
    )
    assert chosen[0] == 1 and text.startswith("ab") and chosen[-2] == 1 and chosen[-1] != 300


def test_a_rule_named_start_makes_no_lark(vocabularies):
    text = followed(vocabularies["bpe"], np.random.default_rng(0), grammar='root ::= start\nstart ::= "ab"')[1]
    assert text == "ab"


def test_a_grammar_may_name_control_tokens_and_an_end_token_in_the_middle(vocabularies):
    tokenizer, _ = vocabularies["bpe"]
    chosen, text = followed(vocabularies["bpe"], np.random.default_rng(0), grammar='start: "a" <|im_end|> "b"')
    assert text == "ab" and chosen[1] in tokenizer.end_tokens and chosen[-1] not in tokenizer.end_tokens


def test_forced_text_is_tokenized_as_the_model_knows_it(vocabularies):
    for tokenizer, constraints in vocabularies.values():
        text = "größer als \t日本語 1234 in the other hand"
        forced = constraints.constraint(regex=text).forced()
        canonical = tokenizer.encode_inside(text)
        assert forced[:-1] == canonical[: len(forced) - 1] and len(forced) > 3


def test_text_that_the_tokenizer_would_change_is_forced_all_the_same():
    """Qwen's tokenizer normalizes what it is given: here two characters to one."""
    tokenizer = Tokenizer.from_metadata(bpe_metadata("qwen2"))
    text = "Cafe\u0301 noir"
    assert tokenizer.decode(tokenizer.encode(text)) != text
    vocabulary = tokenizer, Constraints(tokenizer, tokenizer.n_vocab)
    assert followed(vocabulary, np.random.default_rng(0), regex=text)[1] == text


def test_a_space_in_front_is_text(vocabularies):
    """SentencePiece's tokenizers put one before a text, and take it away again."""
    assert followed(vocabularies["spm"], np.random.default_rng(0), regex=" the")[1] == " the"


def test_tokens_that_users_define_are_text():
    tokens, _ = trained_bpe()
    types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2) + [USER_DEFINED]
    tokenizer = Tokenizer.from_metadata(bpe_metadata(tokens=[*tokens, "<think>"], token_type=types))
    vocabulary = tokenizer, Constraints(tokenizer, tokenizer.n_vocab)
    chosen, text = followed(vocabulary, np.random.default_rng(0), grammar='start: "<think>" /[a-z]{2}/')
    assert chosen[0] == len(tokens) and re.fullmatch("<think>[a-z]{2}", text)


def test_without_end_tokens_what_is_whole_ends():
    tokenizer = Tokenizer.from_metadata(spm_metadata(trained_spm(), eos_token_id=3))
    tokenizer.end_tokens = frozenset()
    vocabulary = tokenizer, Constraints(tokenizer, tokenizer.n_vocab)
    chosen, text = followed(vocabulary, np.random.default_rng(0), json_schema=PERSON)
    assert valid(text, PERSON) and max(chosen) < tokenizer.n_vocab


# ---- In a model ----


def generations(model, prompts, **options):
    return sorted(model.generate_batch(prompts, **options), key=lambda g: g.index)


HOT = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 400}


def test_a_batch_gives_what_each_gives_alone(model):
    prompts = [ids(5 + i, seed=i) for i in range(6)]
    together = generations(model, prompts, json_schema=PERSON, seed=7, **HOT)
    assert all(valid(g.text, PERSON) and g.finish_reason == "stop" for g in together)
    for i in (0, 3, 5):
        alone = model.generate(prompts[i], json_schema=PERSON, seed=7 + i, **HOT).run()
        assert alone.ids == together[i].ids and alone.text == together[i].text
    assert len({g.text for g in together}) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"mirostat": 2},
        {"repetition_penalty": 2.0, "dry_multiplier": 1.0, "xtc_probability": 1.0, "typical_p": 0.5},
        {"top_n_sigma": 1.0, "dynatemp_range": 0.5},
        {"logit_bias": {i: -20.0 if i % 2 else 20.0 for i in range(512)}},
    ],
)
def test_whatever_samples_keeps_to_the_schema(model, options):
    for generation in generations(model, [ids(6), ids(7)], json_schema=PERSON, seed=3, max_tokens=400, **options):
        assert valid(generation.text, PERSON) and generation.finish_reason == "stop"


def test_the_seam_is_the_models_logits(model):
    """The likeliest of the tokens that the grammar allows, by logits that were computed without it."""
    generation = model.generate(ids(9), regex="[a-z ]{12}", temperature=0).run()
    logits = model.logits(generation.prompt_ids + generation.ids)
    constraint = model._constraints.constraint(regex="[a-z ]{12}")
    for i, token in enumerate(generation.ids):
        if not constraint.forced():
            assert token == np.argmax(constraint.masked(logits[len(generation.prompt_ids) - 1 + i]))
        constraint.accept(token)


def test_where_one_token_is_left_nobody_is_asked(model):
    class First:
        asked = 0

        def sample(self, logits, ids):
            self.asked += 1
            assert np.count_nonzero(logits > -np.inf) > 1
            return int(np.argmax(logits))

    sampler = First()
    generation = model.generate(ids(4), sampler=sampler, regex="(the|other) brother and the quick brown fox").run()
    assert re.fullmatch("(the|other) brother and the quick brown fox", generation.text)
    assert 0 < sampler.asked < len(generation.ids) - 3


def test_processors_can_not_break_the_grammar(model):
    def reversed_(ids, logits):
        return -logits

    generation = model.generate(ids(4), processors=[reversed_], regex="[0-9]{8}").run()
    assert re.fullmatch("[0-9]{8}", generation.text)


def test_a_sampler_that_breaks_the_grammar_is_told(model):
    class Stubborn:
        def sample(self, logits, ids):
            return int(np.argmin(logits))

    with pytest.raises(ggpy.Error, match=r"the sampler chose token \d+, .*, which the grammar doesn't allow there"):
        model.generate(ids(4), sampler=Stubborn(), regex="[0-9]{8}").run()


def test_ends(model):
    cut = model.generate(ids(4), json_schema=PERSON, max_tokens=5).run()
    assert cut.finish_reason == "length" and len(cut.ids) == 5
    stopped = model.generate(ids(4), regex="ab[0-9]{4}zz[0-9]{4}", stop="zz").run()
    assert stopped.finish_reason == "stop" and re.fullmatch("ab[0-9]{4}", stopped.text)
    whole = model.generate(ids(4), regex="ab[0-9]{4}").run()
    assert whole.finish_reason == "stop" and whole.pieces[-1] and whole.ids[-1] not in model.tokenizer.end_tokens
    empty = model.generate(ids(4), regex="").run()
    assert empty.finish_reason == "stop" and empty.text == "" and empty.ids[0] in model.tokenizer.end_tokens
    cancelled = model.generate(ids(4), regex="a*", logit_bias=dict.fromkeys(model.tokenizer.end_tokens, -np.inf))
    next(cancelled)
    cancelled.cancel()
    assert cancelled.finish_reason == "cancelled" and not list(cancelled)


def test_a_vocabulary_goes_with_its_model():
    def alive():
        gc.collect()
        return sum(type(thing) is _Vocabulary for thing in gc.get_objects())

    before, made = alive(), Constraints(Tokenizer.from_metadata(bpe_metadata()), 512)
    assert alive() == before + 1
    constraint = made.constraint(json_schema={"const": "a b"})
    del made
    assert constraint.forced()
    del constraint
    assert alive() == before


def test_a_generation_that_has_ended_holds_no_grammar(model):
    done = [model.generate(ids(4), regex="[a-z]{50}", max_tokens=n).run() for n in (2, 60)]
    assert [g.finish_reason for g in done] == ["length", "stop"]
    assert all(g._request.constraint is None for g in done)


def test_constraints_beside_each_other_and_beside_none(model):
    how = [{"regex": "[0-9]{9}"}, {}, {"json_schema": PERSON}, {"grammar": ARITHMETIC["Lark"]}]
    alone = [model.generate(ids(8), seed=1, max_tokens=60, **h).run().text for h in how]
    together = [model.generate(ids(8), seed=1, max_tokens=60, **h) for h in how]
    assert [g.run().text for g in together] == alone


def test_who_makes_room_for_others_goes_on_where_it_was(model):
    """Pages for 448 tokens: of four generations, some are sent away and evaluated again."""
    alone = [g.text for g in generations(model, [ids(40, seed=i) for i in range(4)], regex="[a-z]{300}", seed=5)]
    few = model.kv_bytes // 512 * 7
    with ggpy.load(model.file.path, n_ctx=320, n_threads=1, kv_memory=few) as small:
        together = generations(small, [ids(40, seed=i) for i in range(4)], regex="[a-z]{300}", seed=5)
    assert [g.text for g in together] == alone
    assert all(re.fullmatch("[a-z]{300}", text) for text in alone)


def test_hooked_runs_keep_to_the_grammar(model):
    with model.hooked({"blk.1.out": lambda name, value: -value}):
        text = model.generate(ids(8), seed=1, regex="[a-d]{20}").run().text
    assert re.fullmatch("[a-d]{20}", text)
    assert text != model.generate(ids(8), seed=1, regex="[a-d]{20}").run().text


def test_a_chat_keeps_to_the_schema(model):
    reply = model.chat([{"role": "user", "content": "the hand"}], json_schema=Place, seed=2, **HOT)
    assert Place.model_validate_json(reply.run().text)


# ---- What isn't understood ----


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"json_schema": "{"}, "json_schema: '{' is not JSON: .* line 1 column 2"),
        ({"json_schema": "[1]"}, r"json_schema: a schema is an object, not \[1\]"),
        ({"json_schema": False}, "json_schema: a schema is an object, not False"),
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema: .*uniqueItems"),
        ({"json_schema": {"not": {"type": "null"}}}, "json_schema: .*not"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, r"json_schema: Pointer '/\$defs/none' does not exist"),
        ({"json_schema": {"$ref": "http://example.org/schema"}}, "json_schema: .*example.org"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: no token"),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "json_schema: Unsatisfiable schema"),
        ({"json_schema": {"type": "string", "pattern": "(a"}}, "json_schema: .*unclosed group"),
        ({"json_schema": {"type": "string", "format": "poem"}}, "json_schema: Unknown format: poem"),
        ({"json_schema": {"const": {1, 2}}}, "json_schema: .*set is not JSON serializable"),
        ({"json_schema": {"const": float("nan")}}, "json_schema: "),
        ({"json_schema": {"const": "\ud800"}}, "json_schema: .*hex escape"),
        ({"json_schema": '{"items":' * 100_000 + "{}" + "}" * 100_000}, "json_schema: .*recursion"),
        ({"json_schema": {"const": 2**53 + 1}}, "json_schema: 'const' has a number .* 9007199254740993: make it a text"),
        ({"json_schema": {"anyOf": [{"enum": [{"a": [1.2345678901234567]}]}]}}, "json_schema: 'enum' has a number"),
        ({"json_schema": {"type": "integer", "minimum": 2**63}}, "json_schema: 'minimum' has too many digits"),
        ({"regex": "(a"}, r'regex: invalid regex "\(a" .*unclosed group'),
        ({"regex": "a(?=b)"}, "regex: .*look-around"),
        ({"regex": r"(a)\1"}, "regex: .*backreferences are not supported"),
        ({"regex": "a$b"}, "regex: "),
        ({"regex": "\ud800"}, "regex: .*surrogates"),
        ({"regex": b"a"}, "regex: a regular expression is a text, not bytes"),
        ({"regex": "(" * 10_000 + ")" * 10_000}, "regex: "),
        ({"grammar": "start: a\nb: foo"}, 'grammar: line 1, column 8: unknown name: "a"'),
        ({"grammar": 'start: "a'}, "grammar: line 1, column 10: "),
        ({"grammar": "start: start"}, "grammar: no token"),
        ({"grammar": "start: <|nothing|>"}, "grammar: line 1, column 8: unknown special token"),
        ({"grammar": 'root = "a"'}, "grammar: no rule 'start: …', as Lark has, and no 'root ::= …', as GBNF has"),
        ({"grammar": 'root ::= "a" b'}, "grammar: line 1, column 14: there is no rule 'b'"),
        ({"grammar": 'rute ::= "a"'}, "grammar: there is no rule 'root'"),
        ({"grammar": 'root ::= "a"\nb "c"\nd ::='}, "grammar: line 2, column 3: expected ::="),
        ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "grammar: line 2, column 1: the rule 'root' has a definition already"),
        ({"grammar": 'root ::= "a'}, "grammar: line 1, column 12: expected a character"),
        ({"grammar": r'root ::= "\q"'}, "grammar: line 1, column 11: expected a character or an escape"),
        ({"grammar": 'root ::= ("a"'}, r"grammar: line 1, column 14: expected \)"),
        ({"grammar": 'root ::= "a" }'}, "grammar: line 1, column 14: expected the end of the line"),
        ({"grammar": "root ::= [z-a]"}, "grammar: line 1, column 10: 'z' comes after 'a'"),
        ({"grammar": "root ::= []"}, "grammar: line 1, column 10: a class without characters"),
        ({"grammar": r"root ::= [\ud800]"}, r"grammar: line 1, column 11: \\ud800 is no character"),
        ({"grammar": "root ::= <nothing>"}, "grammar: unknown special token"),
        ({"grammar": 'root ::= root "a"'}, "grammar: no token"),
        ({"grammar": "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000}, "grammar: nested too deeply"),
        ({"grammar": "# " + "x" * 1_000_000}, "grammar: longer than 1000000 characters"),
        ({"json_schema": {"const": "x" * 1_000_000}}, "json_schema: longer than 1000000 characters"),
        ({"grammar": 3}, "grammar: a grammar is a text, not int"),
        ({"regex": "a", "json_schema": True}, "give one of json_schema, regex and grammar, not json_schema and regex"),
    ],
)
def test_what_is_not_understood_is_said_at_once_in_a_line(model, how, words):
    with pytest.raises(ggpy.Error, match=words) as caught:
        model.generate(ids(4), **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("least", "most"), [(-(2**63), 2**63 - 1), (0, 2**64 - 1), (-(10**30), 2**53 + 3), (2**53 + 1, 10**30)]
)
def test_bounds_of_other_languages_integers_are_kept_to(model, least, most):
    schema = {"type": "integer", "minimum": least, "maximum": most}
    for seed in range(3):
        text = model.generate(ids(4), json_schema=schema, temperature=1, seed=seed, max_tokens=60).run().text
        assert least <= json.loads(text) <= most


def test_chains_of_rules_overflow_no_stack(model):
    n = 5000
    rules = [f"r{i}: r{i + 1}" for i in range(n)]
    assert model.generate(ids(4), grammar="\n".join(["start: r0", *rules, f'r{n}: "ab"'])).run().text == "ab"
    defs = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(n)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "null"}}}
    assert model.generate(ids(4), json_schema=schema, max_tokens=4).run().finish_reason in ("length", "stop")


def test_a_grammar_too_complex_to_follow_is_an_error(model):
    rules = [f'r{i}: "a" "{i}"' for i in range(2200)]
    grammar = "\n".join(['start: "b" ' + "(" + " | ".join(f"r{i}" for i in range(2200)) + ")", *rules])
    with pytest.raises(ggpy.Error, match=r"the grammar can't be followed further: .*Current row has \d+ items") as caught:
        model.generate(ids(4), grammar=grammar).run()
    assert "\n" not in str(caught.value)


# ---- Calls in free replies ----

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"at": {"$ref": f"#/{defined}/place"}, "how": {"enum": ["fast", "slow"]}},
                "required": ["at"],
                "additionalProperties": False,
                defined: {"place": place},
            },
        },
    }
    for name, defined, place in (("go", "$defs", POINT), ("look", "definitions", {"enum": ["north", "south"]}))
]


def deep(n):
    """A schema in a schema, and so on."""
    schema = {"type": "null"}
    for _ in range(n):
        schema = {"items": schema}
    return schema


def replied(vocabulary, begins, rng, tools=TOOLS):
    """The text of a reply that begins so and goes on, while it is bound, with any of the tokens that may come; and what it
    says when the mark of a call's end follows."""
    tokenizer, constraints = vocabulary
    ends = tokenizer.end_tokens
    decoders = [StreamDecoder(tokenizer, whole=True) for _ in range(2)]
    parsers = [ReplyParser(FAMILIES["hermes"], tools) for _ in range(2)]
    constraint = CallsConstraint(parsers[0], decoders[0], ends, lambda begun: constraints.call(calls_schema(tools), begun))
    logits = np.zeros(constraints._n_vocab, np.float32)
    text, todo = "", tokenizer.encode_inside(begins)
    for _ in range(1000):
        forced = constraint.forced()
        masked = logits if forced else constraint.masked(logits)
        if not todo and not forced and masked is logits:
            break
        token = todo.pop(0) if todo else forced[0] if forced else int(rng.choice(np.flatnonzero(masked == 0)))
        text += decoders[1].push(token)
        assert not constraint.accept(token)
    assert constraint.accept(min(ends))
    events = [*parsers[1].push(text), *parsers[1].push("\n</tool_call>"), *parsers[1].flush()]
    return text, events


@pytest.mark.parametrize("vocabulary", ["bpe", "spm", "padded"])
@pytest.mark.parametrize("begins", ["<tool_call>", "Well.\n<tool_call>\n", "<think>\nHm.</think>\n<tool_call>"])
def test_a_call_that_has_begun_keeps_to_the_schemas(vocabularies, vocabulary, begins):
    rng, names = np.random.default_rng(5), set()
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for _ in range(12):
        text, events = replied(vocabularies[vocabulary], begins, rng)
        (call,) = (event for event in events if event.kind == "call")
        assert text.startswith(begins) and valid(call.text, parameters[call.name])
        names.add(call.name)
    assert names == set(parameters)


@pytest.mark.parametrize(
    ("begins", "tools"),
    [
        ("No call.", TOOLS),
        ("<think>\nI might write <tool_call>\n", TOOLS),
        ("<tool_call>", [{"name": "f", "parameters": {"properties": {"a": {"format": "poem"}}}}]),
        ("<tool_call>", [{"name": "f", "parameters": {"enum": ["x" * 1_000_000]}}]),
        ("<tool_call>", [{"name": "f", "parameters": deep(400)}]),
        ("<tool_call>", [{"name": "f", "parameters": deep(40_000)}]),
    ],
    ids=["none", "thought", "format", "long", "deep", "deepest"],
)
def test_what_cannot_be_bound_stays_free(vocabularies, begins, tools):
    text, events = replied(vocabularies["bpe"], begins, np.random.default_rng(0), tools)
    assert text == begins and "call" not in {event.kind for event in events}


def test_a_call_is_bound_from_what_stands_there(vocabularies):
    _, constraints = vocabularies["bpe"]
    constraints.call(calls_schema(TOOLS), '\n{"name": "go", "arg')
    for begun in ("fly", '{"name": "fly"', '{"name": "go"}'):
        with pytest.raises(ggpy.Error, match="is no beginning"):
            constraints.call(calls_schema(TOOLS), begun)
