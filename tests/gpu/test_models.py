"""Models in the memory of a GPU compute what they compute on the CPU, up to rounding."""

from __future__ import annotations

import pytest
import torch

from gpu.on_device import (
    DEVICE,
    FAMILIES,
    IDS,
    NEEDS_GPU,
    VARIANTS,
    both,
    build,
    close,
    logits,
    native,
    ran_on,
    routed,
)
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.evaluation.likelihood import window_logits
from oasis_attn.hub.convert import convert
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import fingerprint
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.measure import diagnose
from oasis_attn.quantization import QuantizedCache, quantize, schemes
from oasis_attn.quantization.schemes import ROTATIONS, Scheme
from oasis_attn.quantization.sensitivity import perplexity, target_metrics
from oasis_attn.records import processor
from tiny_models import VOCABULARY, greedy, word_tokenizer

pytestmark = NEEDS_GPU


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
    fitted = scheme.rotation == "fitted"  # its steps amplify rounding
    assert errors[1] == pytest.approx(errors[0], rel=0.5 if fitted else 0.2, abs=1e-6)
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


def test_the_windows_of_nulls_may_be_on_the_device():
    model = native(initializer_range=0.2).to(DEVICE)
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    here, there = (null_from_sink(model, each, nulls=2) for each in (ids, ids.to(DEVICE)))
    assert here.tokens == there.tokens
    close(logits(there.model), logits(here.model))


def test_answers_are_generated_on_the_device():
    model = native(max_position_embeddings=512).to(DEVICE)
    record = evaluate(
        model, word_tokenizer(), tasks=("arith",), limit=2, max_new_tokens=4, repeats=2,
        temperature=0.7,
    )  # fmt: skip
    assert record.environment.device == ran_on()
