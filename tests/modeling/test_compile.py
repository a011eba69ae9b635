"""Our code has no graph breaks: compiled whole, forward, decoding and training are the eager ones.

Backends `eager` and `aot_eager` trace as `inductor` does, without its minutes of code generation.
"""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from tiny_models import tiny_config, tiny_model

VARIANTS = ["oasis", "oasis_block", "attn_residual", "official", "kv_null", "softpick"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=VARIANTS)
def model(request):
    return small(request.param)


def small(variant="oasis", layers=2):
    text = tiny_config(num_hidden_layers=layers, initializer_range=0.2)
    return tiny_model(variant, text=text, dtype=torch.float64)


def compiled(model, backend="eager", **how):
    return torch.compile(model, fullgraph=True, backend=backend, **how)


def counting(graphs):
    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "layers"), [("oasis", 5), *((name, 2) for name in VARIANTS)])
def test_forward(variant, layers, ids):
    model = small(variant, layers)
    whole = compiled(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for how in ({}, {"attention_mask": mask}):
        expected = model(ids, use_cache=False, **how).logits
        actual = whole(ids, use_cache=False, **how).logits
        close(actual, expected)


@torch.no_grad()
def test_decoding_with_a_dynamic_cache(ids):
    model = small()
    whole, caches = compiled(model), [DynamicCache(config=model.config) for _ in range(2)]
    for part in ids.split([9, 1, 1, 1], dim=1):
        both = [m(part, past_key_values=c) for m, c in zip((whole, model), caches, strict=True)]
        close(both[0].logits, both[1].logits)


def test_generating_with_a_static_cache(model, ids):
    graphs = []
    how = CompileConfig(fullgraph=True, backend=counting(graphs), mode=None)
    how._compile_all_devices = True  # on the CPU generate() would not compile
    keywords = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", compile_config=how, **keywords)
    assert graphs
    assert torch.equal(static, model.generate(ids, **keywords))


@pytest.mark.parametrize("training", [False, True])
def test_lengths_share_one_graph(training, ids):
    graphs = []
    model = small()
    whole = compiled(model, counting(graphs), dynamic=True)
    for length in (5, 8, 12):
        part = ids[:, :length].contiguous()
        with torch.set_grad_enabled(training):
            actual, expected = (m(part, use_cache=False).logits for m in (whole, model))
        close(actual, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(("backend", "checkpointing"), [("aot_eager", False), ("aot_eager", True)])
def test_training(backend, checkpointing, ids):
    model = small().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    eager = copy.deepcopy(model)
    losses = [m(ids, labels=ids, use_cache=False).loss for m in (compiled(model, backend), eager)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("variant", ["oasis", "official"])
def test_frozen_parts(variant, ids):
    """Where the first sources need no gradient, as in LoRA."""
    model = small(variant).train()
    trained = model.model.layers[-1].mlp.down_proj.weight
    model.requires_grad_(False)
    trained.requires_grad_(True)
    eager = copy.deepcopy(model)
    compiled(model)(ids, labels=ids, use_cache=False).loss.backward()
    eager(ids, labels=ids, use_cache=False).loss.backward()
    other = eager.model.layers[-1].mlp.down_proj.weight
    close(trained.grad, other.grad)


def test_export(model, ids):
    """One exported program for all lengths."""
    length = torch.export.Dim("length", min=2, max=60)
    program = torch.export.export(
        model, (), {"input_ids": ids[:, :7].contiguous(), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None}, strict=False,
    )  # fmt: skip
    actual = program.module()(input_ids=ids, use_cache=False).logits
    close(actual, model(ids).logits)
