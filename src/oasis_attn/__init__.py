"""OASIS: attention with a null option, and depth routing that uses its probability.

The method is described in arXiv 2605.17887.

Public names are imported on first use, so that `import oasis_attn` stays cheap.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

from oasis_attn._registration import register, silence_noise

if TYPE_CHECKING:  # the names that `__getattr__` imports, for type checkers
    from oasis_attn import ops
    from oasis_attn.errors import UserError
    from oasis_attn.evaluation import evaluate
    from oasis_attn.hub.convert import convert
    from oasis_attn.measure import diagnose
    from oasis_attn.modeling.configuration_oasis import OasisConfig
    from oasis_attn.modeling.extensions import register_branch_norm, register_null_signal
    from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
    from oasis_attn.modeling.variants import variants
    from oasis_attn.ops.normalizers import register_token_normalizer
    from oasis_attn.quantization import quantize
    from oasis_attn.records import Record
    from oasis_attn.report.text_page import view

__version__ = metadata.version("oasis-attn")

_HOMES = {
    "OasisConfig": "oasis_attn.modeling.configuration_oasis",
    "OasisForCausalLM": "oasis_attn.modeling.modeling_oasis",
    "Record": "oasis_attn.records",
    "UserError": "oasis_attn.errors",
    "convert": "oasis_attn.hub.convert",
    "diagnose": "oasis_attn.measure",
    "evaluate": "oasis_attn.evaluation",
    "quantize": "oasis_attn.quantization",
    "register_branch_norm": "oasis_attn.modeling.extensions",
    "register_null_signal": "oasis_attn.modeling.extensions",
    "register_token_normalizer": "oasis_attn.ops.normalizers",
    "variants": "oasis_attn.modeling.variants",
    "view": "oasis_attn.report.text_page",
}

__all__ = [
    "OasisConfig",
    "OasisForCausalLM",
    "Record",
    "UserError",
    "__version__",
    "convert",
    "diagnose",
    "evaluate",
    "ops",
    "quantize",
    "register_branch_norm",
    "register_null_signal",
    "register_token_normalizer",
    "variants",
    "view",
]

if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str):
        if name == "ops":
            return import_module("oasis_attn.ops")
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


silence_noise()
register()
