"""OASIS: attention with a null option, and depth routing that listens to it (arXiv 2605.17887).

Public names are imported on first use, so that `import oasis_attn` stays cheap.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from oasis_attn._registration import register

__version__ = metadata.version("oasis-attn")

_HOMES = {
    "OasisConfig": "oasis_attn.modeling.configuration",
    "OasisForCausalLM": "oasis_attn.modeling.model",
    "Record": "oasis_attn.records",
    "UserError": "oasis_attn.errors",
    "convert": "oasis_attn.modeling.convert",
    "diagnose": "oasis_attn.measure",
    "evaluate": "oasis_attn.evaluation",
    "quantize": "oasis_attn.quantization",
    "variants": "oasis_attn.modeling.variants",
}

__all__ = ["__version__", "ops", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("oasis_attn.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
