"""Every private or unstable name of a dependency is where we expect it, and used in one place only.

A test that fails here names what a release of a library has removed or changed.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

import oasis_attn
from oasis_attn._registration import _MODULES_AFTER
from oasis_attn.modeling import hf_compat
from oasis_attn.ops import torch_compat
from tiny_models import tiny_model

ROOT = Path(oasis_attn.__file__).parent
COMPATIBILITY = {"modeling/hf_compat.py", "ops/torch_compat.py"}
OPTIONAL = {"torchao", "lm_eval", "peft"}
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "torchao", "lm_eval"}
NAMES = [(home, name) for home, names in hf_compat._NAMES.items() for name in names]
HOOKS = [(owner, name) for owner, names in hf_compat.OVERRIDDEN.items() for name in names]

# The arguments that we pass, by position or name, to each name that we call.
ARGUMENTS = {
    "create_position_bias_mask": ("position_bias", "attention_mask", "is_causal", "query", "key"),
    "sdpa_attention_forward": (
        *("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    ),
    "create_masks_for_generate": (
        *("config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"),
    ),
    "sdpa_mask": ("batch_size", "q_length", "kv_length", "attention_mask"),
    "is_tracing": ("tensor",),
    "can_return_tuple": ("func",),
    "OutputRecorder": ("target_class", "index"),
    "SubConfigSpec": ("config_class", "model_type"),
    "get_checkpoint_conversion_mapping": ("model_type",),
    "register_checkpoint_conversion_mapping": (
        *("model_type_or_class_name", "mapping", "overwrite"),
    ),
    "register_quantization_config": ("method",),
    "register_quantizer": ("name",),
    "HfQuantizer": ("quantization_config",),
    "QuantizationConfigMixin": ("quant_method",),
    "get_gguf_config": ("metadata", "tensor_names"),
    "read_gguf_metadata": ("gguf_path",),
    "TensorProcessor": ("config",),
    "get_gguf_hf_weights_map": ("hf_model", "processor"),
    "parse_flag_from_env": ("key",),
    "Int8Tensor": (
        *("qdata", "scale", "block_size", "dtype", "act_quant_kwargs"),
        *("act_quant_scale", "act_quant_zero_point"),
    ),
    "QuantizeTensorToInt8Kwargs": ("granularity", "mapping_type"),
    "should_reduce_range": ("device",),
    "ConfigurableTask": ("config",),
}
# What we read of each name that we do not call.
ATTRIBUTES = {
    "initialization": ("zeros_", "ones_", "normal_"),
    "AutoHfQuantizer": ("supports_quant_method",),
    "MappingType": ("ASYMMETRIC",),
    "QuantizationConfigMixin": ("from_dict",),
    "ConfigurableTask": (
        *("set_fewshot_seed", "build_all_requests", "instances", "apply_filters"),
        "process_results",
    ),
}


def parameters(call: Any) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name not in ("self", "cls")]


# --- each name exists and has the form that we use


@pytest.mark.parametrize(("home", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_exists(home, name):
    library = home.split(".")[0]
    if library in OPTIONAL:
        pytest.importorskip(library)
    found = getattr(hf_compat, name)
    original = import_module(home)
    assert found is (original if home.endswith(f".{name}") else getattr(original, name))
    missing = [each for each in ATTRIBUTES.get(name, ()) if not hasattr(found, each)]
    assert not missing, f"{home}.{name} has no {missing}"
    if name in ARGUMENTS:
        taken = parameters(found)
        assert set(ARGUMENTS[name]) <= set(taken), f"{home}.{name} takes {taken}"


def test_a_removed_name_is_an_error_that_says_which_library_is_too_new(monkeypatch):
    monkeypatch.setitem(hf_compat._HOMES, "sdpa_mask", "transformers.cache_utils")
    version = metadata.version("transformers")
    message = f"transformers {version} has no transformers.cache_utils.sdpa_mask; install"
    with pytest.raises(ImportError, match=re.escape(message)):
        from oasis_attn.modeling.hf_compat import sdpa_mask  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_compat.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    module = ast.parse(inspect.getsource(hf_compat))
    block = next(node for node in module.body if isinstance(node, ast.If))
    shown = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    }
    expected = {
        (home.removesuffix(f".{name}") if home.endswith(f".{name}") else home, name)
        for home, name in NAMES
    }
    assert shown == expected


@pytest.mark.parametrize("name", sorted(set(torch_compat.__all__) - {"replace_apply"}))
def test_a_name_of_torch_exists(name):
    assert callable(getattr(torch_compat, name))


def schema(operation: Any) -> list[str]:
    return [argument.name for argument in operation._schema.arguments]


def test_flash_attention_for_cpu_takes_what_we_pass():
    forward = schema(torch_compat.flash_attention_for_cpu)
    assert forward[:5] == ["query", "key", "value", "dropout_p", "is_causal"]
    assert forward[5:] == ["attn_mask", "scale"]
    backward = schema(torch_compat.flash_attention_for_cpu_backward)
    first = ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"]
    assert backward == [*first, "attn_mask", "scale"]
    q = torch.randn(1, 2, 5, 4)
    _, lse = torch_compat.flash_attention_for_cpu(q, q, q, 0.0, False, scale=0.5)
    torch.testing.assert_close(lse, (0.5 * q @ q.mT).logsumexp(-1))


_FIRST = ("query", "key", "value")
_GRADIENT = ("grad_out", *_FIRST, "out", "logsumexp")
_RANDOM = ("philox_seed", "philox_offset")
_LENGTHS = ("cum_seq_q", "cum_seq_k", "max_q", "max_k")
CUDA_ARGUMENTS = {  # those that we pass by position
    "flash_attention": (*_FIRST, "dropout_p", "is_causal"),
    "flash_attention_backward": (*_GRADIENT, *_LENGTHS, "dropout_p", "is_causal", *_RANDOM),
    "efficient_attention": (*_FIRST, "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    "efficient_attention_backward": (
        *("grad_out_", *_FIRST, "attn_bias", "out", "logsumexp", *_RANDOM),
        *("dropout_p", "grad_input_mask", "is_causal"),
    ),
    "cudnn_attention": (*_FIRST, "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    "cudnn_attention_backward": (
        *(*_GRADIENT, *_RANDOM, "attn_bias", *_LENGTHS, "dropout_p", "is_causal"),
    ),
}


@pytest.mark.parametrize("name", CUDA_ARGUMENTS)
def test_attention_on_cuda_takes_what_we_pass(name):
    operation = getattr(torch_compat, name)
    taken, passed = schema(operation.default), CUDA_ARGUMENTS[name]
    assert taken[: len(passed)] == list(passed)
    assert "scale" in taken[len(passed) :]
    results = [result.name for result in operation.default._schema.returns]
    outputs = ["grad_query", "grad_key", "grad_value"]
    if not name.endswith("_backward"):
        outputs = ["output", "log_sumexp" if name == "efficient_attention" else "logsumexp"]
    assert results[: len(outputs)] in (outputs, [""] * len(outputs))


def test_fused_sdp_choice_gives_the_number_of_a_backend():
    q = torch.randn(1, 2, 5, 4)
    chosen = torch_compat.fused_sdp_choice(q, q[:, :1], q[:, :1], None, 0.0, True, enable_gqa=True)
    assert chosen in {int(backend.value) for backend in SDPBackend.__members__.values()}


def test_allow_side_effects_in_checkpoints(monkeypatch):
    config, name = torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"
    monkeypatch.setattr(config, name, False)
    torch_compat.allow_side_effects_in_checkpoints()
    assert getattr(config, name) is True


def test_assert_async_raises_with_its_message():
    torch_compat.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        torch_compat.assert_async(torch.tensor(False), "not fine")


def test_tree_map_only_changes_tensors_in_a_nested_state():
    state = {"a": [torch.ones(1), None], "b": "text"}
    moved = torch_compat.tree_map_only(torch.Tensor, lambda tensor: tensor + 1, state)
    assert moved == {"a": [torch.tensor([2.0]), None], "b": "text"}


def test_replace_apply_intercepts_casts_and_moves():
    inner, calls = nn.Linear(2, 2), []

    def note(function, recurse=True):
        calls.append(recurse)
        return torch_compat.apply_to_tensors(inner, function, recurse)

    torch_compat.replace_apply(inner, note)
    model = nn.Sequential(inner).to(torch.float64)
    assert len(calls) == 1
    assert model[0].weight.dtype == torch.float64


# --- wrappers


def test_attention_implementation_is_read_and_set():
    config = LlamaConfig(attn_implementation="sdpa")
    assert hf_compat.attention_implementation(config) == "sdpa"
    hf_compat.set_attention_implementation(config, "eager")
    assert hf_compat.attention_implementation(config) == "eager"


def test_experts_implementation_is_read_and_set():
    config = MixtralConfig(experts_implementation="eager")
    assert hf_compat.experts_implementation(config) == "eager"
    hf_compat.set_experts_implementation(config, "batched_mm")
    assert hf_compat.experts_implementation(config) == "batched_mm"


def test_can_set_experts_implementation():
    from transformers import LlamaForCausalLM, MixtralForCausalLM

    assert hf_compat.can_set_experts_implementation(MixtralForCausalLM) is True
    assert hf_compat.can_set_experts_implementation(LlamaForCausalLM) is False


def test_experts_gate_is_what_packed_experts_apply():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=2)
    experts, up = MixtralExperts(config), torch.randn(3, 12)
    gate, value = up.chunk(2, -1)
    expected = nn.functional.silu(gate) * value
    torch.testing.assert_close(hf_compat.experts_gate(experts)(experts, up), expected)


def test_no_split_modules_are_layers():
    assert set(hf_compat.no_split_modules(tiny_model())) == {"RoutedLlamaDecoderLayer"}


def test_recorded_outputs_of_a_family_are_a_copy():
    from transformers import LlamaModel

    recorded = hf_compat.recorded_outputs(LlamaModel)
    assert {"hidden_states", "attentions"} <= set(recorded)
    recorded.clear()
    assert hf_compat.recorded_outputs(LlamaModel)
    assert hf_compat.recorded_outputs(SimpleNamespace(_can_record_outputs=None)) == {}


def test_register_recorded_outputs_is_what_transformers_reads():
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    class Kind(nn.Module):
        pass

    hf_compat.register_recorded_outputs(Kind, {"null_probability": nn.Linear})
    try:
        assert _CAN_RECORD_REGISTRY.get(Kind()) == {"null_probability": nn.Linear}
    finally:
        del _CAN_RECORD_REGISTRY[str(Kind)]


def test_has_adapter():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    assert hf_compat.has_adapter(model) is False
    model.add_adapter(peft.LoraConfig(r=1, target_modules=["q_proj"]))
    assert hf_compat.has_adapter(model) is True


def test_before_upload_writes_first(tmp_path, monkeypatch):
    from transformers.utils import PushToHubMixin

    order = []
    model = tiny_model()
    for kind in (PushToHubMixin, type(model)):  # our class writes a card too
        monkeypatch.setattr(kind, "_upload_modified_files", lambda *_: order.append("upload"))
    hf_compat.before_upload(model, lambda written, folder: order.append((written, folder)))
    model._upload_modified_files(tmp_path, "me/it")
    assert order == [(model, tmp_path), "upload"]
    assert "self._upload_modified_files(" in inspect.getsource(PushToHubMixin.push_to_hub)


def test_find_file(tmp_path):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "config.json"
    path.write_text("{}")
    assert hf_compat.find_file(tmp_path, "config.json", subfolder="sub") == str(path)
    assert hf_compat.find_file(tmp_path, "other.json", absent_ok=True) is None
    with pytest.raises(OSError, match=r"other\.json"):
        hf_compat.find_file(tmp_path, "other.json")
    from transformers.utils.hub import cached_files

    known = parameters(cached_files)
    for flag in ("missing_entries", "connection_errors"):
        assert f"_raise_exceptions_for_{flag}" in known


def test_lm_eval_task_file():
    pytest.importorskip("lm_eval")
    assert "exact_match" in hf_compat.lm_eval_task_file("gsm8k").read_text(encoding="utf-8")


def test_implementation_keys_select_an_implementation():
    for key in ("attn_implementation", "experts_implementation"):
        assert {key, f"_{key}"} <= set(hf_compat.IMPLEMENTATION_KEYS)
        assert isinstance(getattr(PreTrainedConfig, f"_{key}"), property)


def test_provenance_keys_are_in_every_config():
    assert set(hf_compat.PROVENANCE_KEYS) <= set(LlamaConfig(name_or_path="here").to_dict())


@pytest.mark.parametrize("theirs", _MODULES_AFTER)
def test_a_module_that_registration_waits_for_exists(theirs):
    import_module(theirs)
    for ours in _MODULES_AFTER[theirs]:
        assert ours in sys.modules


# --- what our classes override


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


MODULES = [
    (path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted(ROOT.rglob("*.py"))
]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*|__[A-Za-z]\w*(?<!__)", name) is not None


def assigned_on_self(tree: ast.AST) -> set[str]:
    """Names `x` of `self.x = ...` and `cls.x = ...`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }


