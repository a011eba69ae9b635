from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from oasis_attn.data import train_tokenizer
from oasis_attn.errors import UserError
from oasis_attn.records import Record
from oasis_attn.study.demo import COLUMNS, VARIANTS, Demo, run_demo

SENTENCES = [
    f"Paragraph {n}: the {noun} of {n * n} {verb} what was said on page {n % 7}.\n\n"
    for n in range(400)
    for noun, verb in (("square", "repeats"), ("reader", "forgets"), ("river", "carries"))
]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny corpus, model size, and pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text("".join(SENTENCES), encoding="utf-8")
    config = LlamaConfig(**TINY)
    LlamaForCausalLM(config).save_pretrained(folder / "pretrained")
    train_tokenizer(SENTENCES, 300).save_pretrained(folder / "pretrained")
    config.save_pretrained(folder / "size")
    return folder


@pytest.fixture(scope="module")
def demo(folder: Path) -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OASIS_CACHE", str(folder / "cache"))
        return run_demo(
            folder / "out",
            pretrained=str(folder / "pretrained"),
            prose=str(folder / "text.txt"),
            window=32,
            windows=20,
            size=str(folder / "size"),
            corpus=str(folder / "text.txt"),
            block_length=32,
            batch_size=2,
            steps=3,
        )


def test_every_model_has_every_number_of_the_table(demo: Demo) -> None:
    numbers = demo.numbers()
    assert list(numbers) == ["pretrained", *VARIANTS]
    assert all(list(row) == list(COLUMNS) for row in numbers.values())
    assert len(demo.table.rows) == 4
    assert "-" not in {text for row in demo.table.rows for text in row}


def test_models_are_measured_on_the_same_text_and_not_on_calibration_text(demo: Demo) -> None:
    small = [demo.models[variant] for variant in VARIANTS]
    assert len({model.diagnosis.data.tokens_sha256 for model in small}) == 1
    for model in demo.models.values():
        plain, low = model.diagnosis, model.quantization
        assert plain.data == low.data
        assert plain.data.windows == low.calibration.windows == 20
        assert plain.data.tokens_sha256 != low.calibration.tokens_sha256
        assert plain["sink.mass"] == low.metric("sink.mass", "before").value
        assert low.targets
        assert not any(target.endswith("lm_head") for target in low.targets)


def test_the_folder_holds_page_records_and_figures(demo: Demo, folder: Path) -> None:
    out = folder / "out"
    assert (out / "index.html").stat().st_size > 10_000
    assert (out / "overview.png").is_file()
    for name, model in demo.models.items():
        for record in model.records:
            path = out / "records" / f"{name}-{record.kind}.json"
            assert Record.load(path).to_json() == record.to_json()
    assert (out / "figures" / "oasis" / "null-mass.png").is_file()
    assert not (out / "figures" / "vanilla" / "null-mass.png").exists()
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_page_contains_the_numbers_of_the_records(demo: Demo, folder: Path) -> None:
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    for row in demo.table.rows:
        assert all(f">{text}</td>" in page for text in row)
    assert json.dumps(demo.numbers())


def test_an_existing_folder_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_invalid_values_are_refused_first(tmp_path: Path) -> None:
    for wrong in ({"windows": 0}, {"window": 1}, {"steps": 0}, {"size": "nanno"}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            run_demo(tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_pretrained_model_may_have_the_name_of_a_variant(folder, tmp_path) -> None:
    shutil.copytree(folder / "pretrained", tmp_path / "oasis")
    text = str(folder / "text.txt")
    demo = run_demo(
        tmp_path / "out", pretrained=str(tmp_path / "oasis"), prose=text, corpus=text, window=32,
        windows=2, size=str(folder / "size"), block_length=32, batch_size=2, steps=1,
    )  # fmt: skip
    assert list(demo.models) == ["pretrained-oasis", *VARIANTS]
    names = {record.model.name for record in demo.models["oasis"].records}
    assert all(name.endswith(" oasis") for name in names)


def test_a_demo_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_demo(tmp_path / "out", pretrained=str(folder / "absent"))
    assert list(tmp_path.iterdir()) == []
