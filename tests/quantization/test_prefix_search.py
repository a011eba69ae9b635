"""A prefix is found for a model with a planted sink, and refused for a model without sinks."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import Prefix, compute_prefix, prefix_of, with_prefix
from oasis_attn.quantization import quantize, schemes
from oasis_attn.quantization.options import PREFIX_METHODS
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.prefix_search import (
    find_prefix,
    max_activations,
    outlier_tokens,
    range_noise,
    tune_prefix,
)
from oasis_attn.records import PrefixRecord
from tiny_models import VOCABULARY, tiny_config, tiny_model

BOS = 1
STATIC = schemes()["w8a8-static-linear"]
CHANNELS = replace(STATIC, weight=replace(STATIC.weight, granularity="channel"))


def model_with_sink(positions=1, size=1e4):
    """An OPT model with a massive activation at the first positions, in all layers and MLPs."""
    torch.manual_seed(0)
    config = tiny_config(
        "opt",
        ffn_dim=48,
        word_embed_proj_dim=32,
        init_std=0.2,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # rows 0 and 1 of OPT's table are not used for positions
        table = model.get_decoder().embed_positions.weight
        table[2 : 2 + positions, 3] = size
        for layer in model.get_decoder().layers:  # after the norm it is 5.6; others are below 4
            layer.fc1.weight[0], layer.fc1.weight[0, 3], layer.fc1.bias[0] = 0, 1000, -4000
            layer.fc2.weight[:, 0] = 0
    return model


def text(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def test_every_module_keeps_its_mode():
    model = model_with_sink().train()
    model.get_decoder().layers[0].eval()
    modes = [module.training for module in model.modules()]
    outlier_tokens(model, text(1, 5))
    compute_prefix(model, (3, 4))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("method", PREFIX_METHODS)
def test_one_token_absorbs_the_sink(method):
    model, ids_BT = model_with_sink(), text(3, 12)
    assert outlier_tokens(model, ids_BT).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    tokens = find_prefix(model, ids_BT, method=method)
    assert len(tokens) == 1
    if method == "frequency":
        assert tokens == (BOS,)
    prefixed = with_prefix(model, compute_prefix(model, tokens))
    assert not outlier_tokens(prefixed, ids_BT).any()
    assert (
        max_activations(prefixed, [ids_BT])["hidden"]
        < 1e-3 * max_activations(model, [ids_BT])["hidden"]
    )


@pytest.mark.parametrize("method", PREFIX_METHODS)
def test_two_tokens_are_used_if_one_does_not_help(method):
    model, ids_BT = model_with_sink(positions=2), text(3, 12)
    tokens = find_prefix(model, ids_BT, method=method, length=3)
    assert len(tokens) == 2
    with pytest.raises(UserError, match="no prefix of up to 1 tokens"):
        find_prefix(model, ids_BT, method=method, length=1)


def test_greedy_chooses_the_best_candidate():
    model, ids_BT = model_with_sink(), text(2, 10)
    noise_C = range_noise(model, ids_BT, [[token] for token in range(3, 40)])
    assert find_prefix(model, ids_BT, candidates=range(3, 40)) == (3 + int(noise_C.argmin()),)


def test_outlier_tokens_are_found():
    model, ids_BT = tiny_model("vanilla", dtype=torch.float64), text(4, 12)
    ids_BT[:, 5], ids_BT[0, 8] = 40, 41
    with torch.no_grad():
        model.get_input_embeddings().weight[40:42, 3] = 1e4
    assert sorted(set(ids_BT[outlier_tokens(model, ids_BT)].tolist())) == [40, 41]
    # These are outliers because of their own embedding, so no prefix helps.
    with pytest.raises(UserError, match="no prefix of up to 4 tokens found by 'frequency' halves"):
        find_prefix(model, ids_BT, method="frequency")


def test_a_model_without_sinks_needs_no_prefix():
    with pytest.raises(UserError, match=r"needs no prefix, .* 64 times"):
        find_prefix(tiny_model("oasis"), text(2, 10), length=1)
    silent = tiny_model("oasis")
    silent.get_input_embeddings().weight.data.zero_()  # all tensors are 0, and so is the noise
    with pytest.raises(UserError, match=r"needs no prefix, .* 64 times"):
        find_prefix(silent, text(2, 10), length=1)


def test_special_tokens_without_an_embedding_are_not_tried():
    model, ids_BT = model_with_sink(), text(3, 12)
    expected = find_prefix(model, ids_BT)
    model.config.eos_token_id = [2, 50256]  # GPT-2's, in a model with fewer tokens
    assert find_prefix(model, ids_BT) == expected
    model.config.bos_token_id = 50256
    assert max(find_prefix(model, ids_BT)) < VOCABULARY


@pytest.mark.parametrize("model", [model_with_sink(), tiny_model("oasis", dtype=torch.float64)])
def test_noise_equals_that_of_the_model_with_the_prefix(model):
    ids_BT, prefixes = text(3, 9), [(5, 6), (7, 8), (BOS, 9)] * 3
    together = range_noise(model, ids_BT, prefixes)
    for prefix, noise in zip(prefixes, together, strict=True):
        behind = with_prefix(model, compute_prefix(model, prefix))
        alone = range_noise(behind, ids_BT, [()])
        torch.testing.assert_close(alone, noise[None], atol=0, rtol=1e-9)


def test_noise_of_one_layer_against_its_definition():
    model, ids_BT = tiny_model("vanilla", dtype=torch.float64), text(3, 9)
    model.model.layers = model.model.layers[:1]
    model.config.text_config.num_hidden_layers = 1
    layer, seen = model.model.layers[0], []
    hooks = [
        getattr(part, name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for part, name in (
            (layer.self_attn, "q_proj"),
            (layer.self_attn, "o_proj"),
            (layer.mlp, "up_proj"),
            (layer.mlp, "down_proj"),
        )
    ]
    hooks.append(layer.register_forward_hook(lambda _m, _a, out: seen.append(out)))
    with torch.no_grad():
        model.base_model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    each = [
        ((x.max() - x.min()) / 255) ** 2 / 12 / x.pow(2).mean(-1).flatten().median() for x in seen
    ]
    assert range_noise(model, ids_BT, [()]).item() == pytest.approx(float(sum(each) / len(each)))
    largest = max_activations(model, ids_BT.split(1))
    assert largest["linear"] == max(float(x.abs().max()) for x in seen[:-1])
    assert largest["hidden"] == float(seen[-1].abs().max())


@torch.no_grad()
def test_static_quantization_error_is_lower_with_the_prefix():
    model, ids_BT, calibration = model_with_sink(), text(4, 12), text(8, 12).split(1)
    prefixed = with_prefix(model, compute_prefix(model, (BOS,)))

    def error(of):
        quantized = quantize(of, CHANNELS, calibration=calibration)
        return float((quantized(ids_BT).logits - of(ids_BT).logits).std())

    assert error(prefixed) < 0.1 * error(model)
    quantized = quantize(prefixed, calibration=calibration)
    assert torch.equal(prefix_of(quantized).keys_LGPd, prefix_of(prefixed).keys_LGPd)


@torch.no_grad()
def test_a_quantized_model_is_saved_with_the_prefix(stored):
    loaded, tokenizer = load_model(stored / "model")
    prefixed = with_prefix(loaded, compute_prefix(loaded, (BOS, 5)))
    quantized = quantize(prefixed, CHANNELS, calibration=text(8, 12).split(1))
    quantized.save_pretrained(stored / "out")
    tokenizer.save_pretrained(stored / "out")
    again, _ = load_model(stored / "out")
    assert prefix_of(again).tokens == (BOS, 5)
    assert torch.equal(again(text(2, 9)).logits, quantized(text(2, 9)).logits)


def test_tuning_trains_the_prefix_and_nothing_else():
    model, batches = model_with_sink(), list(text(8, 12).split(4))
    before = copy.deepcopy(model.state_dict())
    prefix = compute_prefix(model, (BOS,))

    def objective(of, weight):
        quantized_model = with_prefix(model, of)
        losses = [quantized_model(ids, labels=ids).loss.item() for ids in batches]
        noises = [range_noise(quantized_model, ids, [()]).log().item() for ids in batches]
        return sum(losses) / len(losses) + weight * sum(noises) / len(noises)

    kept = prefix.keys_LGPd.clone()
    with torch.no_grad():  # tuning works even with gradients disabled
        tuned = tune_prefix(model, prefix, batches, steps=20, learning_rate=1e-2)
    assert objective(tuned, 0.1) < objective(prefix, 0.1) - 1e-3
    assert tuned.tokens == prefix.tokens
    assert not any(x.requires_grad for x in (tuned.keys_LGPd, tuned.values_LGPd))
    assert torch.equal(prefix.keys_LGPd, kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    plain = tune_prefix(model, prefix, batches, steps=20, learning_rate=1e-2, noise_weight=0)
    assert objective(plain, 0) < objective(tuned, 0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "greedily"}, "did you mean 'greedy'"),
        ({"length": 0}, "length: 0"),
        ({"candidates": []}, "candidates: it is empty"),
        ({"candidates": [VOCABULARY]}, "candidates: token ids"),
        ({"candidates": [3], "method": "frequency"}, "does not use them"),
        ({"ids_BT": text(2, 9).float()}, "ids_BT: torch.float32"),
        ({"ids_BT": text(9)}, "is not int64"),
        ({"ids_BT": text(2, 9) - 50}, "token ids -"),
    ],
)
def test_bad_searches_are_refused(keywords, message):
    with pytest.raises(UserError, match=message):
        find_prefix(**{"model": model_with_sink(), "ids_BT": text(2, 9)} | keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"learning_rate": 0}, "learning_rate: 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"noise_weight": -1}, "noise_weight: -1"),
        ({"batches": []}, "batches: it is empty"),
    ],
)
def test_bad_tuning_is_refused(keywords, message):
    model = model_with_sink()
    given = {"prefix": compute_prefix(model, (BOS,)), "batches": [text(2, 9)], "steps": 1}
    with pytest.raises(UserError, match=message):
        tune_prefix(model, **given | keywords)


def test_a_second_prefix_is_refused():
    model = model_with_sink()
    prefixed = with_prefix(model, compute_prefix(model, (BOS,)))
    with pytest.raises(UserError, match="already has a prefix"):
        find_prefix(prefixed, text(2, 9))


@pytest.fixture
def stored(tmp_path):
    """A model with a sink, its tokenizer, and a text."""
    model_with_sink().float().save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w1", eos_token="w2").save_pretrained(
        tmp_path / "model"
    )
    rows = [" ".join(f"w{token}" for token in row) for row in text(40, 30).tolist()]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.txt").write_text("\n\n".join(rows))
    (tmp_path / "text" / "seen.txt").write_text("\n\n".join(rows[::2]))
    return tmp_path


@pytest.mark.parametrize("method", PREFIX_METHODS)
def test_prefix_checkpoint(stored, method):
    record = prefix_checkpoint(
        stored / "model", stored / "out", method=method, length=2, tune_steps=2, scheme=CHANNELS,
        calibration=str(stored / "text"), calibration_split="seen", window=16, windows=4,
    )  # fmt: skip
    values = {(m.name, m.where): m.value for m in record.metrics}
    assert len(values) == 10
    for name in ("noise", "max_linear", "max_hidden"):
        assert values[f"prefix.{name}", "after"] < values[f"prefix.{name}", "before"]
    rise = {
        where: values["perplexity.quantized", where] - values["perplexity.windowed", where]
        for where in ("before", "after")
    }
    assert abs(rise["after"]) < 0.2 * abs(rise["before"])
    assert record.text == " ".join(f"w{t}" for t in record.tokens)
    assert PrefixRecord.load(stored / "out" / "record.json").metrics == record.metrics
    loaded, _ = load_model(stored / "out")
    assert tuple(prefix_of(loaded).tokens) == record.tokens
    json.loads(record.to_json())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scheme": "w8a8-dynamic"}, "scheme: 'w8a8-dynamic'"),
        ({"method": "best"}, "method: 'best'"),
        ({"tune_steps": -1}, "tune_steps: -1"),
        ({"window": 1}, "window: 1"),
        ({"window": 62}, "window with the prefix: 66 tokens are more than the model's 64"),
        ({"scheme": schemes()["w4a16"]}, "'w4a16' is not static"),
        ({"evaluation_split": "tset"}, "did you mean 'test'"),
        ({"out": "."}, "out: '.' exists"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(stored, keywords, message):
    given = {"model": stored / "model", "out": stored / "out", "calibration_split": "seen"}
    given["calibration"] = str(stored / "text")
    with pytest.raises(UserError, match=message):
        prefix_checkpoint(**given | keywords)
    assert not (stored / "out").exists()


def test_prefixes_have_a_length():
    prefix = compute_prefix(model_with_sink(), (BOS, 5))
    assert isinstance(prefix, Prefix)
    assert len(prefix) == 2
