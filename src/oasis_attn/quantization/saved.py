"""A quantised model on disk: `save_pretrained` writes it, `from_pretrained` restores it.

The folder is an ordinary checkpoint.  Weights are whole numbers, one byte each at any width (no
kernel here reads packed ones), beside their scales and the static ranges, which keep the precision
that they were found in whatever the dtype of the model; what is quantised stands in the config,
under `quantization_config` with `quant_method` "oasis".  transformers finds the classes below in
its registry; they import the rest of the package when they are used, for they are registered while
transformers itself is being imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from oasis_attn.errors import UserError, check_choice
from oasis_attn.modeling.hf_quantizer import PrefixConfig, PrefixQuantizer, set_hf_quantizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "oasis"
CODES = "weight_codes"


@register_quantization_config(METHOD)
class SimulatedConfig(PrefixConfig):
    """What was done to a model.

    Args:
        scheme: `Scheme.to_dict()`.
        sites: names of all that is quantised.
        transforms: kind of what runs on linear layers' inputs, by layer.
        arithmetic: `simulated` in floating point, or `integer` by torchao's kernels.
        prefix: see `PrefixConfig`.
    """

    def __init__(
        self,
        scheme: Mapping[str, Any],
        sites: Sequence[str],
        transforms: Mapping[str, str],
        arithmetic: str = "simulated",
        prefix: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        super().__init__(prefix, quant_method)
        self.scheme, self.sites, self.transforms = dict(scheme), list(sites), dict(transforms)
        self.arithmetic = arithmetic

    def check(self) -> None:
        """As `PrefixConfig`'s."""
        from oasis_attn.quantization.schemes import Scheme

        super().check()
        Scheme.from_dict(self.scheme)
        if not all(isinstance(name, str) for name in [*self.sites, *self.transforms]):
            raise UserError("quantization_config: sites and transforms are not all names")
        check_choice("quantization_config: arithmetic", self.arithmetic, ("simulated", "integer"))


