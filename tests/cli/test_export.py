"""The command `oasis export`; what it writes is read by a process that does not import us."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from oasis_attn import diagnose
from oasis_attn.errors import UserError
from oasis_attn.hub.convert import convert
from oasis_attn.hub.gguf_file import read_gguf
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import Prefix, compute_prefix, with_prefix
from oasis_attn.quantization import quantize
from oasis_attn.quantization.schemes import get_scheme
from tiny_models import tiny_model
from tokenizer_factories import byte_level

TEXT = "Ann has 12 pens. The quick brown fox says so."
READER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model, tokenizer):
    ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

found, where = {}, sys.argv[1]
for name, options in {"file": {"gguf_file": "m.gguf"}, "tokens": {}}.items():
    folder = where if name == "file" else f"{where}/{name}"
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    found[name] = logits(model, AutoTokenizer.from_pretrained(folder, **options))
for name in ("tuned", "nulls"):
    base = AutoModelForCausalLM.from_pretrained(f"{where}/{name}/base_model")
    tokenizer = AutoTokenizer.from_pretrained(f"{where}/{name}")
    found[name] = logits(PeftModel.from_pretrained(base, f"{where}/{name}"), tokenizer)
assert "oasis_attn" not in sys.modules
torch.save(found, f"{where}/logits.pt")
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_level()), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=True, max_position_embeddings=128, dtype="float32",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def save(model, folder):
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model):
    return model(torch.tensor([byte_level()(TEXT).input_ids])).logits


def tuned_prefix(model):
    prefix = compute_prefix(model, [5, 6])
    keys = prefix.keys_LGPd + 0.1
    return Prefix(tokens=prefix.tokens, keys_LGPd=keys, values_LGPd=prefix.values_LGPd)


@torch.no_grad()
def with_two_nulls(model):
    normalizer = {"name": "key_value_null", "nulls": 2}
    converted = convert(model, "kv_null", token_normalizer=normalizer)
    for layer in converted.model.layers:
        layer.null_logit.zero_()
        for null in (layer.null_key, layer.null_value):
            null.copy_(torch.randn_like(null[::2]).repeat_interleave(2, 0))
    return converted


def test_another_process_computes_the_same_without_this_library(oasis, model, tmp_path):
    prefixed = with_prefix(model, compute_prefix(model, [5, 6]))
    tuned, retrofitted = with_prefix(model, tuned_prefix(model)), with_two_nulls(model)
    for name, each in {
        "plain": model, "prefixed": prefixed, "tuned model": tuned, "retrofitted": retrofitted,
    }.items():  # fmt: skip
        save(each, tmp_path / name)
    plain, file = tmp_path / "plain", tmp_path / "m.gguf"
    assert oasis("export", plain, "--out", file, "--weights", "f32")[0] == 0
    code, shown = oasis("export", tmp_path / "prefixed", "--out", tmp_path / "tokens", "--json")
    facts = json.loads(shown.out)
    assert (code, facts["prefix"], facts["tokens"]) == (0, "in the tokenizer", [5, 6])
    code, shown = oasis("export", tmp_path / "tuned model", "--out", tmp_path / "tuned", "--json")
    assert (code, json.loads(shown.out)["prefix"]) == (0, "a PEFT adapter")
    code, shown = oasis("export", tmp_path / "retrofitted", "--out", tmp_path / "nulls", "--json")
    facts = json.loads(shown.out)
    assert (code, facts["nulls"], facts["count"]) == (0, "a PEFT adapter", 2)
    for name, line in {
        "tokens": "tokenizer puts the tokens [5, 6] of the prefix before every text",
        "tuned": 'model = AutoModelForCausalLM.from_pretrained(f"{path}/base_model")',
        "nulls": "the first token of a text has position 2",
    }.items():
        assert line in (tmp_path / name / "README.md").read_text()
    card = (tmp_path / "nulls" / "base_model" / "README.md").read_text()
    assert "llama with 2 nulls: this is its base model." in card
    run = [sys.executable, "-c", READER, str(tmp_path), TEXT]
    subprocess.run(run, check=True, capture_output=True, text=True, timeout=300)
    found = torch.load(tmp_path / "logits.pt")
    want = {"file": logits_of(model), "tokens": logits_of(prefixed), "tuned": logits_of(tuned)}
    want["nulls"] = logits_of(retrofitted)
    for name, logits in want.items():
        got = found[name][:, -logits.shape[1] :]
        torch.testing.assert_close(got, logits, rtol=0, atol=2e-5, msg=name)
    assert not any(torch.allclose(want["file"], want[x], atol=1e-2) for x in ("tuned", "nulls"))
    code, shown = oasis("diagnose", tmp_path / "nulls")
    assert (code, "is a PEFT adapter, which this library does not apply" in shown.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "Q4_0"),
        ({"weight.bits": 3, "weight.group_size": 16 * 2}, "Q4_0"),
        (
            {
                "weight.granularity": "channel",
                "weight.group_size": None,
                "head": True,
                "rotation": "folded",
            },
            "Q4_0",
        ),
        ({"weight.bits": 8, "weight.group_size": 64}, "Q8_0"),
    ],
)
def test_a_quantized_model_keeps_its_codes(oasis, model, tmp_path, options, kind):
    scheme = get_scheme("w4a16").with_options(options)
    if scheme.weight.group_size == 64:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**model.config.to_dict() | {"intermediate_size": 128})
        ).eval()
    quantized = quantize(model, scheme)
    save(quantized, tmp_path / "q")
    code, shown = oasis("export", tmp_path / "q", "--out", tmp_path / "m.gguf", "--json")
    facts = json.loads(shown.out)
    assert (code, facts["weights"].upper()) == (0, kind)
    layers = 14 + scheme.head
    assert facts["tensors"] == {"F16": 1, kind: layers, "F32": 5}
    loaded, _ = read_gguf(tmp_path / "m.gguf")
    expected = load_model(tmp_path / "q")[0]
    for name, layer in expected.named_modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.copy_(layer.weight_scale.half().float())
            want = layer.decode(quantized.get_submodule(name).codes(), torch.float32)
            assert torch.equal(loaded.get_parameter(f"{name}.weight"), want), name
            layer.weight.data = want
    embedding = expected.get_input_embeddings().weight
    embedding.data = embedding.data.half().float()
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=0, atol=2e-5)
    assert oasis("export", tmp_path / "q", "--out", tmp_path / "n.gguf", "--weights", "f16")[0] == 2
    assert not (tmp_path / "n.gguf").exists()


def test_a_folder_without_prefix(oasis, model, tmp_path):
    save(model, tmp_path / "plain")
    words = ("--weights", "bfloat16", "--out", tmp_path / "out")
    code, shown = oasis("export", tmp_path / "plain", *words)
    assert code == 0
    assert "none" in shown.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT) == byte_level()(TEXT)


@torch.no_grad()
def of_one_query_head(model):
    converted = with_two_nulls(model)
    converted.model.layers[1].null_value[3] += 1.0
    return converted


@pytest.mark.parametrize(
    "words",
    [
        ("diagnose", "served", "--corpus", "pydoc"),
        ("quantize", "served", "--scheme", "w8a8-dynamic", "--simulate", "--out", "out"),
        ("prefix", "served", "--out", "out"),
        ("doctor", "served", "--out", "out"),
        ("convert", "served", "--null-from-sink", "--out", "out"),
        ("train", "--from", "served", "--corpus", "pydoc", "--steps", "1", "--out", "out"),
    ],
    ids=lambda words: words[0],
)
def test_windows_without_the_prefix_of_the_tokenizer_are_refused(
    oasis, model, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    save(with_prefix(model, compute_prefix(model, [5, 6])), tmp_path / "prefixed")
    assert oasis("export", "prefixed", "--out", "served")[0] == 0
    code, (_, err) = oasis(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "the tokenizer of 'served' has the prefix [5, 6]" in err
    assert not (tmp_path / "out").exists()


def test_diagnose_refuses_text_but_not_tokens_with_such_a_tokenizer(oasis, model, tmp_path):
    save(with_prefix(model, compute_prefix(model, [5, 6])), tmp_path / "prefixed")
    assert oasis("export", tmp_path / "prefixed", "--out", tmp_path / "served")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served")
    with pytest.raises(UserError, match=r"^tokenizer: it has the prefix \[5, 6\]"):
        diagnose(model, TEXT, tokenizer=tokenizer)
    assert diagnose(model, [list(range(1, 9))], tokenizer=tokenizer).data.windows == 1


def test_what_a_format_cannot_hold_is_one_line_and_writes_nothing(oasis, model, tmp_path):
    for name, each in {
        "prefixed": with_prefix(model, compute_prefix(model, [5, 6])),
        "int8": quantize(model, "w8a8-dynamic"),
        "rotated": quantize(model, get_scheme("w4a16").with_options({"rotation": "inputs"})),
        "groups": quantize(model, get_scheme("w4a16").with_options({"weight.group_size": 16})),
        "floats": quantize(model, get_scheme("fp8-dynamic").with_options({"activation": None})),
        "oasis": tiny_model(),
        "kv_null": convert(model, "kv_null"),
        "null of a query head": of_one_query_head(model),
    }.items():
        save(each, tmp_path / name)
    (tmp_path / "old.gguf").write_bytes(b"")
    before = sorted(path.name for path in tmp_path.iterdir())
    save(model, tmp_path / "broken")
    config = tmp_path / "broken" / "config.json"
    stored = {"quant_method": "oasis", "scheme": {}, "targets": [], "transforms": {}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": stored}))
    before.append("broken")
    for words, message in {
        ("broken", "m.gguf"): "quantization_config: KeyError",
        ("prefixed", "m.gguf"): "it has a prefix, which a GGUF file cannot hold",
        ("int8", "m.gguf"): "cannot hold 'w8a8-dynamic': it quantizes activations",
        ("int8", "out"): "quantized in the format of this library",
        ("rotated", "m.gguf"): "it transforms the inputs of layers",
        ("groups", "m.gguf"): "groups of 16 are not multiples of 32",
        ("floats", "m.gguf"): "its codes are floating-point numbers",
        ("oasis", "m.gguf"): "no GGUF architecture computes what an OASIS model does",
        ("oasis", "out"): "an OASIS model needs this library; --with-code writes its code",
        ("kv_null", "out"): "and that of a prefix is 0",
        ("null of a query head", "out"): "null_value: layer 1 has different nulls in query heads",
        ("oasis", "m.gguf", "--with-code"): "a GGUF file holds no code",
        ("int8", "out", "--with-code"): "which needs no code",
        ("prefixed", "m.gguf", "--weights", "q8"): "did you mean 'q8_0'",
        ("prefixed", "out", "--weights", "q8_0"): "'q8_0' is not one of auto, float32",
        ("prefixed", "m.bin", "--format", "gguf"): "does not end in .gguf",
        ("prefixed", "old.gguf"): "exists; give a new file",
        ("prefixed", "out", "--format", "guf"): "did you mean 'gguf'",
        ("absent", "out"): "does not exist",
    }.items():
        code, shown = oasis("export", tmp_path / words[0], "--out", tmp_path / words[1], *words[2:])
        assert code == 2, words
        assert message in shown.err.splitlines()[-1], words
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)