def defined_in(tree: ast.ClassDef | ast.Module) -> set[str]:
    """Names that the body of a class or module defines, imports aside."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in names_in(target)}
    return found


def names_in(tree: ast.AST) -> list[ast.Name]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]


def classes_in(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def overrides() -> set[str]:
    """Names of dependencies' classes that ours define anew: all private ones, and `HOOKS`."""
    listed, found = {name for _, name in HOOKS}, set()
    for path, tree in MODULES:
        if path.name == "__main__.py":
            continue
        try:
            module = import_module(".".join(("oasis_attn", *path.with_suffix("").parts)))
        except ModuleNotFoundError as error:
            if error.name != "triton":  # which is for GPUs
                raise
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                kind = getattr(module, node.name)
                own = defined_in(node) | assigned_on_self(node)
                theirs = set().union(*(names_of(base) for base in foreign_bases(kind)))
                found |= {name for name in own & theirs if is_private(name) or name in listed}
        for node in ast.walk(tree):  # type(name, bases, {...})
            found |= {key.value for key in keys_of_type(node) if is_private(key.value)}
    return found


def keys_of_type(node: ast.AST) -> list[ast.Constant]:
    """Names of the attributes in `type(name, bases, {...})`."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "type" or len(node.args) != 3:
        return []
    keys = node.args[2].keys if isinstance(node.args[2], ast.Dict) else []
    return [key for key in keys if isinstance(key, ast.Constant)]


def foreign_bases(kind: type) -> list[type]:
    known = {"oasis_attn", *sys.stdlib_module_names}
    return [base for base in kind.__mro__ if base.__module__.split(".")[0] not in known]


@cache
def names_of(kind: type) -> set[str]:
    """All attributes of a class, those that its methods set on its objects included."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # compiled
        source = ""
    assigned = assigned_on_self(ast.parse(textwrap.dedent(source)))
    return {*vars(kind), *vars(kind).get("__annotations__", {}), *assigned}


