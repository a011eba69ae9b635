"""Loading, saving, casting and copying a model as with any Hugging Face model."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn import OasisForCausalLM, UserError
from tiny_models import VOCABULARY, greedy, tiny_config, tiny_model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cpu", "auto", "disk"])
def test_device_maps(kind, ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    names = ["lm_head", *(f"model.{name}" for name, _ in model.model.named_children())]
    places = dict.fromkeys(names, "cpu") | {"model.layers": "disk"} if kind == "disk" else kind
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))


@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "oasis_unit", "official", "kv_null"])
def test_a_model_that_does_not_fit_is_offloaded(variant, ids, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    for inference in (True, False):
        with torch.inference_mode(inference):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:null_attention falls back")
@pytest.mark.parametrize(
    ("asked", "saved", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes(asked, saved, expected, ids, tmp_path):
    model = tiny_model().to(saved)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
    router = torch.promote_types(expected, torch.float32)  # routers are never narrower
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (router if "model.depth" in name else expected), name
    assert loaded(ids).logits.dtype == expected
    assert loaded(ids).logits.isfinite().all()


@torch.no_grad()
def test_shards(ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_tie_resize_and_survive(tied, ids, tmp_path):
    model = tiny_model(text=tiny_config(tie_word_embeddings=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == VOCABULARY + 9
    torch.testing.assert_close(model(ids).logits[..., :VOCABULARY], before)
    assert model(ids, labels=ids).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = OasisForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_is_set_on_the_config_reaches_the_model(ids, tmp_path):
    model = tiny_model()
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).past_key_values is None
    cached = AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=True)
    assert cached(ids).past_key_values is not None
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["oasis", "official", "vanilla"])
def test_copies_compute_the_same(variant, ids):
    model = tiny_model(variant)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        other.lm_head.weight.zero_()
        assert other.model.layers[0].self_attn is not model.model.layers[0].self_attn
    assert model(ids).logits.abs().max() > 0


def test_a_pickled_model_opens_in_another_process(ids, tmp_path):
    model = tiny_model()
    torch.save({"model": model, "ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "all")
    script = """if True:
        import sys, torch
        saved = torch.load(sys.argv[1], weights_only=False)
        asked = {"output_hidden_states": True, "output_null_probability": True}
        outputs = saved["model"](saved["ids"], **asked)
        assert torch.equal(outputs.logits, saved["logits"])
        assert len(outputs.hidden_states) == 5 and len(outputs.null_probability) == 4
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "all")], check=True, timeout=600)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation: 'eager' has no null option"),
        ({"attn_implementation": "sdpa"}, "attn_implementation: 'sdpa' has no null option"),
        ({"residual": "sum"}, "null_signal: 'on' needs residual 'depth'"),
        ({"null_signal": "louder"}, "null_signal: 'louder' is not one of off, on, shuffled"),
        ({"residual": "official", "mix_scale": "sum"}, "mix_scale: 'sum' has no effect"),
        ({"mix_scale": "double"}, "mix_scale: 'double' is not one of none, sum, rms"),
        ({"mix_scael": "sum"}, "settings: 'mix_scael' .*did you mean 'mix_scale'"),
        ({"token_normalizer": "softmax"}, "null_signal: 'on' needs a token_normalizer with a null"),
    ],
)
def test_conflicting_settings_are_refused_at_loading(keywords, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, OasisForCausalLM):
        with pytest.raises(UserError, match=message):
            loader.from_pretrained(tmp_path, **keywords)


def test_another_attention_function_is_refused():
    with pytest.raises(UserError, match="attn_implementation: 'sdpa' has no null option"):
        tiny_model().set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="attn_implementation: 'eager' has no null option"):
        AutoModelForCausalLM.from_config(tiny_model().config, attn_implementation="eager")


def test_the_base_model_is_saved_with_its_settings(tmp_path, ids):
    model = tiny_model("softmax1")
    model.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.settings == model.config.settings
    assert torch.equal(again.model(ids)[0], model.model(ids)[0])
