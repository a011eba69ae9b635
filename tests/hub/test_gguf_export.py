"""GGUF files that are written here are read again, by this library and by transformers."""

import json

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from oasis_attn.errors import UserError
from oasis_attn.hub.gguf_export import ARCHITECTURES, check_gguf, write_gguf
from oasis_attn.hub.gguf_file import read_gguf
from oasis_attn.hub.gguf_tokenizer import GGUFTokenizer
from oasis_attn.modeling.hf_compat import GGUF_PRE_TOKENIZER_SPLITS
from tiny_models import tiny_config, tiny_model, word_tokenizer
from tokenizer_factories import TEXT, byte_level, spaced

SIZES = {
    "vocab_size": 340, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.randint(3, 330, (1, 60), generator=torch.Generator().manual_seed(0))
SCALED = {"factor": 4.0, "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 128, **SCALED}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def build(kind=LlamaConfig, **changes):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def byte_fallback():
    """A tokenizer as that of Llama 2: a space precedes a text, unknown characters become bytes."""
    tokenizer = spaced("prepend")
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    fields["model"]["byte_fallback"] = True
    inner = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def split_by(pattern, **model):
    """A byte-level tokenizer that splits text by a pattern."""
    given = byte_level()
    fields = json.loads(given.backend_tokenizer.to_str())
    fields["model"] |= model
    inner = Tokenizer.from_str(json.dumps(fields))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = {"bos_token": given.bos_token, "eos_token": given.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@torch.no_grad()
def check_same(path, model):
    loaded, _ = read_gguf(path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"tie_word_embeddings": True}),
        (LlamaConfig, {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"rope_parameters": {"rope_type": "linear", **SCALED}}),
        (LlamaConfig, {"rope_parameters": LLAMA3}),
        # As in the configs of Qwen 2.5, with the old name of `rope_type`.
        (MistralConfig, {"sliding_window": None, "rope_parameters": YARN | {"type": "yarn"}}),
        (Qwen2Config, {}),
        (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 24}),
    ],
)
def test_each_family_is_read_again_exactly(tmp_path, tokenizer, kind, changes):
    model = build(kind, **changes)
    counts = write_gguf(model, tokenizer, tmp_path / "m.gguf", weights="f32")
    assert counts.keys() == {"F32"}
    check_same(tmp_path / "m.gguf", model)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "f16", "bf16"])
def test_each_type_is_what_the_gguf_library_makes_of_the_weights(tmp_path, tokenizer, weights):
    model = build(intermediate_size=80)  # down_proj has no whole number of blocks
    counts = write_gguf(model, tokenizer, tmp_path / "m.gguf", weights=weights)
    loaded, _ = read_gguf(tmp_path / "m.gguf")
    kinds = []
    for name, parameter in model.named_parameters():
        outside = "embed" in name or "lm_head" in name
        kind = gguf.GGMLQuantizationType[
            "F32" if parameter.ndim == 1
            else "F16" if "down_proj" in name and weights.startswith("q")
            else "Q8_0" if outside and weights == "q4_0"
            else weights.upper()
        ]  # fmt: skip
        kinds.append(kind.name)
        parameter.data = torch.tensor(
            gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
        )
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert counts == {kind: kinds.count(kind) for kind in counts}
    check_same(tmp_path / "m.gguf", model)


def test_a_file_is_whole_or_absent(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gguf(build(), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    model = build()
    for weights, value in {"f16": 1e5, "bf16": 3.4e38, "q8_0": 1e7, "q4_0": 1e7}.items():
        model.lm_head.weight.data[0, 0] = value
        with pytest.raises(UserError, match=r"output\.weight has numbers that are too large for"):
            write_gguf(model, tokenizer, tmp_path / "m.gguf", weights=weights)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("gemma2"), "family 'gemma2' is not one of llama, mistral, qwen2, qwen3"),
        (tiny_config("gpt_oss"), "family 'gpt_oss' is not one of"),
        (tiny_model("softmax1").config, "no GGUF architecture computes what an OASIS model does"),
        (MistralConfig(**SIZES | {"sliding_window": 64}), "sliding_window: 64 is shorter"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act: 'gelu' is not 'silu'"),
        (Qwen3Config(**SIZES, attention_bias=True), "attention_bias: qwen3 has none"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", **SCALED}), "'dynamic' is"),
        (
            Qwen2Config(**SIZES | {"head_dim": 24}),
            r"head_dim: 24 x 4 heads is not hidden_size, 64, which llama\.cpp",
        ),
        (Qwen2Config(**SIZES, rope_parameters=LLAMA3), "rope_type 'llama3' is not one of"),
        (
            LlamaConfig(**SIZES, rope_parameters=YARN | {"attention_factor": 1.5}),
            "attention_factor",
        ),
        (LlamaConfig(**SIZES, rope_parameters=YARN | {"factor": None}), "factor None is not a num"),
        (
            Qwen3Config(**SIZES, rope_parameters=YARN | {"beta_fast": 16.0}),
            r"beta_fast 16\.0 is not 32, which llama\.cpp uses for qwen3",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_its_config(config, message):
    with pytest.raises(UserError, match=message) as caught:
        check_gguf(config)
    assert "\n" not in str(caught.value)


def test_every_architecture_is_known_to_the_gguf_library():
    assert {*ARCHITECTURES.values()} <= {*gguf.MODEL_ARCH_NAMES.values()}


@pytest.mark.parametrize(
    ("make", "model", "pre"),
    [
        (byte_level, "gpt2", "smollm"),
        (byte_fallback, "llama", "default"),
        (lambda: split_by(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "gpt2", "dbrx"),
        (
            lambda: split_by(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"], ignore_merges=True),
            "gpt2",
            "llama-bpe",
        ),
        (lambda: split_by(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "gpt2", "qwen2"),
    ],
)
def test_tokenizers_are_read_again(tmp_path, make, model, pre):
    tokenizer = make()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    size = len(tokenizer) + 3
    described = GGUFTokenizer.of(tokenizer, size)
    assert (described.model, described.pre) == (model, pre)
    assert described.types[-3:] == [gguf.TokenType.UNUSED] * 3
    write_gguf(build(vocab_size=size), tokenizer, tmp_path / "m.gguf")
    _, again = read_gguf(tmp_path / "m.gguf")
    for text in [*TEXT, "a b", "pens.\n\n 12"]:
        assert again(text).input_ids == tokenizer(text).input_ids, text
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos", "eos", "unk", "pad"):
        want = getattr(tokenizer, f"{name}_token_id")
        assert want is None or getattr(again, f"{name}_token_id") == want


def test_a_token_without_an_embedding_is_refused():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<image>"])
    with pytest.raises(
        UserError, match=r"its token '<image>' is number 330, but .* 330 embeddings"
    ):
        GGUFTokenizer.of(tokenizer, len(tokenizer) - 1)


def test_tokenizers_without_a_name_are_refused():
    with pytest.raises(UserError, match="its model is WordLevel, not BPE"):
        GGUFTokenizer.of(word_tokenizer(), 97)
    with pytest.raises(UserError, match=r"pre-tokenizer Split \+ ByteLevel has no name"):
        GGUFTokenizer.of(split_by("[a-z]+"), 340)
    inner = Tokenizer(models.BPE({"a": 0, "b": 1}, [], byte_fallback=True))
    with pytest.raises(UserError, match="normalizer none and pre-tokenizer none are unknown"):
        GGUFTokenizer.of(PreTrainedTokenizerFast(tokenizer_object=inner), 2)
    tokenizer = split_by(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="it adds the tokens"):
        GGUFTokenizer.of(tokenizer, 340)
