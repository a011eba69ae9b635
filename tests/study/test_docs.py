"""The tables in the docs are equal to those generated from the committed records."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import lab_page
import publish
from oasis_attn.study.lookup import shipped_plans
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import noise_floor
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_metrics import StudyMetric, study_metrics
from oasis_attn.study.study_report import tables_text
from oasis_attn.study.verdict import judge
from oasis_attn.study.yaml_text import parse_yaml
from study import factories

FOLDERS = sorted(path.parent for path in Path(__file__).parents[2].glob("docs/results/*/plan.yaml"))


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_committed_tables_equal_those_of_the_committed_records(path: Path) -> None:
    folder = StudyFolder.open(path)
    results = Results(folder.plan, folder.records())
    expected = tables_text(results, judge(results))
    assert (path / "tables.md").read_text(encoding="utf-8") == expected


def test_what_rounding_alone_changes() -> None:
    results = publish.published(publish.STUDIES)["beyond"]
    metrics = {metric.name: metric for metric in study_metrics(())}
    for name, low, high in (
        ("perplexity.windowed", 0.005, 0.015),
        ("outlier.max_inf_norm_mlp", 0.19, 0.22),
        ("sink.mass", 0.38, 0.42),
        ("null.mass", 0.57, 0.61),
    ):
        metric = metrics.get(name) or StudyMetric(name=name, label=name, scale="ratio")
        ours, others = (results.values(metric, variant) for variant in publish.EQUAL)
        assert list(ours) == list(others)
        pairs = [(ours[each], others[each]) for each in ours]
        assert low < noise_floor(pairs, metric.scale)[0] < high


def test_the_guide_lists_every_plan() -> None:
    text = (publish.DOCS / "study.md").read_text()
    assert all(f"| `{name}` |" in text for name in shipped_plans())


def test_the_example_of_claims_and_criteria_is_valid() -> None:
    section = publish.PAGE.read_text(encoding="utf-8").partition("## Claims and criteria")[2]
    block = section.partition("    claims:")[2].partition("\n\n")[0]
    given = parse_yaml(textwrap.dedent("    claims:" + block), "example", "study.md")
    plan = factories.plan(
        variants=["vanilla", "attn_residual", "oasis", "oasis_signal_off"],
        compare={}, sizes=["nano", "medium"], schemes=["w4a4"], **given,
    )  # fmt: skip
    assert [claim.name for claim in plan.claims] == ["kurtosis", "same_perplexity", "growth"]
    assert len(plan.criteria) == 2


def test_the_page_contains_the_published_tables() -> None:
    text = publish.PAGE.read_text(encoding="utf-8")
    assert publish.verdicts() in text
    assert publish.initial_differences() in text
    assert publish.almost_equal() in text
    assert publish.silent() in text
    assert publish.criteria() in text
    assert publish.scaling() in text
    assert publish.page(text) == text
    for path in lab_page.PAGES:
        text = path.read_text(encoding="utf-8")
        assert lab_page.page(path, text) == text