@register_quantizer(METHOD)
class SimulatedQuantizer(PrefixQuantizer):
    """Takes a quantised model apart for disk, and puts it together again."""

    is_trainable = False
    quantization_config: SimulatedConfig

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors as they are on disk.

        Raises:
            UserError: they would not give the function that the model computes now.
        """
        from oasis_attn.quantization.simulate import quantized_sites

        state, metadata = super().get_state_dict_and_metadata(model)
        if state is None:
            return state, metadata
        sites: dict[str, Any] = dict(quantized_sites(model))
        _check_unchanged(model, sites, self.quantization_config.sites)
        for name, site in sites.items():
            if ":" not in name:
                state.pop(f"{name}.weight", None)  # which integer arithmetic does without
                try:
                    state[f"{name}.{CODES}"] = site.codes()
                except UserError as error:
                    raise UserError(f"{name}.{error}") from error
        return state, metadata

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Grids are loaded in the precision that they were saved in."""
        exact = converter.target_patterns[0] in self._exact
        return None if exact else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Lay out every module that the file has tensors for."""
        from oasis_attn.quantization.casts import KeepsPrecision
        from oasis_attn.quantization.linear import QuantizedLinear, replace_linear, transform_input
        from oasis_attn.quantization.linearize import linearize
        from oasis_attn.quantization.schemes import Scheme
        from oasis_attn.quantization.sites import add_quantizer
        from oasis_attn.quantization.transforms import Rotation, Scale

        super()._process_model_before_weight_loading(model, **kwargs)
        config = self.quantization_config
        found = _places(model, [*config.sites, *config.transforms])
        config.sites = [found[site] for site in config.sites if site in found]
        config.transforms = {
            found[name]: kind for name, kind in config.transforms.items() if name in found
        }
        linearize(model, found.values())
        scheme = Scheme.from_dict(config.scheme)
        for name, kind in config.transforms.items():
            linear: Any = model.get_submodule(name)
            check_choice("quantization_config: transforms", kind, ("Rotation", "Scale"))
            width = linear.in_features
            with torch.device("cpu"):  # constants are made once and kept
                made = Rotation(width) if kind == "Rotation" else Scale(torch.ones(width))
            transform_input(linear, made.to(model.dtype))
        for site in config.sites:
            if ":" in site:
                add_quantizer(model, site, scheme)
                continue
            layer = QuantizedLinear(model.get_submodule(site), scheme, site=site)  # type: ignore[arg-type]
            layer.lay_out()
            replace_linear(model, site, layer)
        self._exact = {
            f"{name}.{kept}"
            for name, module in model.named_modules()
            if isinstance(module, KeepsPrecision)
            for kept in module.kept
        }
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from oasis_attn.quantization.linear import QuantizedLinear

        super()._process_model_after_weight_loading(model, **kwargs)
        dtype = model.dtype
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                codes: Any = layer._buffers.pop(CODES)
                layer.weight = torch.nn.Parameter(layer.decode(codes, dtype), False)
        mark(model, vars(self.quantization_config))
        if self.quantization_config.arithmetic == "integer":
            from oasis_attn.quantization.integers import to_integers

            to_integers(model)
        return model


def _places(model: PreTrainedModel, sites: Iterable[str]) -> dict[str, str]:
    """What each of `sites` is called in `model`, whose head may be another, or absent.

    Raises:
        UserError: it has no such module, and it is no output head that a model does without.
    """
    from oasis_attn.quantization.linearize import linear_names

    modules = {name for name, _ in model.named_modules()}.union(linear_names(model))
    base = f"{model.base_model_prefix}."
    places: dict[str, str] = {}
    for site in sites:
        name, colon, tensor = site.partition(":")
        for place in (name, name.removeprefix(base), base + name):
            if place in modules:
                places[site] = place + colon + tensor
                break
        else:
            if name.startswith(base) or model.get_output_embeddings() is not None:
                raise UserError(f"quantization_config: {site!r} is not in {type(model).__name__}")
    return places


def _check_unchanged(
    model: PreTrainedModel, sites: Mapping[str, Any], saved: Sequence[str]
) -> None:
    """Raise `UserError` if `model` is no longer the one that `mark` was told of."""
    from oasis_attn.quantization.casts import changed_by_cast
    from oasis_attn.quantization.linear import QuantizedLinear
    from oasis_attn.quantization.quantizers import StaticQuantizer

    different = sorted({*sites} ^ {*saved})
    if different:
        raise UserError(
            f"model: {different[0]} was replaced after quantising; make the change before it"
        )
    for name, module in model.named_modules():
        if isinstance(module, StaticQuantizer) and not module.enabled:
            raise UserError(f"model: {name} is switched off; switch it on to save the model")
        weight = getattr(module, "weight", None) if isinstance(module, QuantizedLinear) else None
        if weight is not None and weight.dtype != model.dtype:
            raise UserError(
                f"model: {name} is {weight.dtype} in a model of {model.dtype}; cast it to that"
            )
        if buffer := changed_by_cast(module):
            raise UserError(
                f"model: a cast changed {name}.{buffer}, which is not saved; save the model before"
                " the cast and load it with from_pretrained(..., dtype=...)"
            )
    for name, tensor in model.named_buffers():
        if "inv_freq" in name and tensor.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"model: it was cast to {tensor.dtype} before it was quantised, which rounded"
                f" {name}; load it with from_pretrained(..., dtype={tensor.dtype}) instead"
            )


def mark(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Let transformers save `model` as what `fields`, of a `SimulatedConfig`, say that it is."""
    from oasis_attn.modeling.prefix import prefix_of
    from oasis_attn.quantization.casts import guard_computed_buffers

    guard_computed_buffers(model)
    prefix = prefix_of(model)
    described = None if prefix is None else prefix.describe()
    config = SimulatedConfig(**(dict(fields) | {"prefix": described}))
    set_hf_quantizer(model, SimulatedQuantizer(config))


def quantization_of(model: PreTrainedModel) -> SimulatedConfig:
    """What `mark` left on `model`."""
    return model.config.get_text_config(decoder=True).quantization_config
