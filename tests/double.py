"""float64 throughout: families compute norms and routers in float32, whatever they are given."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from tiny import VOCABULARY, cast, tiny_config

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


class Double(TorchFunctionMode):
    """While on, whoever asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        if func is torch.Tensor.to:
            args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {
            name: wide.get(value, value) if name == "dtype" else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def native_model(family, **changes):
    """A family's own model in float64, every weight off its start, norms and biases too."""
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2, **changes)
    return shaken(cast(AutoModelForCausalLM.from_config(text), torch.float64).eval())


@torch.no_grad()
def shaken(model):
    """`model` with gains, biases and sinks moved."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("key_norm"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def double_logits(model, ids=IDS):
    with Double():
        return model(ids).logits
