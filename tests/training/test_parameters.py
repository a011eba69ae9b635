from __future__ import annotations

import pytest

from oasis_attn.errors import UserError
from oasis_attn.training.lora import adapt
from oasis_attn.training.parameters import GROUPS, group_of, train_only, trained
from oasis_attn.training.trainer import OasisTrainer
from tiny_models import tiny_model


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "backbone"),
        ("model.norm.weight", "backbone"),
        ("model.depth.queries", "router"),
        ("model.depth.key_norm", "router"),
        ("model.depth.beta_raw", "beta"),
        ("model.layers.3.attn_res_sa.k_proj.weight", "router"),
        ("model.layers.3.attn_res_mlp.oasis_beta_raw", "beta"),
        ("model.layers.3.null_logit", "null"),
        ("model.layers.3.null_key", "null"),
        ("model.layers.3.null_value", "null"),
        ("model.layers.3.self_attn.sinks", "null"),
        ("model.layers.0.mlp.down_proj.lora_A.default.weight", "lora"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group
    assert group in GROUPS


def learning(model) -> set[str]:
    return {name for name, _ in trained(model)}


def test_all_train_by_default():
    model = tiny_model()
    train_only(model, ())
    assert learning(model) == {name for name, _ in model.named_parameters()}


def test_patterns_and_groups():
    model = tiny_model()
    train_only(model, ("router", "beta"))
    assert learning(model) == {
        "model.depth.queries",
        "model.depth.key_norm",
        "model.depth.beta_raw",
    }
    train_only(model, ("model.layers.[23].mlp.*",))
    assert len(learning(model)) == 6
    assert all(
        name.startswith(("model.layers.2.mlp", "model.layers.3.mlp")) for name in learning(model)
    )


def test_routers_and_nulls_do_not_decay():
    model = tiny_model("oasis", token_normalizer="key_value_null")
    decayed = OasisTrainer.get_decay_parameter_names(None, model)
    assert {group_of(name) for name in decayed} == {"backbone"}
    assert "model.layers.0.mlp.up_proj.weight" in decayed


def test_with_adapters_the_backbone_rests_unless_named():
    model = tiny_model()
    adapt(model, 2, 0)
    train_only(model, ())
    assert {group_of(name) for name in learning(model)} == {"lora", "router", "beta"}
    train_only(model, ("*layernorm*",))
    assert {group_of(name) for name in learning(model)} == {"lora", "backbone"}


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UserError, match=r"trainable: 'lm_haed\.\*' matches no parameter"):
        train_only(tiny_model(), ("lm_haed.*",))
    with pytest.raises(UserError, match=r"the groups backbone, beta, router"):
        train_only(tiny_model(), ("lora",))
