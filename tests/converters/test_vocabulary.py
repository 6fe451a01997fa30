"""Tokenizers as metadata, against sentencepiece and tokenizers."""

import json
import shutil

import gguf
import pytest
import sentencepiece
import transformers
from gguf import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from converters import convert
from converters.checkpoint import Checkpoint
from converters.vocabulary import CHECK_TEXTS, Encoder, check_vocabulary, read_encoder, read_sentencepiece, write_vocabulary
from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.generate.pretokenizers import PRETOKENIZERS, ROWS
from ggpy.generate.tokenizer import Tokenizer as WrittenTokenizer
from tests.models.test_encoder import checkpoint as encoder

from .conftest import CHAT_TEMPLATE, SPLITTINGS, TRAINING_TEXT, train_tokenizer

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def metadata_of(folder):
    writer = gguf.GGUFWriter(None, "llama")
    checkpoint = Checkpoint(folder)
    write_vocabulary(writer, checkpoint)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def edit_json(path, **changes):
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not None}))


def train_sentencepiece(folder, **options):
    """A tokenizer.model in the folder; returns its path."""
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_prefix=str(folder / "tokenizer"),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("spm"), user_defined_symbols=["<tool>", "▁two▁words"])


@pytest.fixture
def sentencepiece_folder(damaged_folder, sentencepiece_model):
    """A checkpoint whose tokenizer is a tokenizer.model alone."""
    (damaged_folder / "tokenizer.json").unlink()
    (damaged_folder / "tokenizer_config.json").unlink()
    shutil.copy(sentencepiece_model, damaged_folder)
    return damaged_folder


def test_pieces_of_a_tokenizer_model_are_sentencepieces_own(sentencepiece_model):
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    pieces, adds_prefix = read_sentencepiece(sentencepiece_model)
    assert adds_prefix
    assert len(pieces) == own.vocab_size()
    for i, piece in enumerate(pieces):
        if piece.type == TokenType.USER_DEFINED:
            assert piece.text.replace(" ", "▁") == own.id_to_piece(i)
        else:
            assert piece.text == own.id_to_piece(i)
        assert piece.score == own.get_score(i)
        assert (piece.type == TokenType.CONTROL) == own.is_control(i)
        assert (piece.type == TokenType.UNKNOWN) == own.is_unknown(i)
        assert (piece.type == TokenType.BYTE) == own.is_byte(i)
        assert (piece.type == TokenType.UNUSED) == own.is_unused(i)
    assert {piece.text for piece in pieces if piece.type == TokenType.USER_DEFINED} == {"<tool>", " two words"}


def test_dummy_prefix_of_a_tokenizer_model_is_read(tmp_path):
    assert read_sentencepiece(train_sentencepiece(tmp_path, add_dummy_prefix=False))[1] is False


def test_unigram_model_is_refused(tmp_path):
    path = train_sentencepiece(tmp_path, model_type="unigram", vocab_size=330)
    with pytest.raises(UnsupportedError, match=r"tokenizer\.model: .* type 1; known: 2 \(BPE\)"):
        read_sentencepiece(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), keep=st.integers(0, 3000))
def test_damaged_tokenizer_model_is_read_or_refused(data, keep, sentencepiece_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model.read_bytes()[:keep] + data)
    try:
        assert read_sentencepiece(path)[0]
    except Error as error:
        assert "tokenizer.model" in str(error)


