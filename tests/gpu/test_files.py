"""What users run on a GPU reads and writes files as on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu.on_device import (
    DEVICE,
    IDS,
    NEEDS_GPU,
    WINDOWS,
    both,
    close,
    load_windows,
    logits,
    native,
    ran_on,
    routed,
)
from oasis_attn.hub.gguf_export import write_gguf
from oasis_attn.hub.gguf_file import read_gguf
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import quantize, save_compressed_tensors, schemes
from oasis_attn.quantization.export_checkpoint import export_checkpoint
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.prefix_search import find_prefix, tune_prefix
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.quantization.remedies import REMEDIES
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.sensitivity import perplexity
from oasis_attn.records import ConversionRecord, processor
from oasis_attn.study.doctor import doctor
from oasis_attn.training import TrainingConfig, train
from tiny_models import tiny_config, word_tokenizer
from tokenizer_factories import byte_level

pytestmark = NEEDS_GPU


def test_a_null_from_a_sink_is_that_of_the_cpu(folder, text, tmp_path, oasis):
    saved = folder(native())
    options = ["--null-from-sink", "--nulls", 2, "--calibration", text]
    options += [part for name, value in WINDOWS.items() for part in (f"--{name}", value)]
    oasis("convert", saved, "--out", tmp_path / "device", *options)
    record = ConversionRecord.load(tmp_path / "device" / "record.json")
    assert record.environment.device == ran_on()
    converted, _ = load_model(tmp_path / "device", device=DEVICE)
    expected = perplexity(converted.to("cpu"), load_windows(text))
    assert record.metric("perplexity.windowed", "after").value == pytest.approx(expected, rel=1e-3)


def with_sink():
    """An OPT model with a massive activation at the first position: one prefix token takes it."""
    config = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("opt", **config)).eval()
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
        for layer in model.get_decoder().layers:
            layer.fc1.weight[0], layer.fc1.weight[0, 3], layer.fc1.bias[0] = 0, 1000, -4000
            layer.fc2.weight[:, 0] = 0
    return model


@pytest.mark.parametrize("method", ["greedy", "frequency"])
def test_a_prefix_is_found_tuned_and_stored(method, folder, text, tmp_path):
    model, moved = both(with_sink())
    tokens = find_prefix(moved, IDS[:2], method=method)
    assert len(tokens) == len(find_prefix(model, IDS[:2], method=method)) == 1
    expected, found = (with_prefix(each, compute_prefix(each, tokens)) for each in (model, moved))
    close(logits(found), logits(expected))
    tuned = tune_prefix(moved, compute_prefix(moved, tokens), IDS.split(2), steps=2)
    assert tuned.keys_LGPd.isfinite().all()
    saved, options = folder(model), {"calibration": text, "device": DEVICE, **WINDOWS}
    out = tmp_path / "prefixed"
    record = prefix_checkpoint(saved, out, method=method, tune_steps=1, **options)
    before, after = record.before_after("prefix.noise")
    assert after < before
    quantize_checkpoint(
        *(out, tmp_path / "small"),
        scheme="w8a8-static-linear",
        format="oasis",
        simulate=True,
        **options,
    )
    load_model(tmp_path / "small", device=DEVICE)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_prefix_is_exported(steps, folder, tmp_path):
    model = native().to(DEVICE)
    prefix = compute_prefix(model, [7, 8])
    if steps:
        prefix = tune_prefix(model, prefix, IDS.split(2), steps=steps)
    saved = folder(with_prefix(model, prefix))
    exported = export_checkpoint(saved, tmp_path / "out", format="transformers", device=DEVICE)
    assert exported["prefix"] == ("a PEFT adapter" if steps else "in the tokenizer")


@pytest.mark.parametrize("where", [DEVICE, "cpu"])
@pytest.mark.parametrize("variant", ["oasis", "vanilla"])
def test_training_in_bfloat16(where, variant, size, corpus, tmp_path):
    config = TrainingConfig(
        out=tmp_path / "run", variant=variant, size=size, corpus=corpus, steps=3, batch_size=2,
        block_length=32, vocab_size=300, bf16=True, save_every=2, log_every=1, eval_windows=2,
        device=where,
    )  # fmt: skip
    record = train(config, progress=False)
    assert record.environment.device == (ran_on() if where == DEVICE else processor())
    model, _ = load_model(tmp_path / "run", device=DEVICE)
    assert logits(model, IDS % 90).isfinite().all()


def test_the_doctor_tries_all_remedies(folder, text, tmp_path):
    result = doctor(
        folder(native()), tmp_path / "doctor", calibration=text, try_all=True, device=DEVICE,
        **WINDOWS,
    )  # fmt: skip
    record = result.record
    assert record.environment.device == ran_on()
    scheme = Scheme.from_dict(record.scheme)
    wanted = {"plain", *(each.name for each in REMEDIES if each.applies_to(scheme))}
    assert wanted <= {each.name for each in record.tries}
    failed = {each.name for each in record.tries if each.problem}
    assert failed <= {"prefix"}  # this model has no sink


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static-linear"])
def test_int8_kernels_compute_what_is_simulated(scheme, folder, text, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    saved, options = folder(native()), {"scheme": scheme, "calibration": text, **WINDOWS}
    values = []
    runs = [{"format": "oasis", "simulate": True}, {"format": "oasis"}]
    if scheme == "w8a8-dynamic":
        runs.append({"format": "torchao"})
    for index, run in enumerate(runs):
        out = tmp_path / str(index)
        record = quantize_checkpoint(saved, out, device=DEVICE, **options | run)
        values.append(record.metric("perplexity.windowed", "after").value)
    assert values[1:] == pytest.approx([values[0]] * (len(runs) - 1), rel=1e-2)


@pytest.mark.parametrize(
    "scheme", ["w8a8-static-linear", "w8a8-dynamic", "w4a16", "mxfp4", "mxfp8", "nvfp4"]
)
def test_compressed_tensors_from_the_device(scheme, folder, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    chosen = replace(schemes()[scheme], rounding="gptq")
    quantized = quantize(native().to(DEVICE), chosen, calibration=IDS.split(2))
    save_compressed_tensors(quantized, tmp_path / "folder")
    record = quantize_checkpoint(
        folder(native()), tmp_path / "out", scheme=chosen, calibration=text, device=DEVICE,
        **WINDOWS,
    )  # fmt: skip
    assert record.arithmetic == "compressed-tensors"
    before, after = record.before_after("perplexity.windowed")
    assert after == pytest.approx(before, rel=0.5)


def test_a_prefix_in_the_tokenizer_of_a_quantized_model(folder, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = native().to(DEVICE)
    record = quantize_checkpoint(
        folder(with_prefix(model, compute_prefix(model, [7, 8]))), tmp_path / "out",
        format="compressed-tensors", calibration=text, device=DEVICE, **WINDOWS,
    )  # fmt: skip
    before, after = record.before_after("perplexity.windowed")
    assert after == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("weights", ["f32", "q8_0", "q4_0"])
def test_gguf_files_from_the_device_are_those_of_the_cpu(weights, tmp_path):
    tokenizer = byte_level()
    for name, model in zip(("cpu", "device"), both(native(vocab_size=340)), strict=True):
        write_gguf(model, tokenizer, tmp_path / f"{name}.gguf", weights=weights)
    files = [(tmp_path / f"{name}.gguf").read_bytes() for name in ("cpu", "device")]
    assert files[0] == files[1]
    assert logits(read_gguf(tmp_path / "device.gguf")[0]).isfinite().all()


def test_codes_from_the_device_in_a_gguf_file(folder, tmp_path):
    saved = folder(native(vocab_size=340), byte_level())
    options = {"calibration": saved.parent / "text.txt", "evaluation_split": "train", **WINDOWS}
    options["calibration"].write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options["calibration"] = str(options["calibration"])
    small = tmp_path / "small"
    options |= {"format": "oasis", "simulate": True}
    quantize_checkpoint(saved, small, scheme="w4a16", device=DEVICE, **options)
    files = []
    for index, where in enumerate((DEVICE, "cpu")):
        out = tmp_path / f"{index}.gguf"
        assert export_checkpoint(small, out, device=where)["weights"] == "q4_0"
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_the_commands(folder, text, tmp_path, oasis):
    saved = folder(routed(head_dim=32, max_position_embeddings=256))
    windows = [part for name, value in WINDOWS.items() for part in (f"--{name}", value)]
    record = json.loads(oasis("diagnose", saved, "--corpus", text, *windows, "--json"))
    assert record["environment"]["device"] == ran_on()
    oasis("view", saved, "--text", "w3 w4 w5 w6 w7", "--out", tmp_path / "view.html")
    out = oasis(
        *("evaluate", saved, "--corpus", text, "--window", 192, "--kv-bits", 4, "--limit", 1),
        "--json",
    )
    assert json.loads(out)["environment"]["device"] == ran_on()
    options = ["--calibration", text, *windows, "--sensitivity", "kind", "--json"]
    out = oasis("quantize", saved, "--out", tmp_path / "small", "--simulate", *options)
    assert json.loads(out)["environment"]["device"] == ran_on()
    load_model(tmp_path / "small", device=DEVICE)


def test_models_are_converted_and_converted_back(folder, tmp_path, oasis):
    model = native()
    oasis("convert", folder(model), "--out", tmp_path / "oasis")
    oasis("convert", tmp_path / "oasis", "--out", tmp_path / "plain", "--to-vanilla")
    plain, _ = load_model(tmp_path / "plain", device=DEVICE)
    close(logits(plain), logits(model), atol=1e-4)
    null = routed("learned_sink")
    null.save_pretrained(tmp_path / "null")
    word_tokenizer().save_pretrained(tmp_path / "null")
    oasis("convert", tmp_path / "null", "--out", tmp_path / "sinks", "--to-sinks")
    sinks, _ = load_model(tmp_path / "sinks", device=DEVICE)
    close(logits(sinks), logits(null))
