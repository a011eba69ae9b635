"""transformers' own tests of its models, from its source distribution.

`make .venv/.transformers-tests` unpacks it.
"""

import importlib
import sys
import types
from pathlib import Path

UNPACKED = Path(sys.prefix, ".transformers-tests").is_file()  # what make leaves when all went well
_FOLDER = str(Path(sys.prefix, "transformers-tests"))
# What they import that the distribution leaves out: other tests, of export and of generation.
_LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def import_common(name):
    """`transformers_tests.<name>`; only where they are `UNPACKED`."""
    if _FOLDER not in sys.path:
        sys.path.append(_FOLDER)
    for path, contents in _LEFT_OUT.items():
        module = types.ModuleType(f"transformers_tests.{path}")
        vars(module).update(contents)
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module(f"transformers_tests.{name}")
