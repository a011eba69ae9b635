"""Replace experts and other layers of transformers by `nn.Linear`, so that every scheme applies.

transformers stores the weights of all experts of a mixture in one parameter, and GPT-2's layers as
`Conv1D`, [in, out].  A quantized model has linear layers instead: the module `<experts>.<index>`
contains the layers of one expert, with the names of the original parameters.  The linear layers
share the storage of the original weights.

Axes: N tokens, K experts chosen per token, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.modeling.hf_compat import experts_gate


class Expert(nn.Module):
    """The linear layers of one expert, in the order in which they are applied."""

    def forward(self, x_ND: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        first, second = self.children()
        return cast(Tensor, second(activation(first(x_ND))))


def linear_names(model: nn.Module) -> Iterator[str]:
    """The names of all linear layers of a model, as they are after `linearize`.

    Mamba's `dt_proj` is not included: the model uses its weight without calling the layer, so its
    input cannot be quantized.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            if not name.endswith(".dt_proj"):
                yield name
        else:
            yield from (f"{name}{part}" for part in _parts(module))


def linearize(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Replace every module that contains one of `names` by `nn.Linear` layers, in place.

    The model computes the same function.  All experts of a layer are replaced together.
    """
    wanted = set(names)
    for name, module in list(model.named_modules()):
        if wanted.isdisjoint(f"{name}{part}" for part in _parts(module)):
            continue
        layer: Any = module
        if _is(layer, "Conv1D"):
            model.set_submodule(name, _linear(layer.weight, layer.weight.detach().T, layer.bias))
        elif _is(layer, "FalconLinear"):
            model.set_submodule(name, _linear(layer.weight, layer.weight.detach(), layer.bias))
        elif _is(layer, "Llama4TextExperts"):
            model.set_submodule(name, SortedExperts(layer))
        else:
            model.set_submodule(name, LinearExperts(layer))


def expert_of(model: nn.Module, name: str) -> tuple[str, str] | None:
    """For the linear layer of an expert: the name of the experts module and of the layer in it.

    None for any other layer.
    """
    parent, _, layer = name.rpartition(".")
    if isinstance(model.get_submodule(parent), Expert):
        return parent.rpartition(".")[0], layer
    return None


class LinearExperts(nn.Module):
    """Experts of a mixture as one `Expert` module each; computes the same as transformers.

    Args:
        packed: an experts module decorated with `use_experts_implementation`; its weights are moved
            to this module.
    """

    num_experts: int
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, packed: Any) -> None:
        super().__init__()
        # Copy the attributes and submodules that the family's activation and norm use.
        vars(self).update({k: v for k, v in vars(packed).items() if not k.startswith("_")})
        for name, child in packed.named_children():
            self.add_module(name, child)
        self.gate = experts_gate(packed)
        _unpack(packed, self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes `[N, D]`, `[N, K]` and `[N, K]`; an index of E or more means no expert."""
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out_NKD = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=dtype)
        for index in range(self.num_experts):
            token, choice = (top_k_index == index).nonzero(as_tuple=True)
            if len(token):
                y = self.get_submodule(str(index))(hidden_states[token], self._activation)
                if self.has_post_expert_norm:
                    y = self.post_expert_norm(y)
                out_NKD[token, choice] = y * top_k_weights[token, choice, None]
        return out_NKD.sum(1).to(hidden_states.dtype)

    def _activation(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.gate(self, x) if self.has_gate else self.act_fn(x))


class SortedExperts(nn.Module):
    """Llama 4's experts.  Each one has its own rows of the input; rows of other tokens are zero."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.act_fn, self.training = experts.act_fn, experts.training
        _unpack(experts, self)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        experts = [module for module in self.children() if isinstance(module, Expert)]
        hidden_END = hidden_ND.reshape(len(experts), -1, hidden_ND.shape[-1])
        out_END = torch.zeros_like(hidden_END)
        for index, expert in enumerate(experts):
            (token,) = hidden_END[index].any(-1).nonzero(as_tuple=True)
            if len(token):
                out_END[index, token] = expert(hidden_END[index, token], self._activation)
        return out_END.flatten(0, 1)

    def _activation(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)


def _parts(module: nn.Module) -> list[str]:
    """The suffixes that, with the module's name, form the names of the linear layers in it."""
    if _is(module, "Conv1D") or _is(module, "FalconLinear"):
        return [""]
    names = _projections(module)
    count = len(getattr(module, names[0])) if names else 0
    return [f".{index}.{name}" for index in range(count) for name in names]


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters with all experts' weights, in the order of their use."""
    # `use_experts_implementation` sets these attributes on experts modules.
    known = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    known = known or _is(module, "Llama4TextExperts")
    if not known or not isinstance(getattr(module, "down_proj", None), nn.Parameter):
        return ()
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module has a class of transformers; checked by name, because imports are slow."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith("transformers.")


def _unpack(packed: Any, target: nn.Module) -> None:
    """Move the experts' weights from parameters of `packed` to linear layers of `target`."""
    transposed = getattr(packed, "is_transposed", True)
    weights, biases = {}, {}
    for name in _projections(packed):
        weights[name], biases[name] = getattr(packed, name), getattr(packed, f"{name}_bias", None)
        delattr(packed, name)
        if biases[name] is not None:
            delattr(packed, f"{name}_bias")
    for index in range(len(weights["down_proj"])):
        expert = Expert()
        for name, weight in weights.items():
            own, bias = weight.detach()[index], biases[name]
            if bias is not None:
                bias = nn.Parameter(bias.detach()[index], bias.requires_grad)
            expert.add_module(name, _linear(weight, own.T if transposed else own, bias))
        target.add_module(str(index), expert.train(packed.training))


def _linear(source: nn.Parameter, weight_OI: Tensor, bias_O: nn.Parameter | None) -> nn.Linear:
    """A linear layer with the weight `weight_OI`, which is a view of the parameter `source`."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight_OI, source.requires_grad), bias_O  # type: ignore[assignment]
    return linear