def test_a_number_without_end_is_refused_at_once(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x80" * 10_000_000)
    with pytest.raises(ConversionError, match="a number without end at byte 11"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_what_sentencepiece_cant_even_say_is_refused(sentencepiece_folder):
    """Its message quotes the piece that is there twice."""
    path = sentencepiece_folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + 2 * b"\x0a\x03\x0a\x01\xff")
    with pytest.raises(ConversionError, match=r"tokenizer\.model: not a tokenizer: 'utf-8' codec"):
        read_encoder(Checkpoint(sentencepiece_folder))


def test_tokenizer_model_as_gguf_gives_sentencepieces_tokens(sentencepiece_folder, tmp_path):
    plan = convert(sentencepiece_folder, tmp_path / "model.gguf", "f32", dry_run=True)
    assert plan.metadata["tokenizer.ggml.model"] == "llama"
    assert plan.metadata["tokenizer.ggml.pre"] == "default"
    written = WrittenTokenizer.from_metadata(plan.metadata)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in CHECK_TEXTS:
        assert written.encode(text, bos=False) == own.encode(text)


def test_files_beside_a_tokenizer_model_add_tokens_and_types(sentencepiece_folder):
    edit_json(sentencepiece_folder / "added_tokens.json", **{"<extra>": 505})
    decoder = {"1": {"content": "<s>", "special": True}, "506": {"content": "a▁b"}, "507": {"content": "<|turn|>"}}
    edit_json(sentencepiece_folder / "tokenizer_config.json", added_tokens_decoder=decoder, chat_template="{{ x }}")
    metadata = metadata_of(sentencepiece_folder)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (tokens[505], types[505]) == ("<extra>", TokenType.USER_DEFINED)
    assert (tokens[506], types[506]) == ("a b", TokenType.USER_DEFINED)
    assert (tokens[507], types[507]) == ("<|turn|>", TokenType.CONTROL)
    assert (tokens[511], types[511]) == ("[PAD511]", TokenType.UNUSED)
    assert (tokens[1], types[1]) == ("<s>", TokenType.CONTROL)
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


def test_piecewise_tokenizer_json_gets_scores_that_merge_alike(damaged_folder):
    """A BPE of characters with byte fallback, as Llama 2's: GGUF has scores where it has merges."""
    trained = train_tokenizer("gpt-2")
    model = json.loads(trained.to_str())["model"]

    def respelled(text):
        return text.replace("Ġ", "▁")

    merges = [tuple(respelled(part) for part in merge) for merge in model["merges"]]
    merges = [merge for merge in merges if all(part.isalpha() or part.startswith("▁") for part in merge)]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += sorted({part for merge in merges for part in (*merge[0], *merge[1])}) + ["".join(merge) for merge in merges]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(damaged_folder / "tokenizer.json"))

    metadata = metadata_of(damaged_folder)
    assert len(merges) > 50 and metadata["tokenizer.ggml.model"] == "llama"
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    check_vocabulary(metadata, read_encoder(Checkpoint(damaged_folder)))
    assert "tokenizer.ggml.add_space_prefix" not in metadata

    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    metadata = metadata_of(damaged_folder)
    check_vocabulary(metadata, read_encoder(Checkpoint(damaged_folder)))
    assert metadata["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_splitting_is_recognised(pre, damaged_folder):
    train_tokenizer(pre).save(str(damaged_folder / "tokenizer.json"))
    metadata = metadata_of(damaged_folder)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.add_bos_token"] is (pre == "llama-bpe")
    check_vocabulary(metadata, read_encoder(Checkpoint(damaged_folder)))


def test_all_tokens_that_end_glms_turns_are_written(damaged_folder):
    tokenizer = train_tokenizer("glm4")
    tokenizer.add_special_tokens(["[gMASK]", "<|user|>", "<|observation|>"])
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    edit_json(damaged_folder / "tokenizer_config.json", eos_token="<|endoftext|>", bos_token=None)
    edit_json(damaged_folder / "generation_config.json", eos_token_id=ids)
    metadata = metadata_of(damaged_folder)
    assert [metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")] == ids


def test_unknown_splitting_is_refused_with_those_known(damaged_folder):
    tokenizer = train_tokenizer("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("-", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json: splits text by .*Split.*gpt-2, .*smollm, .*llama-bpe"):
        metadata_of(damaged_folder)


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
HARMFUL = {
    "a panic of Rust": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": 1}, "not a tokenizer: Precompiled"),
    "a regular expression that tries for ever": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": r"(\w+\s*)+$x"}, "behavior": "Isolated", "invert": False},
        "not a tokenizer: Onig",
    ),
    "a bomb of texts": (
        "normalizer",
        {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 100)] * 6},
        "make texts too long",
    ),
    "a bomb of insertions": (
        "normalizer",
        {"type": "Sequence", "normalizers": [replace({"Regex": ""}, "a")] * 20},
        "make texts too long",
    ),
    "a bomb of bytes": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 40}, "make texts too long"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_a_tokenizer_takes_is_bounded(name, damaged_folder):
    (key, value, message), metadata = HARMFUL[name], metadata_of(damaged_folder)
    edit_json(damaged_folder / "tokenizer.json", **{key: value})
    with pytest.raises(ConversionError, match=rf"tokenizer\.json: .*{message}"):
        metadata_of(damaged_folder)
    with pytest.raises(ConversionError, match=r"tokenizer\.json: "):
        check_vocabulary(metadata, read_encoder(Checkpoint(damaged_folder)))


