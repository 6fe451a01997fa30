"""The layer that predicts further tokens: against transformers' own layers, put together as the checkpoint's makers do."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe
from transformers.models.qwen3_next import modeling_qwen3_next as older

import ggpy
from converters import convert
from ggpy.models import NextN, build_graph, nextn, read_nextn
from tests.converters.conftest import N_VOCAB, save_tokenizer

from .checkpoints import ids, random_model
from .test_states import SHARED, made

KINDS = {
    "qwen35": ("Qwen3_5", dense, {}),
    "qwen35moe": ("Qwen3_5Moe", moe, SHARED),
    "qwen3next": ("Qwen3Next", older, SHARED),
}


class Mtp(nn.Module):
    """vLLM's `Qwen3NextMultiTokenPredictor`, of transformers' layers."""

    def __init__(self, config, kind, module):
        super().__init__()
        norm, n = getattr(module, f"{kind}RMSNorm"), config.hidden_size
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (norm(n, config.rms_norm_eps) for _ in range(3))
        self.fc = nn.Linear(2 * n, n, bias=False)
        self.layers = nn.ModuleList([getattr(module, f"{kind}DecoderLayer")(config, 3)])

    def forward(self, model, hidden, tokens):
        """What logits are made of, for the tokens behind those of `hidden` (n, n_embd)."""
        x = torch.cat([self.pre_fc_norm_embedding(model.model.embed_tokens(tokens)), self.pre_fc_norm_hidden(hidden)], -1)
        x, n = self.fc(x)[None], len(tokens)
        positions = torch.arange(n)[None]
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        rope = model.model.rotary_emb(x, positions)
        x = self.layers[0](x, position_embeddings=rope, attention_mask=mask, position_ids=positions)
        return self.norm(x)[0]


def with_mtp(folder, name, type="f32", seed=0):
    """A tiny model and its MTP layer; and the file that they make."""
    kind, module, _ = KINDS[name]
    model = made(name, attn_implementation="eager")
    torch.manual_seed(seed)
    mtp = random_model(lambda config: Mtp(config, kind, module), model.config, seed + 1)
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    save_tokenizer(checkpoint)
    path = checkpoint / "model.safetensors"
    extra = {f"mtp.{name}": value for name, value in mtp.state_dict().items()}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    out = folder / f"{type}.gguf"
    convert(checkpoint, out, type)
    return model, mtp, out


def nextn_logits(model, path, tokens, hidden):
    """What the file's layer gives for the tokens behind those of `hidden`, in pieces: logits and what they are made of."""
    runner = model._nextn
    sequence, logits, made_of = ggpy.generate.sequence.TokenSequence(runner), [], []
    for first, stop in ((0, 1), (1, 30), (30, len(tokens))):
        ids = tokens[first:stop]
        sequence.make_room(len(ids))
        (rows,), (made,) = runner.run_both([sequence.span(ids, len(ids))], hidden[first:stop])
        sequence.advance(ids)
        logits.append(rows.copy())
        made_of.append(made.copy())
    return np.concatenate(logits), np.concatenate(made_of)


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_transformers(tmp_path, name):
    model, mtp, path = with_mtp(tmp_path, name)
    tokens = ids(80)
    with torch.no_grad():
        inner = model.model(torch.tensor([tokens])).last_hidden_state[0]
        expected_made = mtp(model, inner[:-1], torch.tensor(tokens[1:]))
        expected = model.lm_head(expected_made).numpy()
    with ggpy.load(path, n_ctx=128, kv_type="f32", n_threads=2) as ours:
        hidden = ours.hidden_states(tokens, [-1])[0]
        logits, made_of = nextn_logits(ours, path, tokens[1:], hidden[:-1])
        assert np.abs(logits - expected).max() <= 2e-3 and np.ptp(expected) > 1
        assert np.abs(made_of - expected_made.numpy()).max() <= 2e-3
        # It stands behind the model's own layers, which are as they are without it.
        plain = model(torch.tensor([tokens])).logits[0].detach().numpy()
        assert np.abs(ours.logits(tokens) - plain).max() <= 2e-3


def test_the_file_is_that_of_others(tmp_path):
    """Keys and names are those that llama.cpp reads: see its `llama_model_qwen35`."""
    _, _, path = with_mtp(tmp_path, "qwen35")
    reader = gguf.GGUFReader(path)
    fields = reader.fields
    assert fields["qwen35.block_count"].contents() == 5 and fields["qwen35.nextn_predict_layers"].contents() == 1
    names = {t.name for t in reader.tensors if t.name.startswith("blk.4.")}
    own = {f"blk.4.nextn.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head_norm")}
    like = {t.name.replace("blk.3.", "blk.4.") for t in reader.tensors if t.name.startswith("blk.3.")}
    assert names == own | like


def test_checkpoints_without_the_tensors_have_no_layer(tmp_path):
    model = made("qwen35", mtp_num_hidden_layers=1)
    model.save_pretrained(tmp_path / "checkpoint")
    save_tokenizer(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    assert "qwen35.nextn_predict_layers" not in gguf.GGUFReader(tmp_path / "f32.gguf").fields
    with (
        ggpy.load(tmp_path / "f32.gguf", n_ctx=64, n_threads=1) as model,
        pytest.raises(ggpy.UnsupportedError, match="no layer that predicts further tokens"),
    ):
        model.generate([1, 2], draft="mtp")


def test_large_vocabularies_are_predicted_in_part(tmp_path, monkeypatch):
    _, _, path = with_mtp(tmp_path, "qwen35")
    tokens = ids(40)
    with ggpy.load(path, n_ctx=64, n_threads=1) as model:
        hidden = model.hidden_states(tokens, [-1])[0][:-1]
        whole, _ = nextn_logits(model, path, tokens[1:], hidden)
    monkeypatch.setattr(nextn, "_MOST_PREDICTED", 100)
    with ggpy.load(path, n_ctx=64, n_threads=1) as model:
        part, _ = nextn_logits(model, path, tokens[1:], hidden)
        np.testing.assert_array_equal(part, whole[:, :100])
        assert len(whole[0]) == N_VOCAB
        generation = model.generate(tokens, max_tokens=30, draft="mtp", temperature=0).run()
        assert generation.ids == model.generate(tokens, max_tokens=30, temperature=0).run().ids


def test_a_tensor_that_nobody_asks_for_is_refused(tmp_path):
    from .test_states import rewritten

    _, _, path = with_mtp(tmp_path, "qwen35")
    out = rewritten(path, tmp_path / "more.gguf", {}, lambda reader: {"blk.4.nextn.more.weight": np.ones(64, np.float32)})
    with ggpy.GGUFFile(out) as file, pytest.raises(ggpy.GGUFError, match=r"blk\.4\.nextn\.more\.weight has no place"):
        arch = read_nextn(file)
        assert isinstance(arch, NextN)
        build_graph(file, arch, 1)
