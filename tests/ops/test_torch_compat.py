"""Every private name of PyTorch that we use exists and has the form that we use.

A test that fails here names what a release of PyTorch has removed or changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from oasis_attn.ops import torch_compat


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