@pytest.mark.parametrize("model", [models.WordLevel(unk_token="?"), models.BPE()])
def test_other_kinds_of_tokenizer_are_refused(model, damaged_folder):
    Tokenizer(model).save(str(damaged_folder / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json: .*known: BPE"):
        metadata_of(damaged_folder)


@pytest.mark.parametrize("model", [models.WordPiece(unk_token="?"), models.Unigram()])
def test_encoders_tokenizers_that_lack_something_are_refused(model, damaged_folder):
    Tokenizer(model).save(str(damaged_folder / "tokenizer.json"))
    with pytest.raises(
        (ConversionError, UnsupportedError), match=r"tokenizer\.json: (its tokens can't be read|post_processor)"
    ):
        metadata_of(damaged_folder)


def test_tokens_merges_and_types_are_the_tokenizers(damaged_folder):
    tokenizer = train_tokenizer("smollm")
    tokenizer.add_tokens([AddedToken("a▁b"), "<|new|>"])
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    metadata = metadata_of(damaged_folder)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    n = tokenizer.get_vocab_size()
    assert tokens[: n - 2] == [tokenizer.id_to_token(i) for i in range(n - 2)]
    assert tokens[n - 2 :] == ["a▁b", "<|new|>"] + [f"[PAD{i}]" for i in range(n, 512)]
    assert types == [3] * 3 + [1] * (n - 5) + [4, 3] + [5] * (512 - n)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_more_tokens_than_the_model_has_rows_are_refused(damaged_folder):
    edit_json(damaged_folder / "config.json", vocab_size=300)
    with pytest.raises(ConversionError, match=r"token '.+' has id 381, config\.json's vocab_size is 300"):
        metadata_of(damaged_folder)


def test_tokenizer_that_would_change_is_refused_with_the_first_difference(damaged_folder, monkeypatch, tmp_path):
    """The metadata says GPT-2's splitting, the checkpoint takes digits one by one."""
    path = damaged_folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["22"] = 492
    values["model"]["merges"].append(["2", "2"])
    path.write_text(json.dumps(values))
    monkeypatch.setattr("converters.vocabulary._pre", lambda checkpoint, tokenizer: "gpt-2")
    with pytest.raises(ConversionError, match=r"tokenizer\.json: .* for '1 22 333.*', '22' .* instead of '2' '2' .* at 2"):
        convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_all_end_tokens_of_generation_config_reach_the_file(damaged_folder):
    edit_json(damaged_folder / "generation_config.json", eos_token_id=[1, 0, 2])
    metadata = metadata_of(damaged_folder)
    assert metadata["tokenizer.ggml.eos_token_id"] == 2  # tokenizer_config.json's
    assert {1, 0, 2} <= WrittenTokenizer.from_metadata(metadata).end_tokens


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "jinja alone"])
def test_chat_template_is_found(where, damaged_folder):
    edit_json(damaged_folder / "tokenizer_config.json", chat_template=None)
    match where:
        case "tokenizer_config.json":
            edit_json(damaged_folder / where, chat_template=CHAT_TEMPLATE)
        case "chat_template.jinja":
            (damaged_folder / where).write_text(CHAT_TEMPLATE)
        case "chat_template.json":
            edit_json(damaged_folder / where, chat_template=CHAT_TEMPLATE)
        case _:
            (damaged_folder / "tokenizer_config.json").unlink()
            (damaged_folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert metadata_of(damaged_folder)["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("generation_config.json", "no json"),
        ("added_tokens.json", '{"<a>": "one"}'),
    ],
)
def test_broken_files_beside_the_tokenizer_are_refused_in_one_line(file, content, sentencepiece_folder):
    (sentencepiece_folder / file).write_text(content)
    with pytest.raises(ConversionError) as caught:
        metadata_of(sentencepiece_folder)
    assert "\n" not in str(caught.value)


# Tokenizers as people have them.


def sentencepiece_as_json(folder, **changes):
    """The folder's tokenizer.model as transformers 5 saves it: a tokenizer.json beside it, with added tokens."""
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [own.id_to_piece(i) for i in range(own.vocab_size())]
    plain = {piece for i, piece in enumerate(pieces) if not (own.is_control(i) or own.is_unknown(i) or own.is_byte(i))}
    ranked = sorted(plain, key=lambda piece: -own.get_score(pieces.index(piece)))
    merges = [(p[:i], p[i:]) for p in ranked for i in range(1, len(p)) if p[:i] in plain and p[i:] in plain]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken("<|turn|>", normalized=False, **changes)])
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture
def both_folder(damaged_folder, tmp_path):
    """A checkpoint with a tokenizer.model, and the same with added tokens in tokenizer.json alone."""
    (damaged_folder / "tokenizer_config.json").unlink()
    shutil.copy(train_sentencepiece(tmp_path), damaged_folder)
    return damaged_folder