def test_names_that_we_override_are_listed():
    listed = {name for _, name in HOOKS}
    mixed_in = {"rename_source_key", "reverse_transform"}  # by classes that are made on demand
    assert overrides() == listed - mixed_in


@pytest.mark.parametrize(("owner", "name"), HOOKS, ids=[".".join(hook) for hook in HOOKS])
def test_a_name_that_we_override_exists_and_has_our_signature(owner, name):
    kind = named(owner)
    known = set().union(*(names_of(base) for base in foreign_bases(kind)))
    assert name in known, f"{owner} has no {name}"
    theirs = getattr(kind, name, None)
    if not inspect.isroutine(theirs):
        return
    wanted = parameters(theirs)
    for path, tree in MODULES:
        for node in classes_in(tree):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == name:
                    taken = method.args
                    known = [each.arg for each in [*taken.args, *taken.kwonlyargs]][1:]
                    open_ended = taken.vararg is not None or taken.kwarg is not None
                    message = f"{path}: {node.name}.{name} takes {known}, {owner}'s {wanted}"
                    assert open_ended or set(wanted) <= set(known) | {"kwargs"}, message
                    shared = [each for each in known if each in wanted]
                    assert shared == wanted[: len(shared)], message


# --- no private or unstable name elsewhere

DOCUMENTED = {  # modules that the documentation of our dependencies tells users to import from
    *("torch", "torch.nn", "torch.nn.functional", "torch.utils.data", "torch.utils.checkpoint"),
    *("torch.utils.hooks", "torch.autograd.function", "torch.nn.modules.module"),
    *("torch.nn.attention", "torch.nn.attention.flex_attention"),
    *("transformers", "transformers.modeling_outputs", "accelerate", "peft"),
}
DOCUMENTED_NAMES = {("transformers.utils", "logging"), ("transformers.utils", "ModelOutput")}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, whatever they look like
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each use of what belongs to a dependency and is private or unstable."""
    listed = {name for _, name in HOOKS}
    ours = defined_in(tree) | assigned_on_self(tree)
    ours = ours.union(*(defined_in(node) for node in classes_in(tree))) - listed
    standard: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            standard |= {alias.asname or alias.name for alias in node.names}
    standard = {name for name in standard if name in sys.stdlib_module_names}
    keys = [key for node in ast.walk(tree) for key in keys_of_type(node)]
    inside = {id(node): kind.name for kind in classes_in(tree) for node in ast.walk(kind)}

    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not may_import(alias.name, None):
                    yield node.lineno, text
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if not may_import(str(node.module), alias.name):
                    yield node.lineno, text
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node.value)
            known = NAMED_TUPLE | ours
            if root in ("self", "cls", "super()") and id(node) in inside:
                known = NAMED_TUPLE | listed | inherited(inside[id(node)], tree)
            if node.attr not in known and root not in standard:
                yield node.lineno, text
        elif isinstance(node, ast.keyword) and node.arg is not None and is_private(node.arg):
            yield node.value.lineno, f"{node.arg}=..."
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in listed and node not in keys:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1]
            private = isinstance(name, ast.Constant) and is_private(name.value)
            if private and name.value not in written_by_name(tree):
                yield node.lineno, text


def may_import(module: str, name: str | None) -> bool:
    library = module.split(".")[0]
    if library == "oasis_attn" or library in sys.stdlib_module_names:
        return True
    if any(is_private(part) for part in [*module.split("."), name or ""]):
        return False
    public = module in DOCUMENTED or (module, name) in DOCUMENTED_NAMES
    return library not in LIBRARIES or public


def written_by_name(tree: ast.Module) -> set[str]:
    """Names `_x` that the module itself gives to objects: `vars(object)["_x"] = ...`."""
    return {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.slice, ast.Constant)
        and ast.unparse(node.value).startswith("vars(")
    }


def inherited(name: str, tree: ast.Module | None = None) -> set[str]:
    """What the classes of this name, and those of ours that they derive from, define."""
    found: set[str] = set()
    for kind in [*CLASSES.get(name, []), *(classes_in(tree) if tree else [])]:
        if kind.name == name:
            found |= defined_in(kind) | assigned_on_self(kind)
            found = found.union(*(inherited(ast.unparse(base)) for base in kind.bases))
    return found


CLASSES: dict[str, list[ast.ClassDef]] = {}
for _, _tree in MODULES:
    for _kind in classes_in(_tree):
        CLASSES.setdefault(_kind.name, []).append(_kind)
SOURCES = [(str(path), tree) for path, tree in MODULES if str(path) not in COMPATIBILITY]


@pytest.mark.parametrize(("path", "tree"), SOURCES, ids=[path for path, _ in SOURCES])
def test_no_private_name_of_a_dependency(path, tree):
    found = [f"{path}:{line}: {text}" for line, text in violations(tree)]
    assert not found, "belongs into modeling/hf_compat.py or ops/torch_compat.py: " + str(found)


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.utils.output_capturing import OutputRecorder",
        "from transformers.masking_utils import sdpa_mask",
        "from transformers.utils import cached_file",
        "import transformers.integrations.moe",
        "from torch.utils._pytree import tree_map",
        "from transformers import _private",
        "from rich._inspect import Inspect",
        "import torch\ntorch._assert_async(x, 'y')",
        "import torch\ntorch.ops.aten._private.default",
        "import torch\ntorch._C._nothing",
        "model.config._attn_implementation",
        "model._no_split_modules",
        "super()._dequantize(model)",
        "class A(B):\n    def f(self):\n        return self._parameters",
        "class A(B):\n    def _save(self, trainer):\n        trainer._save()",
        "getattr(model, '_hf_peft_config_loaded', False)",
        "vars(model)['_apply'] = function",
        "cached_file(source, name, _raise_exceptions_for_missing_entries=False)",
    ],
)
def test_the_search_finds(code):
    assert list(violations(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(1)",
        "from transformers import PreTrainedModel\nfrom transformers.utils import logging",
        "score._asdict()",
        "class A:\n    def _own(self):\n        self._own()\n\ndef f(a):\n    a._own()",
        "class A(Trainer):\n    def _save(self):\n        super()._save()",
        "vars(x)['_mark'] = 1\ngetattr(x, '_mark', None)",
        "x.__class__ = y",
    ],
)
def test_the_search_lets_pass(code):
    assert not list(violations(ast.parse(code)))


# --- pins


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_pin_admits_the_tested_minor_version_only(library):
    project = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    required = {re.split(r"[^\w-]", line)[0]: line for group in groups for line in group}
    name = library.replace("_", "-")
    pin = re.fullmatch(rf"{name}>=(\d+)\.(\d+)[\d.]*,<(\d+)\.(\d+)", required[name])
    assert pin, f"pyproject.toml: {required[name]}"
    least, below = (int(pin[1]), int(pin[2])), (int(pin[3]), int(pin[4]))
    assert below == (least[0], least[1] + 1), f"pyproject.toml: {required[name]}"
    constraints = (ROOT.parent.parent / "constraints.txt").read_text()
    tested = re.search(rf"^{name}==(\d+)\.(\d+)", constraints, re.MULTILINE)
    assert tested, f"constraints.txt: {name}"
    assert (int(tested[1]), int(tested[2])) == least
