"""The record of a conversion has the numbers of an eager computation."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeLlamaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from oasis_attn import OasisForCausalLM, UserError
from oasis_attn.cli import main
from oasis_attn.data import load_corpus, read_windows
from oasis_attn.data.tokenizer import tokenizer_sha256
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_card import write_card
from oasis_attn.hub.tokenizer_bos import is_without_bos, without_bos
from oasis_attn.measure.sink_conversion import measure_sink, null_from_sink_checkpoint
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.records import Record
from tiny_models import VOCABULARY, tiny_config, word_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    config = tiny_config(initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, step in (("train", 7), ("test", 11)):
        line = " ".join(f"w{step * i % VOCABULARY}" for i in range(300))
        (folder / f"{split}.txt").write_text(line)
    return str(folder)


@torch.no_grad()
def eager(model, ids):
    """Perplexity, mean and largest first-token probability, and the largest |x| of each layer."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in decoder_map(model).layers
    ]
    found = model(ids, labels=ids, output_attentions=True)
    for hook in hooks:
        hook.remove()
    mass = torch.stack([p[:, :, 1:, 0].mean((0, 2)) for p in found.attentions])
    return math.exp(found.loss), mass, [x.abs().max().item() for x in outputs], outputs


def test_the_record(model, text, tmp_path):
    out = tmp_path / "out"
    record = null_from_sink_checkpoint(
        model, out, nulls=2, calibration=text, window=16, windows=3, dtype="float32"
    )
    assert record == Record.load(out / "record.json")
    assert record.config["token_normalizer"] == {"name": "key_value_null", "nulls": 2}
    assert (record.nulls, len(record.tokens)) == (2, 1)
    assert record.texts == (f"w{record.tokens[0]}",)
    ids = read_windows(load_corpus(text, "test"), word_tokenizer(), window=16, windows=3).ids_NT
    assert ids[:, 0].eq(1).all()  # BOS
    native = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    converted = OasisForCausalLM.from_pretrained(out).eval()
    for where, each in (("before", native), ("after", converted)):
        perplexity, mass, sizes, outputs = eager(each, ids)

        def value(name, where=where):
            return record.metric(name, where).value

        assert value("perplexity.windowed") == pytest.approx(perplexity, rel=1e-5)
        assert value("loss.windowed") == pytest.approx(math.log(perplexity), rel=1e-5)
        assert value("sink.mass") == pytest.approx(mass.mean().item(), rel=1e-4)
        assert value("sink.max_mass") == pytest.approx(mass.max().item(), rel=1e-4)
        assert value("outlier.max_activation") == pytest.approx(max(sizes), rel=1e-5)
        rows = record.tables[where]["largest"]
        for row, size, x in zip(rows, sizes, outputs, strict=True):
            assert abs(row["value"]) == pytest.approx(size, rel=1e-5)
            n, t, channel = torch.unravel_index(x.abs().argmax(), x.shape)
            assert (row["position"], row["channel"]) == (t, channel)
            assert row["token"] == ids[n, t]
            assert row["text"] == f"w{row['token']}"
    card = (out / "README.md").read_text()
    assert "`perplexity.windowed` after" in card
    assert "MLP neurons" not in card
    replace(record, neurons=((1, 7), (0, 3))).save(out / "record.json")
    write_card(converted, out)
    card = (out / "README.md").read_text()
    assert "activations are switched off: 7 of layer 1, 3 of layer 0." in card
    assert "OasisForCausalLM" in (out / "config.json").read_text()
    with pytest.raises(UserError, match="exists"):
        null_from_sink_checkpoint(model, out, calibration=text)


def bos_template(words):
    """A tokenizer like that of Llama, whose post-processor puts w1 in front of texts."""
    template = processors.TemplateProcessing("w1 $A", "w1 $A w1 $B w2", [("w1", 1), ("w2", 2)])
    words.backend_tokenizer.post_processor = template
    return words


