"""The command `oasis quantize`."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from full_disk import files_of_at_most
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import (
    linear_targets,
    options,
    quantize_checkpoint,
    quantized_modules,
    tensor_targets,
)
from oasis_attn.records import QuantizationRecord
from tiny_models import tiny_config, tiny_model

EXPORT, INT8 = ("--format", "compressed-tensors"), ("--format", "torchao")


@pytest.fixture
def model(tmp_path, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    with quiet():
        AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def shape(text):
    return "--calibration", text, "--window", 16, "--windows", 3


def test_simulated(oasis, model, shape, tmp_path):
    out = tmp_path / "out"
    code, shown = oasis(
        *("quantize", model, "--out", out, "--scheme", "w8a8-static-full", "--simulate", *shape),
        *(
            "--scheme-option",
            "weight.bits=6",
            "--ignore",
            "*.1.mlp.*",
            "--sensitivity",
            "kind",
            "--json",
        ),
    )
    assert code == 0
    record = QuantizationRecord.load(out / "record.json")
    printed = json.loads(shown.out)
    assert printed["kind"] == record.kind == "quantization"
    assert (printed["arithmetic"], printed["fallback"]) == ("simulated", record.fallback)
    assert "cannot hold the scheme: it quantizes linear layers only" in record.fallback
    loaded, _ = load_model(out)
    original, _ = load_model(model)
    every = {*linear_targets(original), *tensor_targets(original)}
    targets = {name for name in every if ".1.mlp." not in name}
    assert set(quantized_modules(loaded)) == set(record.targets) == targets
    assert record.scheme["weight"]["bits"] == 6
    assert record.calibration.split == "train"
    assert record.metric("size.bytes", "after").value > 0
    columns = record.tables["sensitivity"]
    assert columns["all_but"][0] == columns["only"][0]
    assert len(columns["group"]) == len(columns["only"])


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_reports_the_share_of_quantized_weights(oasis, kind, shape, tokenizer, tmp_path):
    with quiet():
        AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, shown = oasis(
        *("quantize", tmp_path / "model", "--out", tmp_path / "out", "--simulate", *shape),
        *("--ignore", "*.0.*c_attn") if kind == "gpt2" else (),
    )
    assert code == 0
    record = QuantizationRecord.load(tmp_path / "out" / "record.json")
    left = record.float_weights
    total = record["size.quantized_share"]
    if kind == "gpt2":
        assert left == {"transformer.h.0.attn.c_attn.weight": 32 * 96}
        assert total == 1 - 32 * 96 / (4 * 12 * 32 * 32)
    else:
        assert left == {f"model.layers.{i}.mlp.gate.weight": 4 * 32 for i in range(4)}
        experts, attention = 4 * 3 * 32 * 48, 2 * 32 * 32 + 2 * 16 * 32
        assert total == pytest.approx(1 - 4 * 32 / (experts + attention + 4 * 32))
    assert f"{total:.4f}" in shown.out
    assert ("mlp.gate.weight" if kind == "mixtral" else "c_attn.weight") in shown.out


def test_in_int8(oasis, model, shape, tmp_path):
    utils = pytest.importorskip("torchao.utils", reason="torchao is not installed")
    if utils.should_reduce_range(torch.device("cpu")):
        pytest.skip("this processor has no VNNI instructions")
    out = tmp_path / "out"
    code, shown = oasis("quantize", model, "--out", out, *shape, "--format", "oasis")
    assert code == 0
    assert "\nFormat: oasis\n" in shown.out
    for word in ("perplexity.windowed", "size.bytes", "speed.over_unquantized", "down_proj"):
        assert word in shown.out
    record = QuantizationRecord.load(out / "record.json")
    assert record.arithmetic == "int8"
    before, after = (record.metric("perplexity.windowed", w).value for w in ("before", "after"))
    assert after == pytest.approx(before, rel=0.01)
    loaded, tokenizer = load_model(out)
    ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, eos_token_id=-1).shape == (1, 6)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16", "fp8-static", "nvfp4"])
def test_in_the_format_compressed_tensors(scheme, oasis, model, shape, tmp_path):
    """By default, because the format holds all of these schemes and this model."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = tmp_path / "out"
    words = ("quantize", model, "--out", out, *shape, "--scheme", scheme)
    if scheme == "w4a16":
        words += ("--scheme-option", "weight.group_size=16", "--kv-cache", "fp8")
    if scheme == "nvfp4":
        words += EXPORT
        with files_of_at_most(3000):
            code, shown = oasis(*words)
        assert code == 2
        assert shown.err.endswith(f"oasis: --out: '{out}' cannot be written: File too large\n")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    code, shown = oasis(*words, "--ignore", "*.0.*")
    assert code == 0
    for bar in ("Applying", "Compressing", "Dispatching", "Decompressing"):
        assert bar not in shown.err
    assert "speed.over_unquantized" in shown.out
    assert "\nFormat: compressed-tensors\n" in shown.out
    assert shown.out.endswith(f"To serve it: vllm serve {out} --dtype bfloat16\n")
    record = QuantizationRecord.load(out / "record.json")
    assert (record.arithmetic, record.fallback) == ("compressed-tensors", "")
    assert record.scheme["fused_scales"] is (scheme == "nvfp4")
    assert record.kv_cache == ("fp8" if scheme == "w4a16" else "")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert sum(".0." in name for name in config["ignore"]) == 7
    assert bool(config["kv_cache_scheme"]) is bool(record.kv_cache)
    loaded, _ = load_model(out)
    assert not quantized_modules(loaded)
    card = (out / "README.md").read_text()
    assert "# needs: pip install compressed-tensors" in card
    assert "perplexity.windowed" in card
    assert ("Its key-value cache is in FP8" in card) is bool(record.kv_cache)
    printed = " ".join(shown.out.split())
    assert (", key-value cache in fp8 " in printed) is bool(record.kv_cache)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("variant", "compressed-tensors cannot hold the model: it is loaded without oasis_attn,"),
        ("prefix", "cannot hold the model: its prefix cannot become part of the tokenizer: it was"),
        ("library", "compressed-tensors is not installed: pip install 'oasis-attn[export]'"),
    ],
)
def test_falls_back_to_our_format(what, reason, oasis, model, shape, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    if what == "library":
        monkeypatch.setattr(options, "find_spec", lambda _name: None)
    elif what == "variant":
        tiny_model().save_pretrained(model)
    else:
        loaded, _ = load_model(model)
        tuned = replace(compute_prefix(loaded, [5]), tuned=True)
        with_prefix(loaded, tuned).save_pretrained(model)
    out = tmp_path / "out"
    words = ("quantize", model, "--out", out, "--scheme", "w4a8", *shape)
    with monkeypatch.context() as patch:
        patch.setattr(quantize_checkpoint, "quantize", pytest.fail)  # told before any work
        code, shown = oasis(*words)
    assert code == 2
    assert "'w4a8' can only be simulated: kernels multiply" in shown.err
    assert "add --simulate (simulate=True) for the format 'oasis', because " in shown.err
    assert reason in shown.err
    if what == "variant":
        code, shown = oasis(*words, "--simulate", "--kv-cache", "fp8")
        assert code == 2
        assert reason.replace("compressed-tensors cannot hold the", "cannot hold this") in shown.err
        assert not out.exists()
    code, shown = oasis(*words, "--simulate")
    assert code == 0
    record = QuantizationRecord.load(out / "record.json")
    assert record.arithmetic == "simulated"
    assert reason in record.fallback
    assert f"\nFormat: oasis, because {record.fallback}\n" in shown.out
    assert quantized_modules(load_model(out)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gguf"), "'gguf' is not one of auto, oasis, compressed-tensors, torchao"),
        ((*INT8, "--scheme", "w8a8-static-linear"), "use the scheme w8a8-dynamic, or another"),
        ((*INT8, "--simulate"), "--simulate: format 'torchao' computes with int8 kernels"),
        ((*EXPORT, "--scheme", "w8a8-static-full"), "cannot hold scheme 'w8a8-static-full'"),
        ((*EXPORT, "--scheme-option", "rotation=inputs"), "does not apply rotation 'inputs'"),
        (("--kv-cache", "int8"), "--kv-cache: 'int8' is not one of fp8"),
        (("--kv-cache", "fp8", *INT8), "--kv-cache: 'fp8' needs the format 'compressed-tensors'"),
        (("--kv-cache", "fp8", "--scheme", "w8a8-static-full"), "--kv-cache: 'fp8' cannot be"),
        (("--scheme", "w8a9"), "scheme: 'w8a9' is not one of"),
        (("--scheme", "w8a8"), "did you mean 'w8a8-static-full' or "),
        (("--scheme", "w8a8-static-full"), "because compressed-tensors cannot hold the scheme: it"),
        (("--format", "oasis", "--scheme", "w4a4"), "'w4a4' can only be simulated"),
        (
            ("--format", "oasis", "--scheme", "fp8-static"),
            "can only be simulated: kernels multiply integers only",
        ),
        (("--simulate", "--scheme-option", "weight.bit=3"), "did you mean 'weight.bits'"),
        (
            ("--simulate", "--scheme-option", "weight.bits=9"),
            "--scheme-option weight.bits: 9 is not",
        ),
        (("--simulate", "--scheme-option", "weight=0"), "weight: 0 is not a mapping with the"),
        (
            ("--simulate", "--scheme-option", "rotation"),
            "--scheme-option: 'rotation' is not NAME=VALUE",
        ),
        (("--simulate", "--ignore", "*.absent"), "ignore: '*.absent' matches none"),
        (("--simulate", "--sensitivity", "kinds"), "did you mean 'kind'"),
        (
            ("--simulate", "--scheme-option", "weight.symmetric=False"),
            "symmetric: 'False' is neither",
        ),
        (("--simulate", "--window", "65"), "window: 65 tokens are more than the model's 64"),
        (("--simulate", "--windows", "0"), "windows: 0"),
        (("--simulate", "--scheme-option", "smooth_alpha=2"), "--scheme-option smooth_alpha: 2"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    oasis, model, shape, tmp_path, arguments, message
):
    code, shown = oasis("quantize", model, "--out", tmp_path / "out", *shape, *arguments)
    assert code == 2
    assert message in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
