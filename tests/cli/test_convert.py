"""The command `oasis convert`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

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
    code, shown = oasis("convert", vanilla, ours, *settings, "--dtype", "float64", "--json")
    facts = json.loads(shown.out)
    assert (code, facts["family"], facts["dtype"]) == (0, "llama", "float64")
    assert (facts["depth_block_size"], facts["null_signal"]) == (4, "shuffled")
    code, shown = oasis("convert", ours, back, "--to-vanilla", "--dtype", "float32")
    assert code == 0
    assert "model_type" in shown.out
    ids = torch.arange(9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (vanilla, back)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", "entmax15"), "token_normalizer: 'entmax15' cannot equal"),
        (("--config", "depth"), "--config: 'depth' is not NAME=VALUE"),
        (("--to-vanilla", "--variant", "oasis"), "cannot be combined"),
        (("--to-vanilla",), "is not an OASIS model"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(oasis, vanilla, tmp_path, arguments, message):
    code, shown = oasis("convert", vanilla, tmp_path / "out", *arguments)
    assert code == 2
    assert message in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
