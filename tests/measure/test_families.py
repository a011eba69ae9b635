"""Any decoder of transformers: diagnosed as what it computes, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from oasis_attn.modeling import attention
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.native_depth import observe_native_depth
from tiny_families import family_config
from tiny_models import VOCABULARY, tiny_wrapper_config

# Values narrower than keys, or a softcap: not for the fused kernel on the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")

DIAGNOSED = (
    *("llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "phi", "cohere"),
    *("gpt_oss", "granite_swa", "mixtral", "deepseek_v3", "llama4_text", "doge"),
    *("gemma4_text", "inkling_text"),  # a norm beside the final one; a position bias in attention
    *("bloom", "mpt", "gptj", "falcon", "xglm"),  # no attention interface; ALiBi in two of them
    *("deepseek_v32", "minimax_m3_vl_text"),  # an indexer selects keys, or blocks of keys
    *("deepseek_v4", "hy_v4", "inkling2_text", "gemma3n_text"),  # several streams, or depth routing
    *("qwen3_next", "bailing_hybrid", "jamba", "falcon_h1"),  # hybrids
    "jetmoe",  # experts in the attention
)
REFUSED = {
    "diffllama": "layer 0 calls the attention interface of transformers 2 times",
    "bert": "0 modules look like its list of 4 layers",
    "xlnet": "output projection of transformer.layer.0.rel_attn was not found",
}


def build(family):
    """As the family makes it, each weight off its start."""
    config = family_config(family)
    if getattr(config, "experts_implementation", None):
        config.experts_implementation = None  # transformers' own choice
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens():
    return torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", DIAGNOSED)
def test_what_is_measured_is_what_the_family_computes(family):
    model, ids = build(family), tokens()
    record = diagnose(model, ids)
    model.set_attn_implementation("eager")
    if family == "falcon":  # it cannot be set, but is read in the forward pass
        model.config._attn_implementation = "eager"
    with torch.no_grad():
        native = model(input_ids=ids, labels=ids, use_cache=False, output_attentions=True)
    assert record["loss.windowed"] == pytest.approx(float(native.loss), abs=1e-4)
    if family != "granite_swa":  # its eager map is that of the softmax alone, without its sinks
        mass_LH = torch.stack(
            [p_BHTS[0, :, 1:, 0].float().mean(-1) for p_BHTS in native.attentions]
        )
        without = {row["layer"] for row in record.tables.get("sink.no_map", ())}
        rows = torch.tensor(record.tables["sink.mass"])
        assert all(rows[layer].isnan().all() for layer in without)
        measured = [layer for layer in range(len(rows)) if layer not in without]
        torch.testing.assert_close(rows[measured], mass_LH, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_maps_that_modules_return_give_the_same_numbers(family, monkeypatch):
    """As in a family whose attention does not use the interface of transformers."""
    model, ids = build(family), tokens()
    record = diagnose(model, ids)
    monkeypatch.setattr(attention, "uses_attention_interface", lambda _: False)
    model.set_attn_implementation("eager")
    returned = diagnose(model, ids)
    for metric, other in zip(record.metrics, returned.metrics, strict=True):
        assert (metric.name, metric.where) == (other.name, other.where)
        assert other.value == pytest.approx(metric.value, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_depth_weights_of_hyper_connections_rebuild_what_sublayers_read(family):
    model, ids = build(family), tokens()
    sources, reads, calls = [model.get_input_embeddings()(ids)], [], []

    def read(_module, _args, output):
        reads.append(output if isinstance(output, torch.Tensor) else output[-1])

    def written(_module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        sources.append(output.view_as(sources[0]))

    decoder = decoder_map(model)
    for layer in decoder.layers:
        for sublayer in (layer.attention, layer.mlp):
            sublayer.module.register_forward_hook(written)
        for module in (layer.module.attn_hc, layer.module.ffn_hc):
            module.register_forward_hook(read)
    decoder.module.hc_head.register_forward_hook(read)
    with torch.no_grad(), observe_native_depth(model, calls.append):
        model(input_ids=ids, use_cache=False)
    assert [call.router for call in calls] == list(range(9))
    for call, read_BTD in zip(calls, reads, strict=True):
        found = torch.stack(sources[: call.router + 1], dim=2)
        rebuilt_BTD = (call.weights_BTS.unsqueeze(-1) * found).sum(2)
        torch.testing.assert_close(rebuilt_BTD, read_BTD, atol=1e-5, rtol=1e-4)


def test_depth_weights_of_block_attention_residuals():
    model, ids = build("inkling2_text"), tokens()
    reads, calls = {}, []

    def read(module, args, output):
        blocks, partial = args
        sources = module.norm(torch.cat([blocks, partial.unsqueeze(-2)], dim=-2).float())
        reads[len(reads)] = sources, torch.stack(output).mean(0)

    decoder = decoder_map(model)
    for name, module in decoder.module.named_modules():
        if name.endswith(("attention_input", "mlp_input", "final_input")):
            module.register_forward_hook(read)
    with torch.no_grad(), observe_native_depth(model, calls.append):
        model(input_ids=ids, use_cache=False)
    assert [call.router for call in calls] == list(range(1, 9))  # layer 0 reads the embedding
    for call, (sources_BTSD, read_BTD) in zip(calls, reads.values(), strict=True):
        mixed_BTD = (call.weights_BTS.unsqueeze(-1) * sources_BTSD).sum(2)
        torch.testing.assert_close(mixed_BTD, read_BTD, atol=1e-5, rtol=1e-4)
    assert "depth.entropy" in {metric.name for metric in diagnose(model, ids).metrics}


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_a_vision_language_model_is_diagnosed_by_its_text_decoder(family):
    torch.manual_seed(0)
    model, ids = AutoModelForImageTextToText.from_config(tiny_wrapper_config(family)), tokens()
    record = diagnose(model.eval(), ids)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert record["loss.windowed"] == pytest.approx(float(loss), abs=1e-4)
    assert len(record.tables["outlier.inf_norm_layer"]) == len(record.tables["sink.mass"]) == 4
    assert all(
        metric.where.startswith(("layers.", "norm"))
        for metric in record.metrics
        if metric.name == "outlier.max_inf_norm" and metric.where
    )


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family):
    model = build(family)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=f"family '{family}' .*{REFUSED[family]}") as error:
        diagnose(model, tokens())
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())
