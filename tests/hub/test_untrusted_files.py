"""What a checkpoint's files may hold: code that must not run, and nonsense."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from oasis_attn import OasisForCausalLM, quantize
from oasis_attn.cli import main
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.hub import convert as converting
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.training import TrainingConfig, train
from tiny_models import tiny_config, tiny_model, word_tokenizer

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class MyConfig(LlamaConfig):
    model_type = "my_model"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama checkpoint with every JSON file that it can have."""
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def outcome(folder) -> str:
    """What loading says; any other exception passes."""
    try:
        load_model(folder)
    except UserError as error:
        said = str(error)
    else:
        said = "loaded"
    assert "\n" not in said
    return said


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def marker(folder, tmp_path, monkeypatch):
    """The file that the folder's code makes when it runs; the user would answer "y"."""
    path = tmp_path / "ran"
    code = CODE.format(marker=str(path))
    (folder / "code.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(): pass")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    return path


def _code_of(folder, part):
    if part == "tokenizer":
        auto_map = {"AutoTokenizer": [None, "code.MyTokenizer"]}
        edit(folder / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=auto_map)
        edit(folder / "config.json", tokenizer_class=None)
    else:
        auto_map = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
        edit(folder / "config.json", model_type="my_model", auto_map=auto_map)


@pytest.mark.parametrize(
    "use",
    [
        load_model,
        converting.convert,
        lambda folder: converting.convert_checkpoint(folder, folder.parent / "out"),
        lambda folder: quantize_checkpoint(folder, folder.parent / "out"),
        lambda folder: prefix_checkpoint(folder, folder.parent / "out"),
        evaluate,
        lambda folder: train(TrainingConfig(from_model=folder, out=folder.parent / "out")),
        text_config,
        lambda folder: text_config(folder / "config.json"),
    ],
)
def test_code_is_refused_without_a_question(folder, marker, use):
    _code_of(folder, "model")
    with pytest.raises(UserError) as caught:
        use(folder)
    assert "trust_remote_code" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("verb", ["diagnose", "evaluate", "convert", "quantize", "prefix", "train"])
def test_every_command_refuses_code_in_one_line(folder, marker, verb, monkeypatch, capsys):
    _code_of(folder, "model")
    out = folder.parent / "out"
    words = {
        "convert": [folder, "--out", out],
        "prefix": [folder, "--out", out],
        "quantize": [folder, "--out", out],
        "train": ["--from", folder, "--out", out],
    }.get(verb, [folder])
    monkeypatch.setattr("sys.argv", ["oasis", verb, *map(str, words)])
    assert main() == 2
    shown = capsys.readouterr()
    assert "allow it with --trust-remote-code" in shown.err.splitlines()[-1]
    assert shown.out == ""
    assert not marker.exists()


def test_a_tokenizers_code_is_refused(folder, marker):
    _code_of(folder, "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer needs Python code .* allow it with --trust"):
        load_model(folder)
    assert not marker.exists()


def test_the_code_of_a_family_that_transformers_has_does_not_run(folder, marker):
    auto_map = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    edit(folder / "config.json", auto_map=auto_map)
    assert type(load_model(folder)[0]).__name__ == "LlamaForCausalLM"
    assert text_config(folder).model_type == "llama"
    assert not marker.exists()


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_is_allowed_runs(folder, marker, part):
    ids = torch.arange(3, 9)[None]
    expected = load_model(folder)[0](ids).logits
    _code_of(folder, part)
    model, tokenizer = load_model(folder, trust_remote_code=True)
    assert marker.exists()
    assert "My" in type({"model": model, "tokenizer": tokenizer}[part]).__name__
    assert torch.equal(model(ids).logits, expected)


def test_attention_from_the_hub_is_code(folder):
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        edit(folder / "config.json", **{name: "someone/attention"})
        with pytest.raises(UserError, match=f"{name}: 'someone/attention' names code on the Hub"):
            load_model(folder)
        edit(folder / "config.json", **{name: None})


FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "{", "", "[" * 3000, "9" * 5000])
def test_a_file_that_holds_no_object_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "none"}, "KeyError"),
        ({"to_dict": 1}, "to_dict is not a config field"),
        ({"hidden_size": 10**9}, "describes a larger model than its weight files hold"),
        ({"intermediate_size": 10**12}, "describes a larger model than its weight files hold"),
        ({"vocab_size": 10**10}, "describes a larger model than its weight files hold"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is more than 10000"),
        ({"num_labels": 10**9}, "num_labels: 1000000000 is more than 10000"),
        ({"rms_norm_eps": -1.0}, "it computes NaN"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights: only"),
    ],
)
def test_settings_that_no_model_can_have(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [{}, [], 3, True, "int8", {"a": 1}, {"quant_method": None}, {"quant_method": "none"},
     {"quant_method": ["oasis"]}, {"quant_method": "oasis"},
     {"quant_method": "oasis", "targets": 3}, {"quant_method": "gptq"},
     {"quant_method": "bitsandbytes"}, {"quant_method": "torchao"},
     {"quant_method": "oasis", "scheme": {}, "targets": [1], "transforms": {}}],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_quantization_that_is_none(folder, tmp_path, value, nested):
    if nested:
        folder = tmp_path / "ours"
        tiny_model().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit(folder / "config.json", text_config=text | {"quantization_config": value})
    else:
        edit(folder / "config.json", quantization_config=value)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, True, 3, "x", -1, [], [1], {}, {"a": 1}, [["a", 1]]])
def test_a_quantized_models_own_settings(tmp_path, value):
    folder = tmp_path / "quantized"
    quantize(tiny_model(), "w8a8-dynamic").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    fields = config["text_config"]["quantization_config"]
    good = dict(fields)
    for name in good:
        fields[name] = value
        (folder / "config.json").write_text(json.dumps(config))
        outcome(folder)
        fields[name] = good[name]


@pytest.mark.parametrize("text", [None, [], 3, "absent"])
def test_a_checkpoint_of_ours_names_its_family(tmp_path, text):
    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if text == "absent":
        del config["text_config"]
    else:
        config["text_config"] = text
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, OasisForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="text_config: "):
            load(tmp_path)


def test_sizes_are_checked_as_models_are(folder):
    path = folder / "config.json"
    good = path.read_text()
    for changes, message in (
        ({"num_attention_heads": 0}, "is not a Hugging Face configuration"),
        ({"hidden_act": "none"}, "is not a Hugging Face configuration"),
        ({"hidden_size": 10**9}, "does not fit in the memory"),
        ({"num_hidden_layers": 10**9}, "is more than 10000"),
        ({"to_dict": 1}, "to_dict is not a config field"),
    ):
        edit(path, **changes)
        with pytest.raises(UserError, match=message) as caught:
            TrainingConfig(size=path, out=folder / "out")
        assert "\n" not in str(caught.value)
        path.write_text(good)


def _split(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    placed = {name: file for file, held in parts.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index, placed


def test_sharded_weights(folder):
    whole = load_model(folder)[0].state_dict()
    _split(folder)
    for name, tensor in load_model(folder)[0].state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_weights_that_nothing_reads(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "old.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"old\.safetensors would not be read"):
        load_model(folder)
    (folder / "old.safetensors").unlink()
    index, placed = _split(folder)
    norm = "model.norm.weight"
    for weight_map, message in (
        ({k: v for k, v in placed.items() if v == "a.safetensors"}, r"b\.safetensors would not be"),
        ({k: v for k, v in placed.items() if k != norm}, rf"{norm} of b.* is only in the file"),
        (placed | {"model.x": "a.safetensors"}, r"model\.x of a.* is only in the index"),
        (placed | {norm: "c.safetensors"}, r"c\.safetensors does not exist"),
        (placed | {norm: "../a.safetensors"}, "'../a.safetensors' is not a file name"),
        (placed | {norm: 3}, "3 is not a file name"),
        ([], "weight_map does not map"),
        ({}, "weight_map does not map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            load_model(folder)


def test_an_adapter_is_not_merged_in_passing(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="this is a PEFT adapter; merge it"):
        load_model(folder)
