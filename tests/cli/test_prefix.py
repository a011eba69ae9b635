"""The command `oasis prefix`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from oasis_attn.cli.terminal import working
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.quantization import prefix_checkpoint
from oasis_attn.quantization.schemes import get_scheme
from tiny_models import tiny_config, tiny_wrapper_config


@pytest.fixture
def places(tmp_path, tokenizer):
    """A model whose first position is a sink, and the output folder."""
    torch.manual_seed(0)
    config = tiny_config("opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", tmp_path / "out"


def test_the_folder_holds_the_model_with_its_prefix(oasis, places, text):
    model, out = places
    shape = ("--calibration", text, "--window", 16, "--windows", 3)
    shape += ("--scheme-option", "weight.granularity=channel")
    code, shown = oasis("prefix", model, "--out", out, *shape, "--tune-steps", 2, "--json")
    record = json.loads(shown.out)
    assert (code, record["tune_steps"], record["kind"]) == (0, 2, "prefix")
    assert record["scheme"]["weight"]["granularity"] == "channel"
    loaded, _ = load_model(out)
    assert list(prefix_of(loaded).tokens) == record["tokens"]
    card = (out / "README.md").read_text()
    assert "import oasis_attn" in card
    assert "| `perplexity.quantized` after |" in card
    code, shown = oasis("prefix", model, "--out", out.parent / "2", *shape, "--method", "frequency")
    assert code == 0
    assert "tokens [1]" in shown.out
    assert shown.out.endswith(
        " --scheme w8a8-static-linear --scheme-option weight.granularity=channel\n"
    )
    assert "perplexity.quantized" in shown.out


def test_each_step_is_reported(places, text):
    model, out = places
    seen = []

    def progress(step, done=0, total=None):
        seen.append((step, done, total))

    prefix_checkpoint.prefix_checkpoint(
        model, out, length=3, tune_steps=2, window=16, windows=3, calibration=str(text),
        scheme=get_scheme("w8a8-static-linear").with_options({"weight.granularity": "channel"}),
        progress=progress,
    )  # fmt: skip
    steps = [step for step, *_ in seen]
    assert steps[0] == "loading the model"
    assert steps.count("tuning the prefix") == 2
    assert "quantized perplexity after" in steps
    assert steps[-1] == "writing"
    done = [each[1] for each in seen]
    assert done == sorted(set(done))
    assert {total for *_, total in seen} == {done[-1] + 1}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only_and_not_with_json(
    monkeypatch, capsys, as_json, terminal
):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    with working("prefix of [x]", as_json=as_json) as report:
        report("searching", 1, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("prefix of [x]: searching" in err) == (terminal and not as_json)


def test_quantizing_a_model_with_a_prefix_keeps_it(oasis, places, text):
    model, out = places
    shape = ("--calibration", text, "--window", 16, "--windows", 3)
    channel = ("--scheme-option", "weight.granularity=channel")
    assert oasis("prefix", model, "--out", out, *shape, *channel)[0] == 0
    small = out.parent / "small"
    code, _ = oasis(
        *("quantize", out, "--out", small, "--scheme", "w8a8-static-linear"),
        *("--format", "oasis", "--simulate", *shape),
    )
    assert code == 0
    ids = torch.arange(5, 12)[None]
    want = load_model(small)[0](ids).logits
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(small)
        tokens = prefix_of(AutoModelForCausalLM.from_pretrained(out)).tokens
    assert prefix_of(loaded).tokens == tokens
    assert torch.equal(loaded(ids).logits, want)
    card = (small / "README.md").read_text()
    assert "opt, w8a8-static-linear, with a prefix" in card
    assert "| `perplexity.windowed` after |" in card


def test_a_family_that_cannot_have_a_prefix_is_refused_before_the_search(
    oasis, tokenizer, tmp_path, text, monkeypatch
):
    """The vision-language wrapper of gemma3 hands its decoder finished masks."""
    monkeypatch.setattr(prefix_checkpoint, "find_prefix", pytest.fail)
    model, out = tmp_path / "model", tmp_path / "out"
    AutoModelForImageTextToText.from_config(tiny_wrapper_config("gemma3")).save_pretrained(model)
    tokenizer.save_pretrained(model)
    code, shown = oasis("prefix", model, "--out", out, "--calibration", text, "--window", 16)
    assert code == 2
    line = shown.err.splitlines()[-1]
    assert "model: family 'gemma3' cannot have a prefix: attention_mask: dict is not" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gredy"), "did you mean 'greedy'"),
        (("--scheme", "w4a16"), "'w4a16' is not static"),
        (("--length", "0"), "length: 0"),
        (("--calibration", "absent.txt"), "absent.txt"),
        (("--scheme-option", "bits=3"), "bits"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(oasis, places, text, arguments, message):
    model, out = places
    code, shown = oasis("prefix", model, "--out", out, "--calibration", text, *arguments)
    assert code == 2
    assert message in shown.err.splitlines()[-1]
    assert not out.exists()
