"""Of each family: a key of config.json that it doesn't read is refused. No weights are needed to see that."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import transformers

from converters.checkpoint import Config
from converters.conversion import FAMILIES
from converters.family import HARMLESS, refuse_unread
from converters.text_part import KINDS, take_text_part
from ggpy.errors import Error, UnsupportedError

FAMILY_OF = {name: family for family in FAMILIES for name in family.checkpoints}
EXPERTS = {"num_experts_per_tok": 2}
#: architectures that transformers hasn't got by that name -> a class with such settings
CLASSES = {
    "MiniCPMForCausalLM": "Llama",
    "ExaoneMoEForCausalLM": "ExaoneMoe",
    "BailingMoeV2ForCausalLM": "Glm4Moe",
    "DeepseekForCausalLM": "Llama",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5Text",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeText",
    "BertForPreTraining": "Bert",
}
#: what a class's own defaults lack of a model that is understood; None takes a key away
CHANGES = {
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "DeepseekV2ForCausalLM": EXPERTS,
    "DeepseekForCausalLM": {"n_routed_experts": 8, "moe_intermediate_size": 64, **EXPERTS},
    "MiniCPMForCausalLM": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    "BailingMoeV2ForCausalLM": {"use_qk_norm": True, "head_dim": 128},
    "Gemma3TextModel": {"use_bidirectional_attention": True},
    "AfmoeForCausalLM": {"mup_enabled": True},
    "MellumForCausalLM": {"sliding_window": None},
    "Dots1ForCausalLM": {"n_routed_experts": 8, **EXPERTS},
}


class AnyRows:
    """Weights that nobody reads (implements `Rows`)."""

    sources = ("a tensor",)

    def __init__(self, shape):
        self.shape = shape


def defaults(name):
    """What an architecture's class in transformers takes where config.json says nothing."""
    stem = CLASSES.get(name) or name.removesuffix("Model").removesuffix("LMHead")
    for ending in ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification"):
        stem = stem.removesuffix(ending)
    config = getattr(transformers, f"{stem}TextConfig", None) or getattr(transformers, f"{stem}Config")
    return json.loads(json.dumps(config().to_dict()))


def settings(name):
    """A config.json of an architecture: transformers' defaults, as it saves them."""
    values = defaults(name) | {"architectures": [name]} | CHANGES.get(name, {})
    return {key: value for key, value in values.items() if value is not None}


def check(name, values):
    """Refuses what `convert` would of a config.json alone."""
    family, config = FAMILY_OF[name], Config(values, Path("config.json"))
    config.defaults = family.defaults.get(name, {})
    config = config.replaced(**family.usual(config))
    shapes = family.shapes(config)
    family.gather({}, config)
    for tensor, shape in shapes.items():
        family.transform(tensor, AnyRows(shape), config)
    family.computed(config)
    family.write_hparams(gguf.GGUFWriter(None, family.name), config)
    refuse_unread(config)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_key_that_a_family_does_not_read_is_refused(name):
    values = settings(name)
    check(name, values)
    for value in (1.5, 2, True, "other", [1], {"factor": 2}):
        with pytest.raises(UnsupportedError, match=r"a_new_factor .* isn't understood"):
            check(name, values | {"a_new_factor": value})
    for key, part in values.items():
        if isinstance(part, dict) and key not in HARMLESS:
            with pytest.raises(Error, match="a_new_factor"):
                check(name, values | {key: part | {"a_new_factor": 1.5}})
            for kind in [k for k, v in part.items() if isinstance(v, dict) and k not in HARMLESS]:
                with pytest.raises(Error, match="a_new_factor"):
                    check(name, values | {key: part | {kind: part[kind] | {"a_new_factor": 1.5}}})


def metadata(name, values):
    """What a config.json makes, or why it is refused."""
    family, config = FAMILY_OF[name], Config(values, Path("config.json"))
    config.defaults = family.defaults.get(name, {})
    writer = gguf.GGUFWriter(None, family.name)
    try:
        family.write_hparams(writer, config.replaced(**family.usual(config)))
    except Error as error:
        return str(error).replace("missing, which means ", "")
    return {key: value.value for key, value in writer.kv_data[0].items()}


#: keys without which the tensors have other shapes, which is refused, or whose value says what others say
SHAPES = {"head_dim", "num_key_value_heads", "num_local_experts", "hidden_size_per_layer_input", "per_layer_config"}
SHAPES |= {"intermediate_size"}
NEEDED = re.compile("not null|rope_parameters (missing|has nothing)|layer_types (must|null)|kinds of layers null")


def check_missing(made, values, own):
    """`made` gives what it makes of a config.json, `own` has what the class takes for keys that aren't there."""
    whole = made(values)
    assert isinstance(whole, dict)
    for key in values.keys() - HARMLESS - SHAPES - {"architectures", "model_type"}:
        found = made({k: v for k, v in values.items() if k != key})
        if isinstance(found, dict) or not NEEDED.search(found):
            assert found == (whole if own.get(key) == values[key] else made(values | {key: own.get(key)})), key


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name not in CLASSES])
def test_a_missing_key_means_what_the_class_takes_it_for_or_is_refused(name):
    """Also rope_parameters, for which classes have bases of their own."""
    check_missing(lambda values: metadata(name, values), settings(name), defaults(name))


def test_a_base_that_no_class_knows_must_be_said():
    values = settings("BailingMoeV2ForCausalLM")
    del values["rope_parameters"]
    assert "rope_theta missing" in metadata("BailingMoeV2ForCausalLM", values)
    assert metadata("BailingMoeV2ForCausalLM", values | {"rope_theta": 6e5})["bailingmoe2.rope.freq_base"] == 6e5


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_of_a_text_part_means_what_its_own_class_takes_it_for_or_is_refused(kind):
    own = transformers.CONFIG_MAPPING[kind]().to_dict()
    own = json.loads(json.dumps(own.get("text_config", own)))

    def made(values):
        config = Config({"text_config": values | {"model_type": kind}}, Path("config.json"))
        whole = SimpleNamespace(config=config, architecture="AForConditionalGeneration", tensors={}, notes=[], folder=".")
        take_text_part(whole)
        return metadata(whole.architecture, config.values)

    check_missing(made, {key: value for key, value in own.items() if value is not None}, own)


@pytest.mark.parametrize(
    "name", ["Olmo3ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM", "MellumForCausalLM", "ModernBertModel"]
)
def test_layers_with_windows_are_not_scaled_without_a_word(name):
    values = settings(name)
    kinds = values["rope_parameters"]
    scaled = kinds["sliding_attention"] | {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(UnsupportedError, match="rope_type 'linear'; known: 'default'"):
        check(name, values | {"rope_parameters": kinds | {"sliding_attention": scaled}})
