"""Tokenizers as metadata, against sentencepiece and tokenizers."""

import json
import shutil

import gguf
import pytest
import sentencepiece
from gguf import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from converters import convert
from converters.checkpoint import Checkpoint
from converters.vocabulary import CHECK_TEXTS, check_vocabulary, read_encoder, read_sentencepiece, write_vocabulary
from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.generate.tokenizer import Tokenizer as WrittenTokenizer

from .conftest import CHAT_TEMPLATE, SPLITTINGS, TRAINING_TEXT, train_tokenizer


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


def test_unknown_splitting_is_refused_with_those_known(damaged_folder):
    tokenizer = train_tokenizer("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("-", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json: splits text by .*Split.*gpt-2, smollm, .*llama-bpe"):
        metadata_of(damaged_folder)


@pytest.mark.parametrize("model", [models.WordPiece(unk_token="?"), models.Unigram(), models.BPE()])
def test_other_kinds_of_tokenizer_are_refused(model, damaged_folder):
    Tokenizer(model).save(str(damaged_folder / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json: .*known: BPE"):
        metadata_of(damaged_folder)


def test_tokens_merges_and_types_are_the_tokenizers(damaged_folder):
    tokenizer = train_tokenizer("smollm")
    tokenizer.add_tokens([AddedToken("a▁b"), "<|new|>"])
    tokenizer.save(str(damaged_folder / "tokenizer.json"))
    metadata = metadata_of(damaged_folder)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    n = tokenizer.get_vocab_size()
    assert tokens[: n - 2] == [tokenizer.id_to_token(i) for i in range(n - 2)]
    assert tokens[n - 2 :] == ["a b", "<|new|>"] + [f"[PAD{i}]" for i in range(n, 512)]
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
