"""The map of a decoder finds the right modules in every family, and says what it did not find."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BambaConfig,
    FalconConfig,
    GraniteMoeHybridConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import oasis_attn
from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import decoder_map, find_decoder
from oasis_attn.modeling.families import FAMILIES
from tiny_models import tiny_config, tiny_model, tiny_wrapper_config


def build(family, auto=AutoModelForCausalLM, **changes):
    config = tiny_config(family, **changes) if isinstance(family, str) else family
    with torch.device("meta"):
        return auto.from_config(config)


def names(layer):
    """What the map says of one layer, with names below the layer."""

    def local(part):
        return part and part.name.removeprefix(f"{layer.name}.")

    found = {"mixer": local(layer.mixer)}
    for kind, sublayer in (("attention", layer.attention), ("mlp", layer.mlp)):
        found[kind] = local(sublayer)
        if sublayer:
            found[f"{kind} norms"] = (local(sublayer.pre_norm), local(sublayer.post_norm))
            found[f"{kind} inputs"] = [local(part) for part in sublayer.inputs]
            found[f"{kind} output"] = local(sublayer.output)
    return found


def expect(attention, mlp, norms=(None, None), mixer=None):
    """`attention` and `mlp`: the module, its inputs and its output, in one string."""
    found = {"mixer": mixer}
    for kind, text, norm in zip(("attention", "mlp"), (attention, mlp), norms, strict=True):
        module, *projections = text.split() if text else [None]
        found[kind] = module
        if module:
            found[f"{kind} norms"] = norm if isinstance(norm, tuple) else (norm, None)
            found[f"{kind} inputs"] = projections[:-1]
            found[f"{kind} output"] = projections[-1] if projections else None
    return found


QKV = "{0} {0}.q_proj {0}.k_proj {0}.v_proj {0}."
ATTENTION = QKV.format("self_attn") + "o_proj"
MLP = "{0} {0}.gate_proj {0}.up_proj {0}.down_proj"
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
GPT_NEOX_MLP = "mlp mlp.dense_h_to_4h mlp.dense_4h_to_h"
LAYERS = {  # the decoder, its final norm, and the layers that differ
    "llama": ("model", "norm", [expect(ATTENTION, MLP.format("mlp"), PRE_NORMS)]),
    "gemma3_text": ("model", "norm", [expect(ATTENTION, MLP.format("mlp"), SANDWICH)]),
    "phi3": (
        "model", "norm",
        [expect("self_attn self_attn.qkv_proj self_attn.o_proj",
                "mlp mlp.gate_up_proj mlp.down_proj", PRE_NORMS)],
    ),
    "llama4_text": (
        "model", "norm",
        [expect(ATTENTION, MLP.format("feed_forward"), PRE_NORMS),
         expect(ATTENTION, "feed_forward", PRE_NORMS)],
    ),
    "gpt2": (
        "transformer", "ln_f",
        [expect("attn attn.c_attn attn.c_proj", "mlp mlp.c_fc mlp.c_proj", ("ln_1", "ln_2"))],
    ),
    "gpt_neox": (
        "gpt_neox", "final_layer_norm",
        [expect("attention attention.query_key_value attention.dense", GPT_NEOX_MLP, PRE_NORMS)],
    ),
    "bloom": (
        "transformer", "ln_f",
        [expect("self_attention self_attention.query_key_value self_attention.dense", GPT_NEOX_MLP,
                PRE_NORMS)],
    ),
    "opt": (
        "model.decoder", "final_layer_norm",
        [expect(QKV.format("self_attn") + "out_proj", "fc2 fc1 fc2",
                ("self_attn_layer_norm", "final_layer_norm"))],
    ),
    "phi": (
        "model", "final_layernorm",
        [expect(QKV.format("self_attn") + "dense", "mlp mlp.fc1 mlp.fc2",
                ("input_layernorm",) * 2)],
    ),
    "openai-gpt": (
        "transformer", None,
        [expect("attn attn.c_attn attn.c_proj", "mlp mlp.c_fc mlp.c_proj")],
    ),
    "jamba": (
        "model", "final_layernorm",
        [expect(None, MLP.format("feed_forward"), (None, "pre_ff_layernorm"), mixer="mamba"),
         expect(None, "feed_forward", (None, "pre_ff_layernorm"), mixer="mamba")],
    ),
    "qwen3_next": (
        "model", "norm",
        [expect(None, "mlp", PRE_NORMS, mixer="linear_attn"), expect(ATTENTION, "mlp", PRE_NORMS)],
    ),
    "minimax": (
        "model", "norm",
        [expect(ATTENTION, "mlp", PRE_NORMS), expect(None, "mlp", PRE_NORMS, mixer="self_attn")],
    ),
    "olmo_hybrid": (
        "model", "norm",
        [expect(None, MLP.format("mlp"), PRE_NORMS, mixer="linear_attn"),
         expect(ATTENTION, MLP.format("mlp"),
                ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")))],
    ),
    "mamba": ("backbone", "norm_f", [expect(None, None, mixer="mixer")]),
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_every_part_is_found(family):
    decoder, final_norm, layers = LAYERS[family]
    found = decoder_map(build(family))
    assert found.name == decoder
    assert (found.final_norm and found.final_norm.name) == (
        final_norm and f"{decoder}.{final_norm}"
    )
    unlike = []
    for layer in found.layers:
        if names(layer) not in unlike:
            unlike.append(names(layer))
        assert layer.unknown == ()
    assert unlike == layers
    assert len(found.layers) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_a_row_have_no_unknown_part(family):
    model = build(family)
    found = decoder_map(model)
    assert found.has_row
    assert found.unknown == ()
    assert model.get_submodule(found.name) is found.module
    for part in (found.embedding, found.final_norm, found.head):
        assert model.get_submodule(part.name) is part.module
    row = FAMILIES[family]
    for layer in found.layers:
        assert (layer.unknown, layer.mixer) == ((), None)
        named = {part.name: part.module for part in layer.norms}
        for sublayer, attribute, norms in (
            (layer.attention, "self_attn", (row.pre_attention, row.post_attention)),
            (layer.mlp, row.mlp, (row.pre_mlp, row.post_mlp)),
        ):
            assert model.get_submodule(sublayer.name) is sublayer.module
            assert sublayer.module is getattr(layer.module, attribute)
            found_norms = tuple(
                norm and norm.name.removeprefix(f"{layer.name}.")
                for norm in (sublayer.pre_norm, sublayer.post_norm)
            )
            assert found_norms == norms
            for norm in (sublayer.pre_norm, sublayer.post_norm):
                assert norm is None or named.pop(norm.name) is norm.module
        assert not named  # every norm has a role
        assert layer.attention.inputs
        assert layer.attention.output
        if layer.mlp.experts is None:
            assert layer.mlp.inputs
            assert layer.mlp.output
            assert not layer.mlp.routers
        else:
            assert layer.mlp.routers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heuristic_agrees_with_the_rows(family, monkeypatch):
    """Or it does not know the norms' roles, where no other family has these norms."""
    model = build(family)
    with_row = [names(layer) for layer in decoder_map(model).layers]
    monkeypatch.delitem(FAMILIES, family)
    without = decoder_map(model)
    assert not without.has_row
    if family in ("afmoe", "hyperclovax"):
        norms = {"attention norms": (None, None), "mlp norms": (None, None)}
        with_row = [layer | norms for layer in with_row]
    assert [names(layer) for layer in without.layers] == with_row


