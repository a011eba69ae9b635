"""The base class of all OASIS models, which tells transformers what they support."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

from torch import nn
from transformers import Cache, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import ATTENTION, OasisConfig
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.hf_compat import can_set_experts_implementation
from oasis_attn.ops.torch_compat import allow_side_effects_in_checkpoints

SAVE_HOOKS: list[Callable[[PreTrainedModel, str | os.PathLike[str]], None]] = []
"""Functions that write further files: called with a model and the folder it was saved in.

The package `hub` appends its own, for the model card, the copy of a stored prefix and the code.  It
is above this package, which cannot import it; `oasis_attn._registration` does when transformers is
imported.
"""


class OasisPreTrainedModel(PreTrainedModel):
    """Class attributes for transformers, memory options, and saving with `SAVE_HOOKS`."""

    config_class = OasisConfig
    config: OasisConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "depth_cache", "layer_args"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def oasis_config(self) -> OasisConfig:
        """The configuration with the settings; in a model with a head, `config` itself."""
        return self.config

    @classmethod
    def from_pretrained(cls, *args: Any, tp_plan: Any = None, **kwargs: Any) -> Self:
        """See `PreTrainedModel.from_pretrained`; tensor parallelism is not supported.

        Raises:
            UserError: `tp_plan` is given: the null evidence psi is a mean over all heads.
        """
        if tp_plan is not None:
            raise UserError(
                f"tp_plan: {tp_plan!r} is not supported: it splits the attention heads, and the"
                " null evidence is a mean over all heads"
            )
        return super().from_pretrained(*args, **kwargs)

    def set_attn_implementation(
        self,
        attn_implementation: str | dict[Any, Any],
        allow_all_kernels: bool = False,  # noqa: ARG002
    ) -> None:
        """Raises `UserError` for every other attention: only this one has a null option."""
        _check_attention(attn_implementation)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """The same check at construction: `from_config` writes its argument to the config."""
        _check_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True: the experts are the family's own.  transformers would search this source file."""
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """Whether the family's own model supports it; if not, its experts are "eager"."""
        from transformers import MODEL_MAPPING  # not at import time: it imports this module

        family: Any = MODEL_MAPPING[type(self.config.get_text_config())]
        if not can_set_experts_implementation(family):
            raise UserError(
                f"experts_implementation: {family.__name__} does not support 'grouped_mm'"
            )
        return True

    def recompute_mixes(self, enabled: bool = True) -> None:
        """Recompute each depth mix, and the norm after it, in backward instead of storing them.

        A sublayer then stores no more than with a residual sum, and the backward pass reads the
        sources once more.  Outputs and gradients are unchanged.  It has an effect with residual
        `depth` only, and is not saved with the model.

        Args:
            enabled: False stores them again, as at the start.
        """
        for module in self.modules():
            if isinstance(module, DepthRouter):
                module.recompute = enabled

    def _activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers, without reentrant checkpointing: it loses depth-source gradients."""
        reentrant = (activation_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and self.oasis_config.residual != "sum":
            raise UserError(
                "use_reentrant: True is not supported, because it loses the gradients of the depth"
                " sources; use False"
            )
        if self.oasis_config.residual != "sum":
            # A layer passes its sources on through the depth cache.  torch.compile refuses such a
            # side effect in a checkpointed layer, because it does not repeat it in the backward
            # pass; the depth cache does not need it repeated.
            allow_side_effects_in_checkpoints()
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """See `PreTrainedModel.save_pretrained`; also saves a model card and the stored prefix."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self._run_save_hooks(save_directory)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        self._run_save_hooks(working_dir)  # transformers has written a model card of its own
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _run_save_hooks(self, folder: str | os.PathLike[str]) -> None:
        for write in SAVE_HOOKS:
            write(self, folder)


def _check_attention(implementation: str | dict[Any, Any] | None) -> None:
    if implementation != ATTENTION:
        raise UserError(
            f"attn_implementation: {implementation!r} has no null option; use {ATTENTION!r}"
        )


def check_cache(cache: Cache, layers: nn.ModuleList, batch: int) -> None:
    """Check that a cache was filled by this model and for this batch.

    Raises:
        UserError: it is not a transformers `Cache`, or its number of layers, width of keys or
            number of sequences is wrong.
    """
    if not isinstance(cache, Cache):
        raise UserError(f"past_key_values: {type(cache).__name__!r} is not a transformers Cache")
    found = len(getattr(cache, "layers", ()))
    if found not in (0, len(layers)):  # a dynamic cache may have no layers yet
        raise UserError(
            f"past_key_values: has {found} layers, but this model has {len(layers)}; it belongs to"
            " another model"
        )
    keys = getattr(cache.layers[0], "keys", None) if found else None
    if keys is None or keys.dim() != 4:
        return
    sequences, heads, _, width = keys.shape
    if sequences != batch:
        raise UserError(f"past_key_values: has {sequences} sequences, but the input has {batch}")
    projection = getattr(layers[0].self_attn, "k_proj", None)
    expected = getattr(projection, "out_features", heads * width)
    if heads * width != expected:
        raise UserError(
            f"past_key_values: has keys of {heads} heads x {width}, but this model has keys of"
            f" {expected} values in all; it belongs to another model"
        )
