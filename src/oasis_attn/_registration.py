"""Register the OASIS classes with transformers when transformers is imported, not earlier.

So `import oasis_attn` stays fast, and `AutoModelForCausalLM` can load OASIS checkpoints, including
quantized ones, in whichever order the two libraries are imported.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_NOISE = {  # logger: the start of messages that concern no user of this library
    # torchao tries to load its kernels for all GPUs, and lists those of other GPUs.
    "torchao": re.compile(r"Failed to load \S*torchao/_C\w*"),
    # torchao registers its enumerations in a way that torch no longer needs.
    "torch.utils._pytree": re.compile(r".* is an Enum subclass and is now natively supported"),
}
_MODULES_AFTER = {
    "transformers.models.auto.configuration_auto": ("oasis_attn.modeling.configuration_oasis",),
    "transformers.models.auto.modeling_auto": (
        "oasis_attn.modeling.modeling_oasis",
        "transformers.modeling_layers",  # it may be importing this module, and be incomplete
        "oasis_attn.hub.model_card",  # adds a function to `SAVE_HOOKS`
        "oasis_attn.hub.prefix",  # adds another
        "oasis_attn.hub.model_code",  # adds another
    ),
    "transformers.modeling_layers": ("oasis_attn.modeling.task_heads",),
    "transformers.quantizers.auto": ("oasis_attn.quantization.hf_quantizer",),
}


class _Registrar(MetaPathFinder, Loader):
    """Import hook for one module of transformers: imports our modules after it is executed."""

    def __init__(self, trigger: str, modules: tuple[str, ...]):
        self.trigger, self.modules = trigger, modules

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != self.trigger:
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
        _import(self.modules)


def silence_noise() -> None:
    """Hide the warnings of `_NOISE`, which importing torchao prints.

    transformers imports torchao, if it is installed, together with its first model class.
    """
    for name, pattern in _NOISE.items():
        logging.getLogger(name).addFilter(partial(_is_no_noise, pattern))


def _is_no_noise(pattern: re.Pattern[str], record: logging.LogRecord) -> bool:
    return pattern.match(record.getMessage()) is None


def register() -> None:
    """Register the OASIS classes, or install hooks that register them at the right import."""
    for trigger, modules in _MODULES_AFTER.items():
        if trigger in sys.modules:
            _import(modules)
        else:
            sys.meta_path.insert(0, _Registrar(trigger, modules))


def _import(modules: tuple[str, ...]) -> None:
    for name in modules:
        import_module(name)
