"""Every private or unstable name of a dependency is where we expect it, and used in one place only.

A test that fails here names what a release of a library has removed or changed.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from oasis_attn._registration import _MODULES_AFTER
from oasis_attn.modeling import hf_compat
from tiny_models import tiny_model

OPTIONAL = {"compressed_tensors", "torchao", "lm_eval", "peft"}
NAMES = [(home, name) for home, names in hf_compat._NAMES.items() for name in names]

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
