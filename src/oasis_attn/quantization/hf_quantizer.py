"""Saving and loading of quantized models through transformers' `HfQuantizer` interface.

A saved model is an ordinary checkpoint folder.  Weights are stored as codes, one byte per
weight at any bit width (no kernel here reads packed codes), together with their scales and the
static ranges.  Scales and ranges keep the dtype in which they were computed, whatever the dtype of
the model is.  The `quantization_config` in `config.json`, with `quant_method` "oasis", describes
what is quantized.

transformers finds the classes below in its registry.  They are registered while transformers itself
is being imported, so they import the rest of this package only when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from oasis_attn.errors import UserError, check_choice
from oasis_attn.hub.prefix_storage import PrefixConfig, PrefixHfQuantizer, set_hf_quantizer
from oasis_attn.modeling.hf_compat import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "oasis"
CODES = "weight_codes"
ARITHMETICS = ("simulated", "int8")


@register_quantization_config(METHOD)
class OasisQuantizationConfig(PrefixConfig):
    """The `quantization_config` of a quantized model.

    Args:
        scheme: `Scheme.to_dict()`.
        targets: names of everything that is quantized.
        transforms: class names of the input transforms, by linear layer.
        arithmetic: `simulated` (floating point) or `int8` (torchao's kernels).
        prefix: see `PrefixConfig`.

    Raises:
        UserError: by `from_dict`, if a field has the wrong form.
    """

    def __init__(
        self,
        scheme: Mapping[str, Any],
        targets: Sequence[str],
        transforms: Mapping[str, str],
        arithmetic: str = "simulated",
        prefix: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        super().__init__(prefix, quant_method)
        self.scheme, self.targets, self.transforms = dict(scheme), list(targets), dict(transforms)
        self.arithmetic = arithmetic

    @property
    def described_scheme(self) -> str:
        """The name of the scheme and its changed options."""
        from oasis_attn.quantization.remedies import described
        from oasis_attn.quantization.schemes import Scheme

        return described(Scheme.from_dict(self.scheme))

    def check(self) -> None:
        """Raise an error if a field has the wrong form."""
        from oasis_attn.quantization.schemes import Scheme

        super().check()
        Scheme.from_dict(self.scheme)
        if not all(isinstance(name, str) for name in [*self.targets, *self.transforms]):
            raise UserError("quantization_config: targets and transforms must be names")
        check_choice("quantization_config: arithmetic", self.arithmetic, ARITHMETICS)


@register_quantizer(METHOD)
class OasisHfQuantizer(PrefixHfQuantizer):
    """Converts a quantized model to the tensors of its checkpoint, and back."""

    is_trainable = False
    quantization_config: OasisQuantizationConfig

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save.

        Raises:
            UserError: a model loaded from these tensors would not compute what `model` computes.
        """
        from oasis_attn.quantization.simulate import quantized_modules

        state, metadata = super().get_state_dict_and_metadata(model)
        if state is None:
            return state, metadata
        modules: dict[str, Any] = dict(quantized_modules(model))
        check_unchanged(model, modules, self.quantization_config.targets)
        for name, module in modules.items():
            if ":" not in name:
                del state[f"{name}.weight"]
                state[f"{name}.{CODES}"] = codes_of(module, name)
        return state, metadata

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Load quantization parameters in the dtype in which they were saved."""
        fixed = converter.target_patterns[0] in self._fixed_buffers
        return None if fixed else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Create every module that the checkpoint has tensors for."""
        from oasis_attn.quantization.casts import FixedPrecisionModule
        from oasis_attn.quantization.linear import QuantizedLinear, replace_linear, transform_input
        from oasis_attn.quantization.linearize import linearize
        from oasis_attn.quantization.schemes import Scheme
        from oasis_attn.quantization.targets import add_quantizer
        from oasis_attn.quantization.transforms import Dense, Rotation, Scale

        super()._process_model_before_weight_loading(model, **kwargs)
        config = self.quantization_config
        found = _names_in(model, [*config.targets, *config.transforms])
        config.targets = [found[name] for name in config.targets if name in found]
        config.transforms = {
            found[name]: kind for name, kind in config.transforms.items() if name in found
        }
        linearize(model, found.values())
        scheme = Scheme.from_dict(config.scheme)
        makers: dict[str, Callable[[int], torch.nn.Module]] = {
            "Rotation": lambda width: Rotation(scheme.rotated_together or width),
            "Scale": lambda width: Scale(torch.ones(width)),
            "Dense": lambda width: Dense(torch.empty(width, width)),
        }
        for name, kind in config.transforms.items():
            linear: Any = model.get_submodule(name)
            check_choice("quantization_config: transforms", kind, makers)
            with torch.device("cpu"):  # Hadamard matrices are cached, so they need real memory
                transform = makers[kind](linear.in_features)
            transform_input(linear, transform.to(model.dtype))
        for name in config.targets:
            if ":" in name:
                add_quantizer(model, name, scheme)
                continue
            layer = QuantizedLinear(model.get_submodule(name), scheme, name=name)  # type: ignore[arg-type]
            layer.allocate_codes()
            replace_linear(model, name, layer)
        # Blocks that share weights (Zamba) have their own codes, so these weights are not tied.
        weights = {f"{name}.weight" for name in config.targets}
        for target, source in [*model.all_tied_weights_keys.items()]:
            if not weights.isdisjoint((target, source)):
                del model.all_tied_weights_keys[target]
        self._fixed_buffers = {
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, FixedPrecisionModule)
            for buffer in module.fixed_buffers
        }
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Decode the weights, and switch to int8 arithmetic if the model was saved with it."""
        from oasis_attn.quantization.linear import QuantizedLinear

        super()._process_model_after_weight_loading(model, **kwargs)
        dtype = model.dtype
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                codes: Any = getattr(layer, CODES)
                delattr(layer, CODES)
                layer.weight = torch.nn.Parameter(layer.decode(codes, dtype), False)
        set_quantization_config(model, vars(self.quantization_config))
        if self.quantization_config.arithmetic == "int8":
            from oasis_attn.quantization.int8 import to_int8

            to_int8(model)
        return model


def _names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map the saved names to those in `model`, which may have another head, or none.

    The names of an output head that the model lacks are left out.

    Raises:
        UserError: the model lacks another module.
    """
    from oasis_attn.quantization.linearize import linear_names

    modules = {name for name, _ in model.named_modules()}.union(linear_names(model))
    base = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for saved in names:
        module, colon, tensor = saved.partition(":")
        for name in (module, module.removeprefix(base), base + module):
            if name in modules:
                found[saved] = name + colon + tensor
                break
        else:
            if module.startswith(base) or model.get_output_embeddings() is not None:
                raise UserError(f"quantization_config: {saved!r} is not in {type(model).__name__}")
    return found


