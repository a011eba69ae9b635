"""What users run, on a GPU: it works there, and gives the numbers of the CPU up to rounding."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.cli import main
from oasis_attn.data import load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.evaluation.likelihood import window_logits
from oasis_attn.hub.convert import convert
from oasis_attn.hub.gguf_export import write_gguf
from oasis_attn.hub.gguf_file import read_gguf
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import fingerprint
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.measure import diagnose
from oasis_attn.quantization import QuantizedCache, quantize, save_compressed_tensors, schemes
from oasis_attn.quantization.export_checkpoint import export_checkpoint
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.prefix_search import find_prefix, tune_prefix
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.quantization.remedies import REMEDIES
from oasis_attn.quantization.schemes import ROTATIONS, Scheme
from oasis_attn.quantization.sensitivity import perplexity, target_metrics
from oasis_attn.records import ConversionRecord, processor
from oasis_attn.study.doctor import doctor
from oasis_attn.training import TrainingConfig, train
from tiny_models import VOCABULARY, greedy, tiny_config, tiny_model, word_tokenizer
from tokenizer_factories import byte_level

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = {"num_hidden_layers": 2, "intermediate_size": 64, "initializer_range": 0.2}
FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "qwen3_moe")
VARIANTS = ("oasis", "kv_null", "official", "vanilla")
IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = {"window": 16, "windows": 3}


def native(family="llama", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **SIZES | changes)).eval()


def routed(variant="oasis", family="llama", **changes):
    return tiny_model(variant, text=tiny_config(family, **SIZES | changes))


def both(model):
    """The model, and a copy of it on the device."""
    return model, copy.deepcopy(model).to(DEVICE)


def build(name):
    """A model of a family, or a variant of this library."""
    if name in FAMILIES:
        return native(name)
    return routed(*reversed(name.split("/"))) if "/" in name else routed(name)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def close(found, expected, atol=1e-3):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@pytest.fixture
def folder(tmp_path):
    """`folder(model)` -> a folder with the model and a tokenizer."""

    def save(model, tokenizer=None):
        model.save_pretrained(tmp_path / "model")
        (tokenizer or word_tokenizer()).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def text(tmp_path):
    """A corpus folder with 400 words of `word_tokenizer` in each split."""
    (tmp_path / "text").mkdir()
    generator = torch.Generator().manual_seed(2)
    for split in ("train", "validation", "test"):
        ids = torch.randint(3, VOCABULARY, (400,), generator=generator).tolist()
        (tmp_path / "text" / f"{split}.txt").write_text(" ".join(f"w{token}" for token in ids))
    return str(tmp_path / "text")


@pytest.fixture
def oasis(monkeypatch, capsys):
    """`oasis(*words)` -> what the command prints on standard output."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["oasis", *map(str, words), "--device", DEVICE])
        code = main()
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def ran_on():
    """The device as records name it."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else processor()


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS, "gemma2/oasis"])
def test_a_diagnosis_is_that_of_the_cpu(name):
    model, moved = both(build(name))
    options = {"joint": name not in ("gpt2", "qwen3_moe"), "causal": "oasis" in name}
    expected, found = (diagnose(each, IDS, **options) for each in (model, moved))
    assert expected.environment.device == processor()
    assert found.environment.device == ran_on()
    values = {(m.name, m.where): m.value for m in expected.metrics}
    assert values.keys() == {(m.name, m.where) for m in found.metrics}
    for metric in found.metrics:
        value = values[metric.name, metric.where]
        assert metric.value == pytest.approx(value, rel=5e-3, abs=1e-4, nan_ok=True), metric
    assert found.tables.keys() == expected.tables.keys()
    assert fingerprint(moved) == fingerprint(model)


def quantizations():
    """Every scheme with GPTQ and each rotation that it can have."""
    for name, scheme in schemes().items():
        for rotation in ROTATIONS:
            try:
                changed = scheme.with_options({"rotation": rotation, "rounding": "gptq"})
            except UserError:  # only formats with groups have rotated groups
                continue
            yield pytest.param(changed, id=f"{name}-{rotation}")


def check_quantization(model, scheme: Scheme, tmp_path) -> None:
    model, moved = both(model)
    batches = IDS.split(2) if scheme.needs_calibration else None
    expected, found = (quantize(each, scheme, calibration=batches) for each in (model, moved))
    assert {x.device.type for x in found.state_dict().values()} == {torch.device(DEVICE).type}
    # A value half way between two codes may get the other one; with few bits that is a large step.
    bits = min(scheme.weight.bits, scheme.activation.bits if scheme.activation else 16)
    tolerance = {"rel": 0.02 if bits >= 8 else 0.25}
    assert perplexity(found, IDS) == pytest.approx(perplexity(expected, IDS), **tolerance)
    errors = [
        {m.where: m.value for m in target_metrics(each, [IDS]) if m.name.endswith("weight_error")}
        for each in (expected, found)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.2, abs=1e-6)
    found.save_pretrained(tmp_path / "saved")
    word_tokenizer().save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved", device=DEVICE)
    close(logits(again), logits(found), atol=1e-5)


@pytest.mark.parametrize("scheme", list(quantizations()))
def test_every_scheme_and_rotation_quantizes_as_on_the_cpu(scheme, tmp_path):
    check_quantization(native(), scheme, tmp_path)


@pytest.mark.parametrize("name", [*FAMILIES[1:], *VARIANTS])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w8a8-static-full", {"observer": "mse"}),
        ("w8a8-static-linear", {"smooth_alpha": 0.5, "observer": "percentile"}),
        ("w8a8-dynamic", {"rotation": "inputs", "rounding": "gptq", "head": True}),
    ],
)
def test_every_family_quantizes_as_on_the_cpu(name, scheme, options, tmp_path):
    check_quantization(build(name), schemes()[scheme].with_options(options), tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_cache_gives_the_logits_of_the_cpu(bits):
    ids = torch.randint(3, VOCABULARY, (2, 96), generator=torch.Generator().manual_seed(3))
    found = [
        window_logits(
            model, ids.to(model.device), None,
            lambda config: QuantizedCache(config, bits=bits, first=4, recent=8),
        ).detach().cpu()
        for model in both(routed(head_dim=32, max_position_embeddings=128))
    ]  # fmt: skip
    error = (found[1] - found[0]).abs()
    assert error.quantile(0.99) < 1e-3 * found[0].abs().max()
    model = routed(head_dim=32).to(DEVICE)
    cache = QuantizedCache(model.config, bits=bits, first=4, recent=0)
    assert greedy(model, IDS.to(DEVICE), past_key_values=cache).shape == (4, 30)


@torch.no_grad()
@pytest.mark.parametrize("name", [*VARIANTS, "gemma2/oasis", "qwen3/oasis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_the_depth_cache_follows_the_full_forward_pass(name, dtype):
    model = build(name).to(DEVICE, dtype)
    output = greedy(model, IDS.to(DEVICE))
    scores = model(input_ids=output, use_cache=False).logits[:, IDS.shape[1] - 1 : -1].float()
    scores[..., model.generation_config.eos_token_id] = -torch.inf  # not among the new tokens
    chosen = scores.gather(-1, output[:, IDS.shape[1] :, None])[..., 0]
    assert chosen.isfinite().all()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * chosen.abs().max()
    assert (scores.amax(-1) - chosen).max() <= tolerance


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_an_exact_conversion_on_the_device_changes_nothing(family):
    if family == "gpt2":
        with pytest.raises(UserError):
            convert(native(family).to(DEVICE))
        return
    model = native(family).to(DEVICE)
    converted = convert(model, "oasis", depth_block_size=2)
    close(logits(converted), logits(model), atol=1e-4)


def test_a_null_from_a_sink_is_that_of_the_cpu(folder, text, tmp_path, oasis):
    saved = folder(native())
    options = ["--null-from-sink", "--nulls", 2, "--calibration", text]
    options += [part for name, value in WINDOWS.items() for part in (f"--{name}", value)]
    oasis("convert", saved, tmp_path / "device", *options)
    record = ConversionRecord.load(tmp_path / "device" / "record.json")
    assert record.environment.device == ran_on()
    converted, _ = load_model(tmp_path / "device", device=DEVICE)
    expected = perplexity(converted.to("cpu"), load_windows(text))
    assert record.metric("perplexity.windowed", "after").value == pytest.approx(expected, rel=1e-3)


def test_the_windows_of_nulls_may_be_on_the_device():
    model = native(initializer_range=0.2).to(DEVICE)
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    here, there = (null_from_sink(model, each, nulls=2) for each in (ids, ids.to(DEVICE)))
    assert here.tokens == there.tokens
    close(logits(there.model), logits(here.model))


def load_windows(text):
    return read_windows(load_corpus(text, "test"), word_tokenizer(), **WINDOWS).ids_NT


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
        out, tmp_path / "small", scheme="w8a8-static-linear", simulate=True, **options
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
    for simulate in (True, False):
        out = tmp_path / str(simulate)
        record = quantize_checkpoint(saved, out, simulate=simulate, device=DEVICE, **options)
        values.append(record.metric("perplexity.windowed", "after").value)
    assert values[1] == pytest.approx(values[0], rel=1e-2)


@pytest.mark.parametrize(
    "scheme", ["w8a8-static-linear", "w8a8-dynamic", "w4a16", "mxfp4", "mxfp8", "nvfp4"]
)
def test_compressed_tensors_from_the_device(scheme, folder, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    chosen = replace(schemes()[scheme], rounding="gptq")
    quantized = quantize(native().to(DEVICE), chosen, calibration=IDS.split(2))
    save_compressed_tensors(quantized, tmp_path / "folder")
    record = quantize_checkpoint(
        folder(native()), tmp_path / "out", scheme=chosen, format="compressed-tensors",
        calibration=text, device=DEVICE, **WINDOWS,
    )  # fmt: skip
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
    quantize_checkpoint(saved, small, scheme="w4a16", simulate=True, device=DEVICE, **options)
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
    oasis("convert", folder(model), tmp_path / "oasis")
    oasis("convert", tmp_path / "oasis", tmp_path / "plain", "--to-vanilla")
    plain, _ = load_model(tmp_path / "plain", device=DEVICE)
    close(logits(plain), logits(model), atol=1e-4)
    null = routed("learned_sink")
    null.save_pretrained(tmp_path / "null")
    word_tokenizer().save_pretrained(tmp_path / "null")
    oasis("convert", tmp_path / "null", tmp_path / "sinks", "--to-sinks")
    sinks, _ = load_model(tmp_path / "sinks", device=DEVICE)
    close(logits(sinks), logits(null))


def test_answers_are_generated_on_the_device():
    model = native(max_position_embeddings=512).to(DEVICE)
    record = evaluate(
        model, word_tokenizer(), tasks=("arith",), limit=2, max_new_tokens=4, repeats=2,
        temperature=0.7,
    )  # fmt: skip
    assert record.environment.device == ran_on()
