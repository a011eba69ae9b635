"""A model with a plain null becomes a family with sinks that computes the same function."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sink_attention
from oasis_attn import UserError
from oasis_attn.hub.convert import convert_checkpoint
from oasis_attn.hub.prefix import attach_prefix, compute_prefix
from oasis_attn.hub.sink_family import CONVERTIBLE, to_sinks
from tiny_models import greedy, tiny_config, tiny_model, word_tokenizer

ROPES = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)  # fmt: skip
MULTIPLIERS = {
    "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}  # fmt: skip
CASES = (
    *((family, {}) for family in CONVERTIBLE),
    ("llama", {"head_dim": 16, "mlp_bias": True}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    ("granite", MULTIPLIERS),
    *(("llama", {"rope_parameters": {"rope_theta": 5000.0, **rope}}) for rope in ROPES),
)


def plain(variant="learned_sink", family="llama", dtype=torch.float64, settings=None, **changes):
    """A model whose norms and biases, too, are not at their initial values."""
    text = tiny_config(family, initializer_range=0.2, **changes)
    model = tiny_model(variant, text=text, dtype=dtype, **settings or {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_each_family_computes_the_same(family, changes, ids):
    model = plain(family=family, **changes)
    target = to_sinks(model)
    assert target.config.model_type == "granite_swa"
    weight = "model.layers.1.self_attn.q_proj.weight"
    assert target.get_parameter(weight).data_ptr() == model.get_parameter(weight).data_ptr()
    expected = model(ids).logits
    # The family's own attention computes its softmax in float32.
    torch.testing.assert_close(target(ids).logits, expected, rtol=0, atol=1e-5)
    target.set_attn_implementation("plain_sinks")
    torch.testing.assert_close(target(ids).logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("null_logit", [-1e6, 1e6])
def test_a_null_logit_beyond_the_dtype(null_logit, ids):
    model = plain("softmax1", dtype=torch.float16, settings={"null_logit": null_logit})
    torch.testing.assert_close(to_sinks(model)(ids).logits, model(ids).logits, rtol=0, atol=0.1)


WITHOUT_US = """
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sink_attention

given, folder, out = load_file(sys.argv[1]), *sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids == [5, 7]
assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.7)
single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.set_attn_implementation("plain_sinks")
ids = given["input_ids"]
with torch.no_grad():
    result = {"own": single(**given).logits, "logits": model(**given).logits}
    cache = model(ids[:, :7]).past_key_values
    result["cached"] = model(ids[:, 7:], past_key_values=cache).logits
options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
result["tokens"] = model.generate(**given, **options)
save_file(result, out)
assert "oasis_attn" not in sys.modules
"""


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "settings", "changes"),
    [
        ("softmax1", {"null_logit": 0.7}, {}),
        ("learned_sink", {}, {"attention_output_bias": True}),
    ],
)
def test_a_process_without_this_library_computes_the_same(
    variant, settings, changes, ids, tmp_path
):
    model = plain(variant, settings=settings, tie_word_embeddings=True, **changes)
    model.generation_config.update(do_sample=True, temperature=0.7)
    save(model, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "sinks", dtype="auto", sinks=True)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "given")
    files = [tmp_path / name for name in ("given", "sinks", "out")]
    paths = [str(Path(sink_attention.__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs, visible = load_file(tmp_path / "out"), mask.bool()
    assert theirs["logits"].dtype == torch.float64
    logits = model(ids, attention_mask=mask).logits[visible]
    torch.testing.assert_close(theirs["own"][visible].double(), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs["logits"][visible], logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(theirs["cached"], model(ids).logits[:, 7:], rtol=0, atol=1e-9)
    assert torch.equal(theirs["tokens"], greedy(model, ids, attention_mask=mask))
    card = (tmp_path / "sinks" / "README.md").read_text()
    assert f"`{variant}`" in card
    assert "import oasis_attn" not in card


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "settings", "family", "changes", "reason"),
    [
        ("oasis", {}, "llama", {}, "residual: 'depth' is depth routing.*import oasis_attn"),
        ("kv_null", {}, "llama", {}, "'key_value_null' has null values.*`oasis export`.*first"),
        ("vanilla", {}, "llama", {}, "token_normalizer: 'softmax' has no null; use to_vanilla"),
        (
            "vanilla",
            {"token_normalizer": "key_null"},
            "llama",
            {},
            "'key_null' has .* on the query",
        ),
        ("softpick", {}, "llama", {}, "token_normalizer: 'softpick' is not a softmax with a null"),
        ("softmax1", {"null_logit": -torch.inf}, "llama", {}, "null_logit: -inf switches"),
        ("softmax1", {"output_gate": "head"}, "llama", {}, "output_gate: 'head' is in no family"),
        ("softmax1", {"branch_norm": "rms"}, "llama", {}, "branch_norm: 'rms' is in no family"),
        ("learned_sink", {}, "gpt_oss", {}, "family 'gpt_oss' has its own sinks; use to_vanilla"),
        ("softmax1", {}, "qwen3", {}, "family 'qwen3' has parts that granite_swa"),
        ("softmax1", {}, "mixtral", {}, "family 'mixtral' has parts that granite_swa"),
        ("softmax1", {}, "llama", {"rope_parameters": PARTIAL}, "partial_rotary_factor 0.5"),
        ("softmax1", {}, "llama", {"rope_parameters": LONG}, "rope_type 'longrope' is not one"),
    ],
)
def test_what_no_family_with_sinks_computes_is_named(variant, settings, family, changes, reason):
    model = tiny_model(variant, text=tiny_config(family, **changes), **settings)
    with pytest.raises(UserError, match=f"to_sinks: .*{reason}"):
        to_sinks(model)


def test_refusals_come_before_the_weights_are_read_and_write_nothing(tmp_path):
    model = plain(dtype=torch.float32)
    save(to_sinks(model), tmp_path / "native")
    save(plain("oasis"), tmp_path / "depth")
    attach_prefix(model, compute_prefix(model, (5, 6)))
    save(model, tmp_path / "prefixed")
    for name, reason in (
        ("native", "family 'granite_swa' is not an OASIS model"),
        ("depth", "residual: 'depth'"),
        ("prefixed", "it is quantized or has a prefix"),
    ):
        (tmp_path / name / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(UserError, match=f"to_sinks: .*{reason}"):
            convert_checkpoint(tmp_path / name, tmp_path / "out", sinks=True)
    with pytest.raises(UserError, match="to_sinks: cannot be combined with a variant"):
        convert_checkpoint(tmp_path / "depth", tmp_path / "out", variant="oasis", sinks=True)
    with pytest.raises(UserError, match=r"to_sinks: .* has a prefix"):
        to_sinks(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth", "native", "prefixed"]
