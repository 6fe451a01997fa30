"""The checkpoint inside ggpy is what its card says, by transformers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

import ggpy

FOLDER = Path(ggpy.__file__).parent / "demo_model"
CARD = (FOLDER / "README.md").read_text()
CONFIG = json.loads((FOLDER / "config.json").read_text())
HELD_OUT = (FOLDER / "heldout.txt").read_text()
PROMPTS = ("And it came to pass", "The LORD is my shepherd", "In the beginning", "Jesus answered and said unto them")


def card_table(heading):
    """Rows of the table under a heading, first cell -> the others."""
    section = CARD.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    loaded, info = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is DeepseekV2ForCausalLM
    assert not any(info.values()), info
    return loaded.eval()


@pytest.fixture(scope="module")
def chapter(model, tokenizer):
    """Ruth's first chapter: its text, its ids after the first token, the logits of these, each router's logits."""
    text = HELD_OUT[: HELD_OUT.index("And Naomi had a kinsman")]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
    return text, ids[0, 1:], output.logits[0, :-1], output.router_logits


def completion(model, tokenizer, prompt, n_tokens):
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return output[0, ids.input_ids.shape[1] :].tolist()


def test_the_files_fit_into_a_repository():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 9_500_000


def test_weights_are_bfloat16_and_as_many_as_the_card_says():
    weights = load_file(FOLDER / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert f"{sum(weight.numel() for weight in weights):,} weights" in CARD


def test_the_card_has_config_jsons_values():
    table = card_table("Architecture")
    assert len(table) > 10
    for name, (value, *_) in table.items():
        assert json.loads(value) == CONFIG[name.strip("`")], name


def test_rows_fill_whole_blocks_of_32():
    assert all(weight.shape[-1] % 32 == 0 for weight in load_file(FOLDER / "model.safetensors").values())


def test_the_card_names_the_licences():
    assert re.search(r"^license: mit$", CARD, re.MULTILINE)
    assert re.search(r"public domain", CARD)


def test_text_survives_the_tokenizer(tokenizer):
    ids = tokenizer(HELD_OUT, verbose=False).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == HELD_OUT
    assert len(tokenizer) == CONFIG["vocab_size"]


def test_held_out_loss_is_the_cards(chapter):
    text, ids, logits, _ = chapter
    loss = torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item()
    per_token, bits_per_byte = (float(cell) for cell in card_table("Held-out loss")["Ruth, chapter 1"][:2])
    assert loss / len(ids) == pytest.approx(per_token, abs=0.01)
    assert loss / math.log(2) / len(text.encode()) == pytest.approx(bits_per_byte, abs=0.01)


def test_it_predicts_far_better_than_counts_of_tokens(chapter):
    """Five times as likely, on average, as by the text's own frequencies."""
    _, ids, logits, _ = chapter
    share = torch.bincount(ids, minlength=CONFIG["vocab_size"]) / len(ids)
    by_counts = -share[ids].log().mean()
    assert torch.nn.functional.cross_entropy(logits, ids) < by_counts - math.log(5)


def test_predictions_do_not_depend_on_what_follows(model, chapter):
    _, ids, logits, _ = chapter
    with torch.no_grad():
        shorter = model(torch.cat([torch.zeros(1, dtype=torch.long), ids[:99]])[None]).logits[0]
    assert torch.allclose(shorter, logits[:100], atol=1e-3)


def test_every_expert_is_used(chapter):
    *_, routers = chapter
    assert len(routers) == CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
    even = 1 / CONFIG["n_routed_experts"]
    for logits in routers:
        chosen = logits.topk(CONFIG["num_experts_per_tok"]).indices.flatten()
        shares = torch.bincount(chosen, minlength=CONFIG["n_routed_experts"]) / len(chosen)
        assert shares.min() > even / 5, shares
        assert shares.max() < even * 3, shares


def test_greedy_text_is_made_of_words(model, tokenizer):
    """Of the held-out text or whole in the tokenizer, both the Bible's; the rest are rare words and names."""
    known = set(re.findall(r"[a-z]+", HELD_OUT.lower())) | {
        piece.strip("Ġ").lower() for piece in tokenizer.get_vocab() if piece.startswith("Ġ")
    }
    texts = [tokenizer.decode(completion(model, tokenizer, prompt, 60)).lower() for prompt in PROMPTS]
    words = [word for text in texts for word in re.findall(r"[a-z]+", text)]
    assert len(words) > 100, texts
    assert sum(word in known for word in words) > 0.9 * len(words), texts


def test_greedy_text_is_no_endless_token(model, tokenizer):
    for prompt in PROMPTS:
        ids = completion(model, tokenizer, prompt, 60)
        assert not any(len(set(ids[i : i + 3])) == 1 for i in range(len(ids) - 2)), tokenizer.decode(ids)
        assert len(set(ids)) >= 15, tokenizer.decode(ids)


def test_the_demo_model_is_loaded_by_its_name_and_folders_are_converted_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt, options = "And it came to pass", {"max_tokens": 8, "temperature": 0}
    with ggpy.load("demo", n_ctx=64, n_threads=1) as model, ggpy.load(FOLDER, n_ctx=64, n_threads=1) as same:
        assert model.file.path == same.file.path
        text = model.generate(prompt, **options).run().text
    (tmp_path / "demo").write_bytes(b"no model")  # a file of that name is meant first
    with pytest.raises(ggpy.GGUFError):
        ggpy.load("demo")
    assert text and text == text.strip("\ufffd")
    with pytest.raises(ggpy.Error, match="no such file or folder"):
        ggpy.load("no/such/model")
    with pytest.raises(ggpy.Error, match=r"neither GGUF files nor config\.json in it"):
        ggpy.load(tmp_path)