@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_the_text_decoder_of_a_vision_language_model(kind):
    """Its vision tower has as many layers."""
    model = build(tiny_wrapper_config(kind), AutoModelForImageTextToText)
    found = decoder_map(model)
    assert (
        type(found.module).__name__
        == {"gemma3": "Gemma3TextModel", "llama4": "Llama4TextModel"}[kind]
    )
    assert found.has_row
    assert [names(layer) for layer in found.layers] == [
        names(layer) for layer in decoder_map(build(f"{kind}_text")).layers
    ]
    assert found.head.module is model.get_output_embeddings()
    assert found.embedding.name == f"{found.name}.embed_tokens"
    assert any("vision" in name for name in found.unknown)


def test_parallel_branches_share_their_norm_and_a_falcon_may_have_two():
    def falcon(**changes):
        config = FalconConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **changes
        )
        (layer, _) = decoder_map(build(config)).layers
        return names(layer)

    attention = "self_attention self_attention.query_key_value self_attention.dense"
    assert falcon() == expect(attention, GPT_NEOX_MLP, ("input_layernorm",) * 2)
    two = falcon(new_decoder_architecture=True, num_kv_heads=2)
    assert two == expect(attention, GPT_NEOX_MLP, ("ln_attn", "ln_mlp"))


def hybrid(kind):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    }
    if kind == "bamba":
        return build(BambaConfig(**sizes, attn_layer_indices=[1]))
    return build(
        GraniteMoeHybridConfig(
            **sizes, layer_types=["mamba", "attention"], shared_intermediate_size=16,
            num_local_experts=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bamba", "granitemoehybrid"])
def test_a_hybrid_names_the_layers_without_attention(kind):
    first, second = decoder_map(hybrid(kind)).layers
    assert first.attention is None
    assert first.mixer.name == "model.layers.0.mamba"
    assert second.attention.name == "model.layers.1.self_attn"
    assert second.mixer is None
    if kind == "granitemoehybrid":  # the sum of two modules
        assert second.mlp is None
        assert "model.layers.1.shared_mlp.input_linear.weight" in second.unknown


def test_experts_and_routers_are_named():
    mlp = decoder_map(build("qwen2_moe")).layers[0].mlp
    assert mlp.experts.name == "model.layers.0.mlp.experts"
    assert [router.name.removeprefix(f"{mlp.name}.") for router in mlp.routers] == [
        "gate", "shared_expert_gate"
    ]  # fmt: skip


def test_latent_attention_and_fused_projections():
    attention = decoder_map(build("deepseek_v3")).layers[0].attention
    assert attention.key == attention.value != attention.query
    assert f"{attention.name}.q_b_proj" in attention.inner
    fused = decoder_map(build("phi3")).layers[0].attention
    assert fused.query == fused.key == fused.value


@pytest.mark.parametrize("variant", ["vanilla", "oasis", "gated_elementwise", "kv_null"])
def test_our_models_have_the_map_of_their_family(variant):
    ours, native = decoder_map(tiny_model(variant)), decoder_map(build("llama"))
    assert [names(layer) for layer in ours.layers] == [names(layer) for layer in native.layers]
    assert not any(layer.unknown for layer in ours.layers)
    assert all(name.startswith("model.depth.") for name in ours.unknown)


def test_a_model_without_head():
    found = decoder_map(build("llama", AutoModel))
    assert (found.name, found.head) == ("", None)
    assert found.layers[0].attention.name == "layers.0.self_attn"
    assert found.final_norm.name == "norm"


def test_a_model_wrapped_by_peft():
    model = build("llama")
    plain = [names(layer) for layer in decoder_map(model).layers]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    found = decoder_map(wrapped)
    assert found.name == "base_model.model.model"
    assert [names(layer) for layer in found.layers] == plain
    assert found.unknown == ()


def test_parameters_that_are_none_of_the_parts_are_unknown():
    found = decoder_map(build("doge"))
    assert found.layers[0].unknown == (
        "model.layers.0.input_residual", "model.layers.0.post_attention_residual"
    )  # fmt: skip
    assert "transformer.wpe.weight" in decoder_map(build("gpt2")).unknown


@pytest.mark.parametrize("build_it", [lambda: build("bert"), lambda: build("xlm")])
def test_other_trees_are_refused(build_it):
    with pytest.raises(UserError, match=r"is not supported: \d modules look like its list of 4"):
        find_decoder(build_it())


def test_an_encoder_and_a_decoder_of_one_length_are_refused():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2))
    with pytest.raises(UserError, match=r"family 't5' .* 2 modules look like its list of 2 layers"):
        decoder_map(model)


def test_no_other_file_looks_for_the_decoder():
    """transformers' `get_decoder` does not find it in every family."""
    for path in Path(oasis_attn.__file__).parent.rglob("*.py"):
        assert "get_decoder" not in path.read_text(encoding="utf-8"), path