def test_added_tokens_of_tokenizer_json_are_taken_beside_a_tokenizer_model(both_folder, tmp_path):
    tokenizer = sentencepiece_as_json(both_folder)
    plan = convert(both_folder, tmp_path / "model.gguf", "f32", dry_run=True)
    tokens, types = (plan.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    turn, extra = tokenizer.token_to_id("<|turn|>"), tokenizer.token_to_id("<extra>")
    assert (tokens[turn], types[turn]) == ("<|turn|>", TokenType.CONTROL)
    assert (tokens[extra], types[extra]) == ("<extra>", TokenType.USER_DEFINED)
    assert (types[0], types[1]) == (TokenType.UNKNOWN, TokenType.CONTROL)
    own = sentencepiece.SentencePieceProcessor(model_file=str(both_folder / "tokenizer.model"))
    assert plan.metadata["tokenizer.ggml.scores"][400 - 10] == own.get_score(400 - 10)
    written = WrittenTokenizer.from_metadata(plan.metadata)
    text = "<|turn|>the other brother<extra>stands<|turn|>"
    assert written.encode(text, bos=False) == tokenizer.encode(text, add_special_tokens=False).ids
    assert plan.notes == ()


@pytest.mark.parametrize("kind", ["tiktoken", "another vocabulary"])
def test_tokenizer_json_decides_where_tokenizer_model_is_another(kind, damaged_folder, tmp_path):
    before = metadata_of(damaged_folder)
    if kind == "tiktoken":
        (damaged_folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    else:
        shutil.copy(train_sentencepiece(tmp_path), damaged_folder)
    plan = convert(damaged_folder, tmp_path / "model.gguf", "f32", dry_run=True)
    assert {key: plan.metadata[key] for key in before} == before
    assert any("tokenizer.json is taken" in note for note in plan.notes)


FLAGS = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(kind, flags) for kind in ("bytes", "pieces") for flags in FLAGS] + [("pieces, a space in front", {})],
)
def test_what_gguf_cannot_say_of_added_tokens_is_said(flags, kind, both_folder, tmp_path):
    if kind != "bytes":
        tokenizer = sentencepiece_as_json(both_folder, **flags)
        if "space" in kind:  # of the text alone, not of what comes after an added token
            tokenizer.normalizer = normalizers.Sequence([])
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            tokenizer.save(str(both_folder / "tokenizer.json"))
    else:
        (both_folder / "tokenizer.model").unlink()
        tokenizer = train_tokenizer("qwen2")
        tokenizer.add_tokens([AddedToken("<new>", **flags)])
        tokenizer.save(str(both_folder / "tokenizer.json"))
    (note,) = convert(both_folder, tmp_path / "model.gguf", "f32", dry_run=True).notes
    assert "around added tokens" in note and any(name in note for name in ("<new>", "<|turn|>", "<unk>"))


def test_added_tokens_of_a_byte_tokenizer_keep_their_characters(damaged_folder, tmp_path):
    tokenizer = train_tokenizer("qwen2")
    tokenizer.add_tokens([AddedToken("a▁b", normalized=False)])
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    plan = convert(damaged_folder, tmp_path / "model.gguf", "f32", dry_run=True)
    written = WrittenTokenizer.from_metadata(plan.metadata)
    for text in ("xa▁by", "xa by"):
        assert written.encode(text, bos=False) == tokenizer.encode(text, add_special_tokens=False).ids


def test_an_added_token_that_would_not_be_found_is_refused(damaged_folder, monkeypatch):
    metadata = metadata_of(damaged_folder)
    metadata["tokenizer.ggml.token_type"][1] = TokenType.NORMAL  # <|im_start|>
    with pytest.raises(ConversionError, match=r"for 'x<\|im_start\|>y'"):
        check_vocabulary(metadata, read_encoder(Checkpoint(damaged_folder)))


def test_the_templates_file_counts_before_an_older_one(damaged_folder):
    """As for transformers."""
    (damaged_folder / "chat_template.jinja").write_text("new")
    edit_json(damaged_folder / "tokenizer_config.json", unk_token=None)
    assert metadata_of(damaged_folder)["tokenizer.chat_template"] == "new"
    assert transformers.AutoTokenizer.from_pretrained(damaged_folder).chat_template == "new"


