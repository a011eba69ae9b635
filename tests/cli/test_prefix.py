"""`oasis prefix`, as a user types it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from oasis_attn.cli import main
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.prefix import prefix_of
from tiny import VOCABULARY, tiny_config


@pytest.fixture
def oasis(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["oasis", *map(str, arguments)])
        return main(), capsys.readouterr()

    return run


@pytest.fixture
def places(tmp_path):
    """A model whose first position is a sink, and a text."""
    torch.manual_seed(0)
    config = tiny_config("opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    line = " ".join(f"w{7 * i % VOCABULARY}" for i in range(300))
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(line)
    return tmp_path / "model", tmp_path / "out", tmp_path / "text"


def test_the_folder_holds_the_model_with_its_prefix(oasis, places):
    model, out, text = places
    shape = ("--calibration", text, "--window", 16, "--windows", 3)
    shape += ("--set", "weight.granularity=channel")
    code, shown = oasis("prefix", model, out, *shape, "--tune-steps", 2, "--json")
    record = json.loads(shown.out)
    assert (code, record["subject"]["tune_steps"], record["kind"]) == (0, 2, "quantization")
    assert record["subject"]["scheme"]["weight"]["granularity"] == "channel"
    loaded, _ = load_model(out)
    assert list(prefix_of(loaded).tokens) == record["subject"]["prefix"]
    code, shown = oasis("prefix", model, out.parent / "2", *shape, "--method", "frequency")
    assert code == 0
    assert "tokens [1]" in shown.out
    assert "perplexity.quantized" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gredy"), "did you mean 'greedy'"),
        (("--scheme", "w4a16"), "'w4a16' is not static"),
        (("--length", "0"), "length: 0"),
        (("--calibration", "absent.txt"), "absent.txt"),
        (("--set", "bits=3"), "bits"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(oasis, places, arguments, message):
    model, out, text = places
    code, shown = oasis("prefix", model, out, "--calibration", text, *arguments)
    assert code == 2
    assert message in shown.err.splitlines()[-1]
    assert not out.exists()
