"""Teach transformers' registries about us when they are first imported, and not before.

`import oasis_attn` stays cheap, and yet `AutoModelForCausalLM` knows our checkpoints, quantised
ones among them, whichever of the two libraries was imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_REGISTERS = {
    "transformers.models.auto.configuration_auto": ("oasis_attn.modeling.configuration",),
    "transformers.models.auto.modeling_auto": (
        "oasis_attn.modeling.model",
        "transformers.modeling_layers",  # which may be what imports this, and be half there
    ),
    "transformers.modeling_layers": ("oasis_attn.modeling.task_heads",),
    "transformers.quantizers.auto": ("oasis_attn.quantization.hf_quantizer",),
}


class _Registrar(MetaPathFinder, Loader):
    """Finds one module by the usual means, and imports ours once it has been executed."""

    def __init__(self, theirs: str, ours: tuple[str, ...]):
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _import(self.ours)


def register() -> None:
    """Register now what transformers has already imported, and the rest when it is."""
    for theirs, ours in _REGISTERS.items():
        if theirs in sys.modules:
            _import(ours)
        else:
            sys.meta_path.insert(0, _Registrar(theirs, ours))


def _import(modules: tuple[str, ...]) -> None:
    for name in modules:
        import_module(name)
