"""No dead setting: each has an effect or is refused, and a checkpoint keeps them all."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, LlamaConfig

from oasis_attn import OasisConfig, OasisForCausalLM, UserError, convert, variants
from oasis_attn.extension_files import load_extensions
from oasis_attn.hub.model_info import check_savable
from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS
from oasis_attn.modeling.null_logit import LOG_CONTEXT_MARGIN
from oasis_attn.modeling.settings import OWN_NAMES, SETTINGS, check_names
from oasis_attn.modeling.variants import settings_of
from oasis_attn.ops.normalizers import TOKEN_NORMALIZERS
from tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize("name", variants())
def test_every_variant_survives_a_checkpoint(name, tmp_path, ids):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is OasisForCausalLM
    assert loaded.config.settings == model.config.settings
    loaded.eval()
    for each in (model, loaded):
        torch.manual_seed(3)  # the shuffled control draws an order
        each.last = each(ids).logits
    assert torch.equal(loaded.last, model.last)


def test_variants_are_distinct_rows_of_known_settings():
    rows = variants()
    complete = {
        name: repr(OasisConfig(text_config=tiny_config(), **row).settings)
        for name, row in rows.items()
    }
    assert len(set(complete.values())) == len(rows)
    assert all(set(row) <= set(SETTINGS) for row in rows.values())


def test_the_names_for_the_command_line_are_those_of_the_registries():
    registries = {each.setting: each for each in (TOKEN_NORMALIZERS, BRANCH_NORMS, NULL_SIGNALS)}
    assert set(registries) == set(OWN_NAMES)
    for setting, registry in registries.items():
        assert set(OWN_NAMES[setting]) - {"none", "off"} == registry.own


@pytest.mark.usefixtures("own_extensions")
def test_the_command_line_accepts_names_of_extension_files(tmp_path):
    with pytest.raises(UserError, match=r"branch_norm: 'mine' .* register_branch_norm, or load"):
        check_names({"branch_norm": "mine"})
    (tmp_path / "mine.py").write_text(
        "import oasis_attn\noasis_attn.register_branch_norm('mine', lambda x, kind: x)\n"
    )
    load_extensions([tmp_path / "mine.py"])
    check_names({"branch_norm": "mine"})


CHANGES = {
    "token_normalizer": "learned_sink",
    "null_logit": -2.0,
    "output_gate": "head",
    "depth_block_size": 2,
    "mix_scale": "sum",
    "branch_norm": "rms",
    "null_signal": "off",
    "beta_init": 1.0,
    "depth_normalizer": "sigmoid",
}


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_each_setting_has_an_effect(name, value, ids):
    text = tiny_config(initializer_range=0.2, rms_norm_eps=1e-14)
    logits = []
    for settings in ({}, {name: value}):
        torch.manual_seed(0)
        model = OasisForCausalLM(OasisConfig(text_config=text, **settings)).eval()
        torch.manual_seed(1)
        model.model.depth.queries.data.normal_(std=0.5)
        if model.model.layers[0].null_logit is not None:
            for layer in model.model.layers:
                layer.null_logit.data.fill_(1.0)
        logits.append(model(ids).logits)
    if name == "mix_scale":  # a common factor: only the norms' eps can tell
        assert not torch.equal(*logits)
        torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
    else:
        assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("scale", "eps"), [("none", 1e-14), ("rms", 1e-5)])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(
    "pair",
    [("attn_residual", "depth_softmax1_only"), ("oasis", "oasis_depth_softmax")],
    ids=["off", "on"],
)
def test_depth_softmax1_is_inert_if_the_scale_or_eps_does_not_matter(pair, block, scale, eps, ids):
    logits = []
    for name in pair:
        text = tiny_config(initializer_range=0.2, rms_norm_eps=eps)
        torch.manual_seed(0)
        settings = settings_of(name) | {"depth_block_size": block, "mix_scale": scale}
        model = OasisForCausalLM(OasisConfig(text_config=text, **settings)).double().eval()
        torch.manual_seed(1)
        model.model.depth.queries.data.normal_(std=0.5)
        if model.model.depth.beta_raw is not None:
            model.model.depth.beta_raw.data.fill_(1.0)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)  # the norms run in float32


def test_the_length_of_clipped_softmax_is_by_default_the_positions_of_the_backbone():
    text = tiny_config(max_position_embeddings=48)
    config = OasisConfig(text_config=text, **settings_of("clipped_softmax"))
    assert config.token_normalizer == {"name": "clipped_softmax", "alpha": 3, "length": 48}


def test_depth_softmax1_is_not_inert_with_a_usual_eps_and_small_embeddings(ids):
    logits = []
    for name in ("oasis", "oasis_depth_softmax"):
        torch.manual_seed(0)
        text = tiny_config(rms_norm_eps=1e-6)
        logits.append(
            OasisForCausalLM(OasisConfig(text_config=text, **settings_of(name)))(ids).logits
        )
    assert (logits[0] - logits[1]).abs().max() > 1e-4 * logits[0].std()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_normaliser": "softmax"}, "did you mean 'token_normalizer'"),
        ({"token_normalizer": "softmax2"}, "token_normalizer: 'softmax2' is not one of"),
        ({"residual": "sum"}, "null_signal: 'on' needs residual 'depth'"),
        ({"token_normalizer": "softmax"}, "needs a token_normalizer with a null"),
        ({"null_signal": "off", "beta_init": 0.0}, "beta_init: 0.0 has no effect"),
        (
            {"null_signal": "off", "residual": "sum", "depth_block_size": 4},
            "depth_block_size: 4 has no effect with residual='sum'",
        ),
        ({"depth_block_size": 0}, "depth_block_size: 0 is not a whole number of at least 1"),
        ({"depth_block_size": 2.0}, "depth_block_size: 2.0 is not a whole number"),
        ({"depth_block_size": float("inf")}, "depth_block_size: inf is not a whole number"),
        ({"text_config": "llama"}, "text_config: 'llama' is not a configuration"),
        (
            {"text_config": {"model_type": "llama", "num_hidden_layers": "two"}},
            "text_config: .*two",
        ),
        (
            {"token_normalizer": "softpick", "null_logit": 1.0},
            "null_logit: 1.0 has no effect with token_normalizer='softpick'",
        ),
        (
            {"token_normalizer": "learned_sink", "null_logit": -math.inf},
            "null_logit: -inf is not a number from",
        ),
        ({"null_logit": "log_length"}, "null_logit: 'log_length' is neither a number nor 'log_con"),
        ({"null_logit": {"name": "log_context", "window": 8}}, "null_logit: .*window.* is neither"),
        ({"null_logit": {"name": "log_context", "length": 0}}, "null_logit: length: 0 is not a wh"),
        (
            {"null_logit": "log_context", "text_config": BloomConfig()},
            "null_logit: 'log_context' needs max_position_embeddings, which is None",
        ),
        (
            {"null_logit": "log_context", "token_normalizer": "softmax", "null_signal": "off"},
            "null_logit: .* has no effect with token_normalizer='softmax'",
        ),
        (
            {"token_normalizer": {"name": "softmax1", "gamma": -0.1}},
            "token_normalizer: 'gamma' is not for 'softmax1', which takes no arguments",
        ),
        ({"token_normalizer": "clipped_softmax"}, "clipped_softmax: it needs either 'gamma', or"),
        (
            {"token_normalizer": {"name": "clipped_softmax", "gamma": -0.1, "length": 16}},
            "clipped_softmax: it needs either 'gamma', or 'alpha' and 'length'",
        ),
        (
            {"token_normalizer": {"name": "clipped_softmax", "alpha": 0}},
            "alpha, length: 0, .* must be above 0",
        ),
        (
            {"token_normalizer": {"name": "clipped_softmax", "gamma": 0.1}},
            "gamma: 0.1 is not below 0, so nothing is clipped",
        ),
        (
            {"token_normalizer": {"name": "clipped_softmax", "gamma": "low"}},
            "token_normalizer: gamma: 'low' is not a number",
        ),
        ({"null_logit": float("nan")}, "null_logit: nan is not a number"),
        ({"null_logit": -float("inf")}, "null_signal: 'on' has no effect with null_logit=-inf"),
        (
            {"null_logit": -float("inf"), "null_signal": "shuffled", "residual": "official"},
            "null_signal: 'shuffled' has no effect with null_logit=-inf",
        ),
        ({"attn_implementation": "sdpa"}, "attn_implementation: 'sdpa' has no null option"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        OasisConfig(**{"text_config": tiny_config()} | settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "length"),
    [("log_context", 64), ({"name": "log_context"}, 64), ({"name": "log_context", "length": 9}, 9)],
)
def test_the_null_logit_of_a_context_is_saved_as_a_number(value, length, tmp_path, ids):
    model = tiny_model("softmax1", null_logit=value)
    expected = math.log(length) + LOG_CONTEXT_MARGIN
    assert model.config.null_logit == model.config.settings["null_logit"] == expected
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["null_logit"] == expected
    longer = AutoConfig.from_pretrained(tmp_path, max_position_embeddings=4096)
    assert longer.max_position_embeddings == 4096
    assert longer.null_logit == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert torch.equal(tiny_model("softmax1", null_logit=expected)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "official"])
@pytest.mark.parametrize(
    ("length", "expected"), [(64, 8.0), (403, 8.0), (1024, math.log(1024) + 2)]
)
def test_the_null_logit_of_a_context_is_at_least_8_with_depth_routing(variant, length, expected):
    settings = settings_of(variant) | {"null_logit": {"name": "log_context", "length": length}}
    assert OasisConfig(text_config=tiny_config(), **settings).null_logit == expected
    with_key = settings | {"token_normalizer": "key_null"}
    assert OasisConfig(text_config=tiny_config(), **with_key).null_logit == math.log(length) + 2


@pytest.mark.parametrize(("value", "start"), [(None, 0.0), (5, 5.0), ("log_context", None)])
def test_a_learned_sink_starts_at_the_null_logit(value, start, tmp_path, ids):
    settings = settings_of("learned_sink") | ({} if value is None else {"null_logit": value})
    model = OasisForCausalLM(OasisConfig(text_config=tiny_config(), **settings)).eval()
    start = math.log(64) + LOG_CONTEXT_MARGIN if start is None else start
    for layer in model.model.layers:
        torch.testing.assert_close(layer.null_logit, torch.full((4,), start))
        layer.null_logit.data.add_(0.25)
    plain = tiny_model("softmax1", null_logit=model.config.null_logit + 0.25)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.null_logit == model.config.null_logit
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_family_with_sinks_of_its_own_has_no_other_start():
    config = OasisConfig(
        text_config=tiny_config("gpt_oss"), token_normalizer="learned_sink", null_logit=5.0
    )
    with pytest.raises(UserError, match=r"null_logit: 5\.0 has no effect with 'gpt_oss'"):
        OasisForCausalLM(config)


def test_a_model_needs_a_config_of_ours_and_an_input():
    with pytest.raises(UserError, match="config: LlamaConfig is not OasisConfig"):
        OasisForCausalLM(LlamaConfig())
    with pytest.raises(UserError, match="input_ids: pass either"):
        tiny_model()()


def test_a_balancing_loss_that_would_be_lost_is_refused():
    native = AutoModelForCausalLM.from_config(tiny_config("mixtral", output_router_logits=True))
    with pytest.raises(UserError, match="output_router_logits: True"):
        convert(native)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_attention_maps_that_the_config_asks_for_are_saved_with_it(family, tmp_path, ids):
    """Set on ours, before and after construction, or in the family's config."""
    model = tiny_model(family=family)
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    given = tiny_config(family, output_attentions=True)
    for config in (
        AutoConfig.from_pretrained(tmp_path),
        OasisConfig(text_config=tiny_config(family), output_attentions=True),
        OasisConfig(text_config=given),
        OasisConfig(text_config=given.to_dict()),
    ):
        assert config.output_attentions
        config.save_pretrained(tmp_path / "again")
        assert AutoConfig.from_pretrained(tmp_path / "again").output_attentions
    assert given.output_attentions
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(loaded(ids).attentions) == 4
    assert len(loaded.model(ids).attentions) == 4
    assert loaded(ids, output_attentions=False).attentions is None


