"""Quantise a model by simulation: values go to a grid's levels, arithmetic stays in floats."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_choice
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer, fake_quantize
from oasis_attn.quantization.schemes import Scheme, schemes


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight lies on a grid and whose input is quantised on its way in.

    Args:
        linear: the layer it stands for; its bias is shared, its weight is read and left alone.
        scheme: grids and estimator.
        site: how error messages call the layer.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, site: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = fake_quantize(
            linear.weight.detach(), scheme.weight, estimator=scheme.estimator, site=f"{site}.weight"
        )
        self.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        self.input_quantizer: nn.Module = nn.Identity()
        if scheme.activation is not None and scheme.static:
            self.input_quantizer = StaticQuantizer(
                scheme.activation, estimator=scheme.estimator, site=f"{site}.input"
            )
        elif scheme.activation is not None:
            self.input_quantizer = DynamicQuantizer(scheme.activation, site=f"{site}.input")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(input), self.weight, self.bias)


def linear_sites(model: PreTrainedModel, *, head: bool = False) -> tuple[str, ...]:
    """Names of the layers that a scheme quantises unless told otherwise, in the model's order.

    Every `nn.Linear` but the gates on attention outputs (as in the literature), the projections of
    depth routers, and the output head; with `head`, that too.  Embeddings, norms, null logits, and
    expert weights that are no `nn.Linear` are never among them.
    """
    output = None if head else model.get_output_embeddings()
    return tuple(
        name
        for name, module in _linears(model).items()
        if module is not output and not name.endswith(".output_gate") and ".attn_res_" not in name
    )


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def quantized_sites(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of `model` by name."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, QuantizedLinear)}


def quantize(
    model: PreTrainedModel,
    scheme: str | Scheme = "w8a8-static-linear",
    *,
    calibration: Iterable[Tensor] | None = None,
    sites: Collection[str] | None = None,
) -> PreTrainedModel:
    """A quantised copy of `model`, in eval mode; `model` itself is left as it is.

    The copy holds its own quantised weights and shares every other tensor with `model`: train one,
    and the other changes.  A quantised head is untied from the embedding.

    Args:
        model: a transformers decoder, ours or any other.
        scheme: a name in `schemes()`, or a `Scheme`.
        calibration: batches of token ids, int64 [B, T], without padding (the literature takes 16);
            needed by a static scheme, refused by any other.  Ranges are those of inputs met with
            quantised weights and unquantised activations.
        sites: the exact names of the `nn.Linear` layers to quantise; default `linear_sites(model)`.

    Raises:
        UserError: unknown scheme or site, missing, unusable or needless calibration, a layer that
            no calibration token reached, weights or activations that are not finite.
    """
    if isinstance(scheme, str):
        check_choice("scheme", scheme, schemes())
        scheme = schemes()[scheme]
    if scheme.static and calibration is None:
        raise UserError(f"calibration: None given, but {scheme.name!r} needs batches of token ids")
    if not scheme.static and calibration is not None:
        raise UserError(f"calibration: given, but {scheme.name!r} takes each input's own range")
    names = _checked_sites(model, sites)

    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    head = twin.get_output_embeddings()
    for name in names:
        linear = twin.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear is head:
            twin.config.get_text_config().tie_word_embeddings = False
            twin.config.tie_word_embeddings = False
        twin.set_submodule(name, QuantizedLinear(linear, scheme, site=name))
    if calibration is not None:
        _calibrate(twin, calibration)
    twin.save_pretrained = _no_form_on_disk
    return twin


def _no_form_on_disk(*_args, **_kwargs) -> None:
    raise UserError(
        "save_pretrained: a simulated quantisation has no form on disk; save the original and its"
        " scheme's name"
    )


def _checked_sites(model: PreTrainedModel, sites: Collection[str] | None) -> tuple[str, ...]:
    if quantized_sites(model):
        raise UserError("model: it is quantised already; quantise the original instead")
    linears = _linears(model)
    for name in sites or ():
        check_choice("sites", name, linears)
    names = linear_sites(model) if sites is None else tuple(n for n in linears if n in set(sites))
    if not names:
        raise UserError(f"sites: they name no linear layer of {type(model).__name__}")
    return names


@torch.no_grad()
def _calibrate(model: PreTrainedModel, batches: Iterable[Tensor]) -> None:
    """Run the batches through `model` and fix the range of every static quantiser in it."""
    quantizers = [m for m in model.modules() if isinstance(m, StaticQuantizer)]
    vocabulary = model.config.get_text_config().vocab_size
    head = isinstance(model.get_output_embeddings(), QuantizedLinear)
    run = model if head else model.base_model
    with ExitStack() as stack:
        for quantizer in quantizers:
            stack.enter_context(quantizer.observing())
        seen = False
        for tokens_BT in batches:
            seen = True
            _check_tokens(tokens_BT, vocabulary)
            run(input_ids=tokens_BT.to(model.device), use_cache=False)
        if not seen:
            raise UserError("calibration: it holds no batch")


def _check_tokens(tokens_BT: Tensor, vocabulary: int) -> None:
    shape = tuple(tokens_BT.shape)
    if tokens_BT.dtype != torch.int64 or tokens_BT.ndim != 2 or not tokens_BT.numel():
        raise UserError(
            f"calibration: a batch is {tokens_BT.dtype} {shape}, not int64 [batch, tokens]"
        )
    low, high = int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"calibration: token ids {low} .. {high} are not all in 0 .. {vocabulary - 1}"
        )
