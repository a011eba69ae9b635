"""The command `oasis convert`."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.cli.convert import _conclusion
from oasis_attn.records import Record
from tiny_models import tiny_config


@pytest.fixture
def vanilla(tmp_path, tokenizer):
    folder = tmp_path / "vanilla"
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_there_and_back(oasis, vanilla, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    settings = ("--config", "depth_block_size=4", "--config", "null_signal=shuffled")
    settings += ("--dtype", "float64")
    code, shown = oasis("convert", vanilla, "--out", ours, *settings, "--json")
    facts = json.loads(shown.out)
    assert (code, facts["family"], facts["dtype"]) == (0, "llama", "float64")
    assert (facts["depth_block_size"], facts["null_signal"]) == (4, "shuffled")
    code, shown = oasis("convert", ours, "--out", back, "--to-vanilla", "--dtype", "float32")
    assert code == 0
    assert "model_type" in shown.out
    ids = torch.arange(9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (vanilla, back)]
    assert torch.equal(*logits)


def test_a_model_with_sinks_is_served_next(oasis, vanilla, tmp_path):
    oasis("convert", vanilla, "--out", tmp_path / "ours", "--variant", "learned_sink")
    out = tmp_path / "sinks"
    code, shown = oasis("convert", tmp_path / "ours", "--out", out, "--to-sinks")
    assert code == 0
    last = f"Saved: {out}. To serve it: vllm serve {out} --dtype bfloat16"
    assert shown.out.splitlines()[-1] == last


def test_null_from_sink(oasis, vanilla, text, tmp_path):
    out = tmp_path / "out"
    given = ("--null-from-sink", "--calibration", text, "--window", 16, "--windows", 3)
    more = ("--nulls", 2, "--config", "residual=depth")
    code, shown = oasis("convert", vanilla, "--out", out, *given, *more)
    assert code == 0
    *lines, last = shown.out.splitlines()
    assert last.startswith(
        f"Saved: {out}. To measure what 8 bits cost, and what helps: oasis doctor"
    )
    assert max(map(len, lines)) <= 80
    record = Record.load(out / "record.json")
    before, after = record.before_after("perplexity.windowed")
    (line,) = (line for line in lines if "perplexity.windowed" in line)
    assert line.split()[1:] == [f"{before:.4g}", f"{after:.4g}"]
    rows = [line.split() for line in lines if line.split()[:1] in (["before"], ["after"])]
    values = [
        f"{record.metric('outlier.max_activation', x).value:.4g}" for x in ("before", "after")
    ]
    assert [row[-1].lstrip("-") for row in rows] == values
    assert record.config["residual"] == "depth"
    more = ("--prune-neurons", 2, "--json")
    code, shown = oasis("convert", vanilla, "--out", tmp_path / "again", *given, *more)
    found = json.loads(shown.out)
    assert (code, found["record"]["nulls"], found["record"]["neurons"]) == (0, 1, [])
    assert found["conclusion"][0].startswith("No neuron was pruned")
    # A null is no obstacle to quantization.
    low = ("--calibration", text, "--window", 16, "--windows", 3, "--simulate")
    for scheme in ("w8a8-static-full", "w4a4"):
        assert oasis("quantize", out, "--out", tmp_path / scheme, "--scheme", scheme, *low)[0] == 0


def test_null_from_bos(oasis, vanilla, text, tmp_path):
    out = tmp_path / "out"
    given = ("--null-from-sink", "--null-from-bos", "--calibration", text, "--window", 16)
    code, shown = oasis("convert", vanilla, "--out", out, *given, "--windows", 3)
    assert code == 0
    assert "1 null, from BOS 'w1'" in " ".join(shown.out.split())
    assert "The texts begin with BOS before, and not after." in " ".join(shown.out.split())
    record = Record.load(out / "record.json")
    assert record.bos == "w1"
    # Without the option, the conclusion names it if a sink remains.
    plain = replace(record, bos=None)
    for before, after, found in ((0.7, 0.6, True), (0.7, 0.3, False), (0.2, 0.2, False)):
        values = {"before": before, "after": after}
        metrics = tuple(
            replace(m, value=values[m.where]) if m.name == "sink.max_mass" else m
            for m in record.metrics
        )
        sentences = list(_conclusion(replace(plain, metrics=metrics), 0))
        assert [("--null-from-bos" in each) for each in sentences] == [True] * found
    no_bos = replace(plain, metrics=metrics, data=replace(plain.data, bos=None))
    assert not list(_conclusion(no_bos, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", "entmax15"), "token_normalizer: 'entmax15' cannot equal"),
        (("--config", "depth"), "--config: 'depth' is not NAME=VALUE"),
        (("--to-vanilla", "--variant", "oasis"), "cannot be combined"),
        (("--to-vanilla",), "is not an OASIS model"),
        (("--to-vanilla", "--null-from-sink"), "--to-vanilla: cannot be combined with"),
        (("--to-sinks",), "family 'llama' is not an OASIS model and has no null"),
        (("--to-sinks", "--config", "null_logit=2"), "--to-sinks: cannot be combined with"),
        (("--to-sinks", "--to-vanilla"), "--to-sinks: cannot be combined with --to-vanilla"),
        (("--nulls", 2), "--nulls: it has an effect only with --null-from-sink"),
        (("--null-from-bos",), "--null-from-bos: it has an effect only with --null-from-sink"),
        (("--null-from-sink", "--nulls", 99), "--nulls: 99 is not"),
        (("--null-from-sink", "--config", "null_logit=2"), "null_logit: the conversion sets it"),
        (("--null-from-sink", "--calibration", "absent"), "--calibration (or a text file)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(oasis, vanilla, tmp_path, arguments, message):
    code, shown = oasis("convert", vanilla, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