def _set(path, value):
    def change(config):
        *parents, name = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        setattr(config, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("null_signal", "of"), "null_signal: 'of' is not one of"),
        (_set("null_logit", float("nan")), "null_logit: nan is not a number"),
        (_set("residual", "sum"), "null_signal: 'on' needs residual 'depth'"),
        (_set("text_config.num_attention_heads", 5), "config: .*not a multiple"),
    ],
)
def test_a_config_that_could_not_be_loaded_is_not_saved(change, message, tmp_path):
    model = tiny_model()
    change(model.config)
    with pytest.raises(UserError, match=message) as raised:
        model.save_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        check_savable(model)


def test_what_transformers_would_not_save_is_found_before():
    native = AutoModelForCausalLM.from_config(tiny_config())
    check_savable(native)
    for attribute, place in (("temperature", native.config), ("top_p", native.generation_config)):
        setattr(place, attribute, 0.5)
        with pytest.raises(UserError, match=f"cannot be saved: .*{attribute}") as raised:
            check_savable(native)
        assert "\n" not in str(raised.value)
        setattr(place, attribute, None)


def test_attributes_of_other_libraries_do_not_keep_a_checkpoint_from_loading(tmp_path):
    model = tiny_model()
    model.config.my_note = "mine"
    model.config.tokenizer_class = "PreTrainedTokenizerFast"
    model.config.text_config.pretraining_tp = 1
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert not hasattr(config, "my_note")
    assert config.tokenizer_class == "PreTrainedTokenizerFast"
    assert config.text_config.pretraining_tp == 1
    assert model.config.my_note == "mine"


def test_the_callers_config_is_left_alone():
    text = LlamaConfig()
    OasisConfig(text_config=text)
    assert text._attn_implementation is None


def test_a_vanilla_checkpoint_loads_directly(tmp_path, ids):
    native = AutoModelForCausalLM.from_config(tiny_config("qwen3")).eval()
    native.save_pretrained(tmp_path)
    model, info = OasisForCausalLM.from_pretrained(
        tmp_path, **settings_of("attn_residual"), mix_scale="sum", output_loading_info=True
    )
    assert {name.split(".")[1] for name in info["missing_keys"]} == {"depth"}
    assert not info["unexpected_keys"]
    assert model.model.depth.queries.eq(0).all()
    torch.testing.assert_close(model.eval()(ids).logits, native(ids).logits, rtol=0, atol=1e-5)


def test_auto_config_knows_the_type(tmp_path):
    OasisConfig(text_config=tiny_config()).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OasisConfig)


def test_another_attention_function_is_refused():
    with pytest.raises(UserError, match="'eager' has no null option"):
        tiny_model().set_attn_implementation("eager")
