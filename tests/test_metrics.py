"""The glossary has every metric that is written, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import run as benchmarks
from oasis_attn import diagnose
from oasis_attn.evaluation import evaluate
from oasis_attn.measure.sink_conversion import null_from_sink_checkpoint
from oasis_attn.metrics import GLOSSARY, definitions
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.records import Record
from oasis_attn.report.glossary import glossary_page
from oasis_attn.study.doctor import doctor
from oasis_attn.study.plan import Plan
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.trial import run_trial
from oasis_attn.training import TrainingConfig, train
from tiny_models import VOCABULARY, tiny_config, tiny_model

DOCS = Path(__file__).parents[1] / "docs"


def names(record: Record) -> set[str]:
    return {metric.name for metric in record.metrics}


@pytest.fixture(scope="module")
def committed() -> set[str]:
    """The names in all records under docs/results."""
    records = [Record.load(path) for path in (DOCS / "results").rglob("*.json")]
    for plan in (DOCS / "results").glob("*/plan.yaml"):
        records += StudyFolder.open(plan.parent).records().values()
    assert len(records) > 200
    return set().union(*map(names, records))


def of_one_token() -> Record:
    """A model of zero queries on one token repeated: all states are one, and attention is uniform.

    So every later token is as much of a sink as the first is in the states that count.
    """
    torch.manual_seed(11)
    config = tiny_config("llama", num_hidden_layers=24, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return diagnose(model, torch.full((1, 12), 7))


def with_a_sink(folder: Path, run: Path) -> Path:
    """A model whose first position is massive, with the tokenizer of `run`."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    config = tiny_config(
        "opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, vocab_size=len(tokenizer)
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_a_family(folder: Path, run: Path) -> Path:
    """A model of the class of its family, with the tokenizer of `run`."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_a_task(folder: Path) -> Record:
    """The record of a decoder on a generated task."""
    plan = Plan(
        name="task", about="", variants={"oasis": {"base": "oasis", "overrides": {}}},
        corpora={"trigger-every-8": ()}, seeds=(0,), sizes=("lab-1",), compare={},
        training={"steps": 2}, windows=2, schemes=("w4a4",),
    )  # fmt: skip
    return run_trial(plan.trials[0], folder / "trial.json", folder / "trial", command="")


def of_a_task(folder: Path, size: str, patch: pytest.MonkeyPatch) -> Record:
    """A trial on the corpus of a task."""
    patch.setattr("oasis_attn.data.majority._TOKENS", 2**16)
    plan = Plan.from_dict(
        {
            "name": "tiny",
            "about": "Nothing.",
            "variants": ["vanilla"],
            "corpora": {"majority-32": ["majority"]},
            "seeds": [0],
            "sizes": [size],
            "compare": {},
            "training": {"steps": 2, "batch_size": 2, "block_length": 32, "log_every": 1},
            "windows": 2,
            "schemes": ["w4a4"],
            "evaluation": {"limit": 2},
        }
    )
    plan.check()
    return StudyFolder.begin(folder, plan).run(plan.trials[0].id)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, corpus, size) -> set[str]:
    """The names in records of every kind, made now, and of the numbers that benchmarks bound."""
    folder = tmp_path_factory.mktemp("metrics")
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    run, shape = folder / "run", {"calibration": corpus, "evaluation_split": "validation"}
    shape |= {"window": 16, "windows": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OASIS_CACHE", str(folder / "cache"))
        config = TrainingConfig(
            out=run, corpus=corpus, size=size, vocab_size=270, steps=2, block_length=32,
            batch_size=2, log_every=1, eval_windows=2, variant="vanilla",
        )  # fmt: skip
        records = [
            diagnose(tiny_model(), tokens, joint=True, causal=[0]),
            of_one_token(),
            train(config, progress=False),
            *(
                evaluate(run, tasks=("perplexity",), corpus=corpus, split="validation",
                         window=16, stride=stride, limit=2)
                for stride in (8, 16)
            ),
            quantize_checkpoint(
                run, folder / "q", scheme="w8a8-static-full", simulate=True, **shape
            ),
            prefix_checkpoint(with_a_sink(folder / "sink", run), folder / "p", **shape),
            doctor(with_a_sink(folder / "ill", run), folder / "doctor", **shape).record,
            null_from_sink_checkpoint(of_a_family(folder / "llama", run), folder / "n", **shape),
            on_a_task(folder),
            of_a_task(folder / "trial", size, patch),
        ]  # fmt: skip
    return set(benchmarks.BOUNDS).union(*map(names, records))


def test_every_committed_metric_is_defined(committed) -> None:
    for name in committed:
        assert len(definitions(name)) == 1, name


def test_every_metric_made_now_is_defined_and_not_retired(fresh) -> None:
    for name in fresh:
        (definition,) = definitions(name)
        assert not definition.retired, name


def test_every_definition_is_of_a_metric_that_is_made(committed, fresh) -> None:
    """A retired one is in committed records alone."""
    for each in GLOSSARY:
        made = committed if each.retired else committed | fresh
        assert any(each.pattern.fullmatch(name) for name in made), each.name


def test_no_name_has_two_definitions(committed, fresh) -> None:
    for name in committed | fresh:
        exact = [each for each in GLOSSARY if each.name == name]
        found = exact or [each for each in GLOSSARY if each.pattern.fullmatch(name)]
        assert len(found) == 1, name
    assert max(Counter(each.name for each in GLOSSARY).values()) == 1


def test_every_definition_is_whole() -> None:
    for each in GLOSSARY:
        assert each.definition
        assert each.unit
        assert each.protocol
        assert each.source
        assert each.better in ("lower", "higher", "")


def test_the_page_is_that_of_the_glossary() -> None:
    written = (DOCS / "metrics.md").read_text()
    assert written == glossary_page(), "python -m oasis_attn.report.glossary > docs/metrics.md"


def test_a_secondary_sink_has_the_score_of_uniform_attention() -> None:
    record = of_one_token()
    (window,) = record.tables["sink.window"]
    assert 4 < window["end"] - window["start"] < 24 - 15  # as the seed has it
    assert record["sink.secondary_tokens@L-15"] == 11 - window["position"]
    expected = [
        sum(1 / (query + 1) for query in range(row["position"], 12)) / (12 - row["position"])
        for row in record.tables["sink.secondary_tokens"]
    ]
    assert [row["score"] for row in record.tables["sink.secondary_tokens"]] == (
        pytest.approx(expected, rel=1e-5)
    )
    score = record.metric("sink.secondary_score@L-15")
    assert score.value == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert score.n == len(expected)