def codes_of(layer: Any, name: str) -> Tensor:
    """`layer.codes()`; the error of a changed weight says that it is in the layer `name`."""
    try:
        codes: Tensor = layer.codes()
    except UserError as error:
        raise UserError(f"{name}.{error}") from error
    return codes


def check_unchanged(
    model: PreTrainedModel, modules: Mapping[str, Any], targets: Sequence[str]
) -> None:
    """Raise `UserError` if `model` no longer matches its `quantization_config`."""
    from oasis_attn.quantization.casts import changed_by_cast
    from oasis_attn.quantization.linear import QuantizedLinear
    from oasis_attn.quantization.quantizers import StaticQuantizer

    different = sorted({*modules} ^ {*targets})
    if different:
        raise UserError(
            f"model: {different[0]} was replaced after quantizing; replace it before quantizing"
        )
    for name, module in model.named_modules():
        if isinstance(module, StaticQuantizer) and not module.enabled:
            raise UserError(f"model: {name} is disabled; enable it to save the model")
        if isinstance(module, QuantizedLinear) and module.weight.dtype != model.dtype:
            raise UserError(
                f"model: {name} is {module.weight.dtype} in a model of {model.dtype}; cast it to"
                " that"
            )
        if buffer := changed_by_cast(module):
            raise UserError(
                f"model: a cast changed {name}.{buffer}, which is not saved; save the model before"
                " the cast and load it with from_pretrained(..., dtype=...)"
            )
    for name, tensor in model.named_buffers():
        if "inv_freq" in name and tensor.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"model: it was cast to {tensor.dtype} before it was quantized, which rounded"
                f" {name}; load it with from_pretrained(..., dtype={tensor.dtype}) instead"
            )


def set_quantization_config(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Set the `quantization_config` of `model`, so that transformers saves it as quantized.

    `fields` are the arguments of `OasisQuantizationConfig`; the prefix is taken from the model.
    """
    from oasis_attn.hub.prefix import prefix_of
    from oasis_attn.quantization.casts import guard_computed_buffers

    guard_computed_buffers(model)
    prefix = prefix_of(model)
    described = None if prefix is None else prefix.describe()
    config = OasisQuantizationConfig(**(dict(fields) | {"prefix": described}))
    set_hf_quantizer(model, OasisHfQuantizer(config))


def get_quantization_config(model: PreTrainedModel) -> OasisQuantizationConfig:
    """The `quantization_config` that `set_quantization_config` set."""
    return model.config.get_text_config(decoder=True).quantization_config