@pytest.mark.parametrize("form", ["list", "folder"])
def test_templates_with_names_keep_them(form, damaged_folder):
    if form == "list":
        named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
        edit_json(damaged_folder / "tokenizer_config.json", chat_template=named)
    else:
        (damaged_folder / "chat_template.jinja").write_text("{{ 1 }}")
        (damaged_folder / "additional_chat_templates").mkdir()
        (damaged_folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 2 }}")
    metadata = metadata_of(damaged_folder)
    assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ 2 }}"


@pytest.mark.parametrize("template", [7, [7], [{"name": "x"}], {"default": 1}, "\ud800"])
def test_other_forms_of_templates_are_left_aside(template, damaged_folder):
    path = damaged_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    checkpoint = Checkpoint(damaged_folder)
    writer = gguf.GGUFWriter(None, "llama")
    write_vocabulary(writer, checkpoint)
    assert "tokenizer.chat_template" not in writer.kv_data[0]
    assert any("chat template is left aside" in note for note in checkpoint.notes)


def test_all_end_tokens_of_config_json_count_without_a_generation_config(damaged_folder):
    (damaged_folder / "generation_config.json").unlink(missing_ok=True)
    edit_json(damaged_folder / "tokenizer_config.json", eos_token=None)
    edit_json(damaged_folder / "config.json", eos_token_id=[2, 1])
    metadata = metadata_of(damaged_folder)
    assert {1, 2} <= WrittenTokenizer.from_metadata(metadata).end_tokens


@pytest.mark.parametrize("value", [-1, 2**32 - 1, 512, True, "x", [1]])
def test_special_ids_out_of_the_vocabulary_count_as_none(value, damaged_folder):
    kinds = ("bos", "eos", "unk", "pad", "sep", "mask")
    edit_json(damaged_folder / "tokenizer_config.json", **{f"{kind}_token": None for kind in kinds})
    ends = [value, 2] if isinstance(value, int) else 2
    for file in ("config.json", "generation_config.json"):
        edit_json(damaged_folder / file, **{f"{kind}_token_id": value for kind in kinds} | {"eos_token_id": ends})
    metadata = metadata_of(damaged_folder)
    assert {key: id for key, id in metadata.items() if key.endswith("_token_id")} == {"tokenizer.ggml.eos_token_id": 2}


@pytest.mark.parametrize("names", [names for names, row in ROWS.items() if row.byte_level])
def test_every_known_splitting_is_found_by_trying(names, damaged_folder):
    """Rows that cut alike share the first one's name, which gives the same tokens."""
    row = ROWS[names]
    tokenizer = Tokenizer(models.BPE(ignore_merges=row.ignore_merges))
    tokenizer.normalizer = row.normalizer() or normalizers.Sequence([])
    tokenizer.pre_tokenizer, tokenizer.decoder = row.splitter(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    found = PRETOKENIZERS[metadata_of(damaged_folder)["tokenizer.ggml.pre"]]
    assert (found.ignore_merges, found.nfc) == (row.ignore_merges, row.nfc)
    for text in (*CHECK_TEXTS, *TRAINING_TEXT):
        assert found.splitter().pre_tokenize_str(text) == row.splitter().pre_tokenize_str(text)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix", "dropout"])
def test_byte_pairs_of_another_spelling_are_refused(key, damaged_folder, tmp_path):
    path = damaged_folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"][key] = 0.1 if key == "dropout" else "##"
    path.write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match=f"its {key} .* has no place in GGUF"):
        convert(damaged_folder, tmp_path / "model.gguf", "f32", dry_run=True)


def test_scores_that_gguf_cannot_hold_are_refused(tmp_path):
    encoder(tmp_path, "xlm-roberta")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    model["vocab"][50][1] = -1e300
    edit_json(tmp_path / "tokenizer.json", model=model)
    with pytest.raises(Error, match=r"out\.gguf: .*a value that GGUF can't hold"):
        convert(tmp_path, tmp_path / "out.gguf", "f32")


def test_tokens_beyond_the_vocabulary_are_told(damaged_folder):
    own = Encoder(damaged_folder / "tokenizer.json", lambda text: [10**6])
    with pytest.raises(ConversionError, match="instead of token 1000000 at 0"):
        check_vocabulary(metadata_of(damaged_folder), own)
