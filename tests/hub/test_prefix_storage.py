"""A stored prefix is saved with its model, and loaded by this library, transformers and PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import validate_quantization_for_training

from hub.prefix_models import TOKENS, native, text
from oasis_attn import OasisForCausalLM
from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import (
    compute_prefix,
    load_prefix,
    prefix_of,
    with_prefix,
)
from oasis_attn.modeling.pretrained import OasisPreTrainedModel
from tiny_models import tiny_model


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: native(dtype=torch.float32), tiny_model])
def test_saved_with_the_model_and_loaded_by_this_library_and_by_peft(make, tmp_path):
    model = make()
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    prefixed.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    ids_BT = text(2, 7)
    want = prefixed(ids_BT).logits
    loaded, _ = load_model(tmp_path)
    assert prefix_of(loaded).tokens == TOKENS
    assert torch.equal(loaded(ids_BT).logits, want)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids_BT, **greedy), prefixed.generate(ids_BT, **greedy))
    half, _ = load_model(tmp_path, dtype="bfloat16")
    assert half(ids_BT).logits.dtype == torch.bfloat16

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model)
    assert prefix_of(plain).tokens == TOKENS
    assert torch.equal(plain(ids_BT).logits, want)
    if not isinstance(model, OasisPreTrainedModel):
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(ids_BT)[0], prefixed.base_model(ids_BT)[0])
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids_BT).logits, want)
        adapted = PeftModel.from_pretrained(model, tmp_path / "prefix").eval()
        torch.testing.assert_close(adapted(input_ids=ids_BT).logits, want, atol=1e-5, rtol=1e-5)


def test_an_adapter_without_prefix_in_the_weights_is_refused(tmp_path):
    model = native(dtype=torch.float32)
    with_prefix(model, compute_prefix(model, TOKENS)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # plain transformers leaves the adapter in the folder
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="subfolder 'prefix', but its weights contain no prefix"):
        load_model(tmp_path)


@torch.no_grad()
def test_it_can_be_trained_and_saved_again(tmp_path):
    model = native(dtype=torch.float32)
    with_prefix(model, compute_prefix(model, TOKENS)).save_pretrained(tmp_path / "1")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    validate_quantization_for_training(loaded)
    loaded.lm_head.weight.mul_(2)
    loaded.half().float()
    given = {name: tensor + 1 for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "2", state_dict=given, max_shard_size="20KB")
    again, ids_BT = AutoModelForCausalLM.from_pretrained(tmp_path / "2"), text(2, 7)
    assert len(list((tmp_path / "2").glob("model-*.safetensors"))) > 1
    for name, theirs in again.named_parameters():
        assert torch.equal(given[name], theirs)
    assert torch.equal(prefix_of(again).keys_LGPd, prefix_of(loaded).keys_LGPd)
    assert torch.equal(prefix_of(again).values_LGPd, prefix_of(loaded).values_LGPd)
    assert again(ids_BT).logits.isfinite().all()


def test_subfolders_and_saving_without_prefix_over_it(tmp_path):
    model = tiny_model()
    prefixed, ids_BT = with_prefix(model, compute_prefix(model, TOKENS)), text(2, 7)
    prefixed.save_pretrained(tmp_path / "sub")
    loaded = OasisForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    assert torch.equal(loaded(ids_BT).logits, prefixed(ids_BT).logits)
    model.save_pretrained(tmp_path / "sub")
    assert prefix_of(OasisForCausalLM.from_pretrained(tmp_path / "sub")) is None


def test_broken_files_are_refused(tmp_path):
    model = native()
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    config, weights = (
        tmp_path / "prefix" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    (tmp_path / "config.json").write_text("{}")
    assert load_prefix(tmp_path) is None
    prefix_of(prefixed).adapter.save(tmp_path / "prefix")
    stored = load_prefix(tmp_path)
    assert torch.equal(stored.keys_LGPd, prefix_of(prefixed).keys_LGPd)
    assert torch.equal(stored.values_LGPd, prefix_of(prefixed).values_LGPd)
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"num_layers": 3}))
    with pytest.raises(UserError, match="not a prefix of oasis-attn"):
        load_prefix(tmp_path)
    config.write_text(json.dumps(about))
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="not a prefix of oasis-attn"):
        load_prefix(tmp_path)
    prefix_of(prefixed).adapter.save(tmp_path / "prefix")
    stored.keys_LGPd[0, 0, 0, 0] = torch.nan
    stored.adapter.save(tmp_path / "prefix")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        load_prefix(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="holds only one of"):
        load_prefix(tmp_path)
