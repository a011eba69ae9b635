"""A quantised model on disk: `save_pretrained` writes it, `from_pretrained` restores it.

The folder is an ordinary checkpoint.  Weights are whole numbers, one byte each at any width (no
kernel here reads packed ones), beside their scales and the static ranges; what is quantised stands
in the config, under `quantization_config` with `quant_method` "oasis".  transformers finds the
classes below in its registry; they import the rest of the room when they are used, for they are
registered while transformers itself is being imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from oasis_attn.errors import check_choice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "oasis"
CODES = "weight_codes"


@register_quantization_config(METHOD)
class SimulatedConfig(QuantizationConfigMixin):
    """What was done to a model.

    Args:
        scheme: `Scheme.to_dict()`.
        sites: names of all that is quantised.
        transforms: kind of what runs on linear layers' inputs, by layer.
        arithmetic: `simulated` in floating point, or `integer` by torchao's kernels.
    """

    def __init__(
        self,
        scheme: Mapping[str, Any],
        sites: Sequence[str],
        transforms: Mapping[str, str],
        arithmetic: str = "simulated",
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.scheme, self.sites, self.transforms = dict(scheme), list(sites), dict(transforms)
        self.arithmetic = arithmetic


@register_quantizer(METHOD)
class SimulatedQuantizer(HfQuantizer):
    """Takes a quantised model apart for disk, and puts it together again."""

    requires_calibration = True
    is_trainable = False
    quantization_config: SimulatedConfig

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors as they stand on disk."""
        from oasis_attn.quantization.linear import QuantizedLinear

        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                state.pop(f"{name}.weight", None)  # which integer arithmetic does without
                state[f"{name}.{CODES}"] = layer.codes()
        return state, {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **_kwargs: Any
    ) -> PreTrainedModel:
        """Lay out every module that the file has tensors for."""
        from oasis_attn.quantization.linear import QuantizedLinear, replace_linear, transform_input
        from oasis_attn.quantization.schemes import Scheme
        from oasis_attn.quantization.sites import add_quantizer
        from oasis_attn.quantization.transforms import Rotation, Scale

        scheme = Scheme.from_dict(self.quantization_config.scheme)
        precise = torch.promote_types(dtype or model.dtype, torch.float32)
        for name, kind in self.quantization_config.transforms.items():
            linear: Any = model.get_submodule(name)
            check_choice("quantization_config: transforms", kind, ("Rotation", "Scale"))
            width = linear.in_features
            with torch.device("cpu"):  # constants are made once and kept
                made = Rotation(width) if kind == "Rotation" else Scale(torch.ones(width))
            transform_input(linear, made.to(dtype or model.dtype))
        for site in self.quantization_config.sites:
            if ":" in site:
                add_quantizer(model, site, scheme).to(precise)
                continue
            layer = QuantizedLinear(model.get_submodule(site), scheme, site=site)  # type: ignore[arg-type]
            layer.lay_out(precise)
            layer.register_buffer(CODES, torch.empty(layer.shape, dtype=torch.int8, device="meta"))
            replace_linear(model, site, layer)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        from oasis_attn.quantization.linear import QuantizedLinear

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


def mark(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Let transformers save `model` as what `fields`, of a `SimulatedConfig`, say that it is."""
    # `OasisConfig` knows its own settings and no others: the family's config holds it there.
    text = model.config.get_text_config(decoder=True)
    if text is not model.config:
        vars(model.config).pop("quantization_config", None)
    text.quantization_config = SimulatedConfig(**fields)
    vars(model)["hf_quantizer"] = SimulatedQuantizer(text.quantization_config)


def quantization_of(model: PreTrainedModel) -> SimulatedConfig:
    """What `mark` left on `model`."""
    return model.config.get_text_config(decoder=True).quantization_config