@torch.no_grad()
def test_a_null_from_bos_is_measured_on_texts_without_bos(model, text, tmp_path):
    tokenizer = bos_template(word_tokenizer())
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    options = {"calibration": text, "window": 16, "windows": 3, "dtype": "float32"}
    with pytest.warns(UserWarning, match="its chat template writes BOS"):
        record = null_from_sink_checkpoint(model, tmp_path / "out", null_from_bos=True, **options)
    assert record == Record.load(tmp_path / "out" / "record.json")
    assert (record.bos, record.layer_0, record.data.bos) == ("w1", None, 1)
    assert record.data.tokens_scored == 3 * 14
    native = AutoModelForCausalLM.from_pretrained(model).eval()
    converted = OasisForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = read_windows(load_corpus(text, "test"), tokenizer, window=16, windows=3).ids_NT
    for where, each, begin in (("before", native, 0), ("after", converted, 1)):
        logits = each(ids[:, begin:]).logits[:, -15:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        assert record.metric("loss.windowed", where).value == pytest.approx(float(loss), rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A null has the place of BOS (`w1`)" in card
    # Every command reads the converted model's texts without BOS.
    folders = tmp_path / "out", tmp_path / "again"
    loaded = AutoTokenizer.from_pretrained(folders[0])
    loaded.save_pretrained(folders[1])
    for reloaded in map(AutoTokenizer.from_pretrained, folders):
        assert reloaded("w5 w6").input_ids == [5, 6]
        assert tokenizer_sha256(reloaded) != tokenizer_sha256(tokenizer)
        windows = read_windows(load_corpus(text, "test"), reloaded, window=15, windows=3)
        assert windows.info.bos is None
    torch.testing.assert_close(windows.ids_NT[0], ids[0, 1:])


def byte_level(words):
    """As that of Llama 3: the template is one of several steps."""
    words = bos_template(words).backend_tokenizer
    words.post_processor = processors.Sequence([processors.ByteLevel(), words.post_processor])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")


def llama(words):
    """The class of a family, which can add BOS by itself."""
    words = LlamaTokenizer(vocab={f"w{i}": i for i in range(9)}, bos_token="w1", eos_token="w2")
    words.add_bos_token = True
    return words


@pytest.mark.parametrize("form", [bos_template, byte_level, llama])
def test_a_tokenizer_without_bos(form, tmp_path):
    tokenizer = form(word_tokenizer())
    assert tokenizer("w5").input_ids[0] == 1
    changed = without_bos(tokenizer, 1)
    changed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    for each in (changed, loaded):
        assert is_without_bos(each)
        assert each.bos_token_id == 1
        assert each("w5").input_ids == tokenizer("w5").input_ids[1:]
        pair, shorter = tokenizer("w5", "w6").input_ids, each("w5", "w6").input_ids
        assert shorter == [token for token in pair if token != 1]
    assert tokenizer("w5").input_ids[0] == 1
    assert not is_without_bos(tokenizer)


def test_a_tokenizer_that_adds_bos_when_it_is_loaded():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    tokenizer = CodeLlamaTokenizer(vocab=vocabulary, merges=[("\u2581", "a")])
    with pytest.raises(UserError, match="CodeLlamaTokenizer adds it again when it is loaded"):
        without_bos(tokenizer, tokenizer.bos_token_id)


def roberta(words):
    words.backend_tokenizer.post_processor = processors.RobertaProcessing(("w2", 2), ("w1", 1))
    return words


def no_special_tokens(words):
    return PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (roberta, r"null_from_bos: BOS cannot be taken out .* is \['RobertaProcessing'\]"),
        (no_special_tokens, "null_from_bos: the tokenizer puts no BOS in front of texts"),
    ],
)
def test_bos_that_cannot_be_left_out(form, message, model, text, tmp_path):
    form(word_tokenizer()).save_pretrained(model)
    options = {"calibration": text, "window": 16, "null_from_bos": True}
    with pytest.raises(UserError, match=message):
        null_from_sink_checkpoint(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nulls": 0}, "nulls: 0 is not"),
        ({"window": 2}, "window: 2 is not"),
        ({"windows": 0}, "windows: 0 is not"),
        ({"window": 100}, "window: 100 tokens are more than the model's 64 positions"),
        ({"calibration_split": "validation"}, "calibration_split .*: 'validation' is not one"),
        ({"evaluation": "no/such/text"}, "evaluation: 'no/such/text' does not exist"),
        ({"overrides": {"null_logit": 1.0}}, "null_logit: the conversion sets it"),
        ({"variant": "gated_attention"}, "output_gate: 'head' scales"),
    ],
)
def test_bad_input_writes_nothing(model, text, tmp_path, options, message):
    given = {"calibration": text, "window": 16, "windows": 3} | options
    with pytest.raises(UserError, match=message):
        null_from_sink_checkpoint(model, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_too_little_text(model, tmp_path):
    (tmp_path / "short").mkdir()
    for split in ("train", "test"):
        (tmp_path / "short" / f"{split}.txt").write_text("w5 w6 w7")
    with pytest.raises(UserError, match="less than"):
        null_from_sink_checkpoint(
            model, tmp_path / "out", calibration=str(tmp_path / "short"), window=16
        )


def test_the_commands_of_the_page(model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    names = {"smollm2": model.name, "pydoc": text}
    commands = [[names.get(word, word) for word in line.split()] for line in block[1].splitlines()]
    assert [words[1] for words in commands] == ["convert", "diagnose", "quantize"]
    for words in commands:
        monkeypatch.setattr("sys.argv", [*words, "--window", "16", "--windows", "3"])
        assert main() == 0
    converted, quantized = (
        Record.load(tmp_path / name / "record.json") for name in ("retrofitted", "quantized")
    )
    after = converted.metric("perplexity.windowed", "after").value
    assert quantized.metric("perplexity.windowed", "before").value == pytest.approx(after)


def test_a_model_whose_activations_are_all_0(model, text):
    silent, tokenizer = load_model(model)
    silent.get_input_embeddings().weight.data.zero_()
    windows = read_windows(load_corpus(text, "test"), tokenizer, window=16, windows=2)
    _, tables = measure_sink(silent, windows)
    assert [row["value"] for row in tables["largest"]] == [0.0] * 4
    assert all("token" in row for row in tables["largest"])
