"""The authors' form against a straight reading of it: stacked states, a key for each, a map."""

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from authors_form import AuthorsForm
from oasis_attn import OasisForCausalLM, UserError, convert
from oasis_attn.data import train_tokenizer
from oasis_attn.hub.convert import convert_checkpoint
from tiny_models import tiny_config, tiny_model


def exact_norm(self, x):
    """The family's own runs in float32 whatever it is given."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    text = tiny_config(initializer_range=0.2, num_key_value_heads=4)
    ours = tiny_model("official", text=text, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "attn_res_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    reference = AuthorsForm(text).double()
    renamed = {
        name.replace("model.", "backbone.", 1) if name.startswith("model.") else name: value
        for name, value in ours.state_dict().items()
    }
    reference.load_state_dict(renamed)  # strict: the authors' key names, all of them
    return ours, reference


def test_logits_and_gradients_equal_the_reference(pair, ids):
    ours, reference = pair
    logits = ours(ids).logits, reference(ids)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
    upstream = torch.randn_like(logits[0])
    for each in logits:
        each.backward(upstream)
    gradients = {name.partition(".")[2]: p.grad for name, p in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gradients[name.partition(".")[2]]
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-9, msg=name)


def test_key_names_are_the_authors():
    names = {name for name in tiny_model("official").state_dict() if "layers.1.attn_res" in name}
    assert names == {
        f"model.layers.1.attn_res_{part}.{name}"
        for part in ("sa", "mlp")
        for name in ("q_proj.weight", "k_proj.weight", "recency_bias", "oasis_beta_raw")
    }


def test_a_checkpoint_of_theirs_loads_by_key_names(tmp_path, ids):
    """A backbone's config, and router weights beside the backbone's own."""
    ours = tiny_model("official", text=tiny_config(vocab_size=300))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    ours.config.text_config.save_pretrained(theirs)
    save_file(ours.state_dict(), theirs / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(["some text"], 258).save_pretrained(theirs)
    with pytest.raises(UserError, match="token_normalizer: required, because the authors"):
        convert(theirs, "official", depth_normalizer="softmax1")
    normalizers = {"token_normalizer": "softmax1", "depth_normalizer": "softmax1"}
    convert_checkpoint(theirs, tmp_path / "ours", variant="official", overrides=normalizers)
    again = OasisForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)
    with pytest.raises(UserError, match="has 8 unexpected weights"):  # no beta without the signal
        convert(theirs, "official", null_signal="off", **normalizers)


@pytest.fixture
def learned():
    """A model whose routers matter."""
    model = tiny_model("official")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_res_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_offloaded_layers_give_the_same_logits(learned, ids, tmp_path):
    learned.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    offloaded = OasisForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(offloaded.eval()(ids).logits, learned(ids).logits)


def test_every_adapter_learns_and_can_be_merged(learned, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(learned, config).double().eval()
    adapted(ids, labels=ids).loss.backward()
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("attn_res_" in name for name in adapters)
    assert all(parameter.grad is not None for parameter in adapters.values())
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
        before = adapted(ids).logits
        after = adapted.merge_and_unload()(ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # norms run in float32
