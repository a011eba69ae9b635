"""Publish a study: write plan, compact records and tables to docs/results, and update the tables
of docs/study.md and of the pages of benchmarks/lab_page.py.

python benchmarks/publish.py FOLDER

FOLDER is the folder of a study, finished or not.  It replaces the published results of the plan.
A page with all figures is made on demand: `oasis study report docs/results/NAME --page page.html`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

import lab_page
from oasis_attn.files import write_text
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.report.figures import save_png
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table
from oasis_attn.study.criteria import fails_none, rule
from oasis_attn.study.plan import Plan, Trial
from oasis_attn.study.plan_file import load_plan
from oasis_attn.study.reading_guide import progress_text
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import noise_floor
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_metrics import StudyMetric, study_metrics
from oasis_attn.study.study_report import write_report
from oasis_attn.study.tables import criteria_summary
from oasis_attn.study.trial import TIMES
from oasis_attn.study.verdict import judge
from pages import DOCS, RESULTS, fill, published

PAGE = DOCS / "study.md"
STUDIES = ("paper", "isolate", "signal", "beyond", "confirm")  # of language models
EQUAL = "oasis_unit", "oasis_unit_depth_softmax"  # variants of `beyond` that are one function
COLORS = 32  # of a figure
VOCABULARY = 2048  # vocabulary size of the models in the studies
BATCH = 262_144  # tokens per step
TOKENS = 20  # tokens per parameter (Hoffmann et al., arXiv 2203.15556)
CHANGE, POWER = 0.1, 0.8
SILENT = 0.99  # mean null probability of a silent head
LENGTH = 2048  # tokens per window
SUSTAINED = 3.5e14  # assumed FLOP/s in bfloat16 on one H100 or H200
# Trials by what makes them slower: (depth routing, attention maps that no fused kernel computes).
CLASSES = {
    (False, False): "vanilla",
    (True, False): "depth routing",
    (False, True): "stored attention maps",
    (True, True): "both",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = StudyFolder.open(parser.parse_args().folder)
    place = RESULTS / folder.plan.name
    pages = {path: path.read_text(encoding="utf-8") for path in (PAGE, *lab_page.PAGES)}
    with tempfile.TemporaryDirectory(dir=place.parent) as stage:
        new = Path(stage, folder.plan.name)
        folder.publish(new)
        report = Path(stage, "report")
        write_report(StudyFolder.open(new), report / "index.html")
        shutil.copy(report / "tables.md", new)
        if folder.plan.on_task:
            figure = lab_page.figure(Results(folder.plan, folder.records()))
            save_png(figure, report / "variants.png")
        for path in report.glob("*.png"):
            if any(f"results/{place.name}/{path.name}" in text for text in pages.values()):
                save_with_palette(path, new / path.name)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
    for path, text in pages.items():
        write_text(path, page(text) if path == PAGE else lab_page.page(path, text))


def save_with_palette(figure: Path, path: Path) -> None:
    """Save a PNG file with `COLORS` colors: a third of the size, with no visible difference."""
    image = Image.open(figure).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def page(text: str) -> str:
    """docs/study.md with every table generated again."""
    tables = verdicts, initial_differences, almost_equal, silent, criteria, scaling
    return fill(PAGE, text, "publish.py", {table.__name__: table for table in tables})


def verdicts() -> str:
    """The verdict on each claim, one column per published study."""
    studies = published(STUDIES)
    judged = {
        name: {each.claim.text: each.verdict for each in judge(results)}
        for name, results in studies.items()
    }
    stating = [name for name, verdicts in judged.items() if verdicts]
    claims = dict.fromkeys(text for name in stating for text in judged[name])
    rows = tuple((text, *(judged[name].get(text, "") for name in stating)) for text in claims)
    columns = "claim", *(f"`{name}`" for name in stating)
    table = Table(columns=columns, rows=rows, text_columns=len(columns))
    lines = [
        f"[`{name}`](results/{name}/tables.md): {progress_text(results)}"
        for name, results in studies.items()
    ]
    return markdown(table) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def almost_equal() -> str:
    """The difference between trained variants that start equal or almost equal, and of seeds."""
    results, others = (published(STUDIES)[name] for name in ("isolate", "beyond"))
    known = {metric.name: metric for metric in study_metrics(())}
    # These variants differ in the scale of a mix, which these metrics do not depend on.
    mlp = StudyMetric(
        name="outlier.max_inf_norm_mlp", label="max inf-norm, MLP outputs", scale="ratio"
    )
    metrics = known["perplexity.windowed"], mlp, known["sink.mass"], known["null.mass"]
    pairs = almost_equal_variants(results.plan)
    rows = []
    for metric in metrics:
        equal = [[others.values(metric, variant) for variant in EQUAL]]
        values = [[results.values(metric, variant) for variant in pair] for pair in pairs]
        same_seed = [
            [(a[each], b[each]) for a, b in group for each in a if each in b]
            for group in (equal, values)
        ]
        other_seed = [list(table.values()) for pair in values for table in pair]
        floors = [noise_floor(runs, metric.scale) for runs in (*same_seed, other_seed)]
        floors.append(results.noise_floor(metric))
        shown = (f"{floor:.0%} (n {n})" if n else "" for floor, n in floors)
        rows.append((metric.label, *shown, f"{pairs_needed(floors[1][0], metric.scale):,}"))
    columns = (
        *("metric", "same function, same seed", "almost equal variant, same seed"),
        *("same variant, another seed", f"{results.plan.reference}, another seed: the noise floor"),
        f"pairs needed to detect a change of {CHANGE:.0%}",
    )
    table = markdown(Table(columns=columns, rows=tuple(rows)))
    almost = "; ".join(map(" and ".join, pairs))
    return f"The same function: {' and '.join(EQUAL)}. Almost equal variants: {almost}.\n\n{table}"


@cache
def initial_differences() -> str:
    """The difference between almost equal and equal variants before training, by eps."""
    softmax = {"depth_normalizer": "softmax"}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "oasis and oasis_depth_softmax": (settings_of("oasis"), settings_of("oasis_depth_softmax")),
        "oasis and oasis_unit": (settings_of("oasis"), settings_of("oasis_unit")),
        "oasis_unit and oasis_unit with softmax over depth": (
            settings_of("oasis_unit"), settings_of("oasis_unit") | softmax,
        ),
    }  # fmt: skip
    rows = []
    for name, pair in pairs.items():
        for eps in (1e-6, 1e-12):
            (logits, gradient), (other, other_gradient) = (_initial(each, eps) for each in pair)
            differences = (
                (logits - other).abs().max() / logits.std(),
                (gradient - other_gradient).norm() / gradient.norm(),
            )
            shown = (f"{100 * x:.1f} %" if x > 1e-5 else "below 0.001 %" for x in differences)
            absolute = f"{float((logits - other).abs().max()):.1e}"
            rows.append((name, f"{eps:.0e}", absolute, *shown))
    columns = (
        "variants",
        "eps of the norms",
        "largest difference of logits",
        "the same / standard deviation of logits",
        "norm of the gradient difference / norm of the gradient",
    )
    return markdown(Table(columns=columns, rows=tuple(rows)))


def _initial(settings: dict[str, Any], eps: float) -> tuple[Tensor, Tensor]:
    """Logits and gradient of an untrained model with the size of the studies, in float64."""
    backbone = text_config("nano", VOCABULARY)
    backbone.rms_norm_eps = eps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OasisForCausalLM(OasisConfig(text_config=backbone, **settings)).double()
    ids = torch.randint(VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = [p.grad.flatten() for name, p in model.named_parameters() if "depth" not in name]
    return output.logits.detach(), torch.cat(gradients)


def pairs_needed(floor: float, scale: str) -> int:
    """The pairs needed to detect `CHANGE` (p 0.05, power `POWER`) if the noise floor is `floor`."""
    normal = NormalDist()
    spreads = normal.inv_cdf(0.975) + normal.inv_cdf(POWER)
    ratio = math.log1p(floor) / math.log1p(CHANGE) if scale == "ratio" else floor / CHANGE
    return math.ceil((spreads * ratio) ** 2)


def almost_equal_variants(plan: Plan) -> list[list[str]]:
    """Pairs that differ only in softmax or Softmax1 over depth, and in the eps of norms.

    With `mix_scale: rms` such a pair would be one function, as `EQUAL` is.
    """
    groups: dict[str, list[str]] = {}
    for name, entry in plan.variants.items():
        config = OasisConfig(**settings_of(entry["base"]) | entry["overrides"]).settings
        if config["residual"] == "depth" and config["depth_normalizer"] == "softmax1":
            assert config["mix_scale"] == "none"
            config["depth_normalizer"] = "softmax"
        groups.setdefault(repr(config), []).append(name)
    return [names for names in groups.values() if len(names) == 2]


def silent() -> str:
    """The variants of `beyond` with heads that give almost all attention to the null."""
    results = published(STUDIES)["beyond"]
    heads: dict[str, list[bool]] = {}
    layers: dict[str, list[bool]] = {}
    for trial, record in results.records.items():
        for null_H in record.tables.get("null.mass", []):
            silent_H = [null > SILENT for null in null_H]
            heads.setdefault(trial.variant, []).extend(silent_H)
            layers.setdefault(trial.variant, []).append(all(silent_H))
    rows = [
        (name, *(f"{sum(found)} of {len(found)}" for found in (heads[name], layers[name])))
        for name in results.plan.variants
        if any(heads.get(name, ()))
    ]
    columns = "variant", "silent heads, all seeds", "layers with silent heads only"
    return markdown(Table(columns=columns, rows=tuple(rows)))


def criteria() -> str:
    """The acceptance criteria of all candidates; empty if no published study has candidates."""
    held = [results for results in published(STUDIES).values() if results.plan.candidates]
    if not held:
        return ""
    tables = (
        f"`{each.plan.name}` (variants that fail none: {', '.join(fails_none(each)) or 'none'}):"
        f"\n\n{markdown(criteria_summary(each))}"
        for each in held
    )
    rules = dict.fromkeys(rule(each.plan) for each in held)
    return "\n\n".join(rules) + "\n\n" + "\n".join(tables)


def scaling() -> str:
    """The cost of the plans at sizes at which sinks are known to form."""
    plans = {name: load_plan(name) for name in STUDIES}
    costs, rows = relative_costs(), []
    for size in ("small", "medium"):
        config = text_config(size)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
        tokens = TOKENS * parameters
        steps = round(tokens / BATCH, -2)
        # 6 operations per parameter, and causal attention: 2 T D forward and 4 T D backward.
        attention = 6 * config.num_hidden_layers * LENGTH * config.hidden_size
        hours = (6 * parameters + attention) * tokens / SUSTAINED / 3600
        by_plan = (hours * _vanilla_trials(plan, costs) for plan in plans.values())
        counts = f"{parameters / 1e6:.0f} M", f"{tokens / 1e9:.1f} G", f"{steps:,.0f} x {BATCH:,}"
        by_class = (f"{hours * costs[each]:.2g}" for each in CLASSES)
        rows.append((size, *counts, *by_class, *(f"{float(f'{h:.2g}'):,.0f}" for h in by_plan)))
    names = (f"`{name}`, {len(_one_corpus(plan))} trials" for name, plan in plans.items())
    hours_of = (f"GPU hours: {name}" for name in CLASSES.values())
    head = "size", "parameters", "tokens per trial", "steps x tokens", *hours_of
    return markdown(Table(columns=(*head, *names), rows=tuple(rows)))


def relative_costs() -> dict[tuple[bool, bool], float]:
    """The processor time of a trial relative to the reference, by `CLASSES`, from the records.

    The median over all pairs with the same corpus, seed, commit and device.
    """
    ratios: dict[tuple[bool, bool], list[float]] = {each: [] for each in CLASSES}
    for results in published(STUDIES).values():
        reference = {
            trial.condition: record
            for trial, record in results.records.items()
            if trial.variant == results.plan.reference
        }
        for trial, record in results.records.items():
            other = reference.get(trial.condition)
            if other is None or trial.variant == results.plan.reference:
                continue
            ours, theirs = record.environment, other.environment
            if (ours.commit, ours.device) == (theirs.commit, theirs.device):
                ratio = record[TIMES[1]] / other[TIMES[1]]
                ratios[_class(record.model.config or {})].append(ratio)
    # No pair of the last class has a common commit: its two reasons for a cost are multiplied.
    found = {each: median(values) for each, values in ratios.items() if values}
    found.setdefault((True, True), found[True, False] * found[False, True])
    return found | {(False, False): 1.0}


def _class(config: Mapping[str, Any]) -> tuple[bool, bool]:
    normalizer = config["token_normalizer"]
    return config["residual"] != "sum", normalizer not in ("softmax", "softmax1", "learned_sink")


def _one_corpus(plan: Plan) -> list[Trial]:
    first = next(iter(plan.corpora))
    return [trial for trial in plan.trials if trial.corpus == first]


def _vanilla_trials(plan: Plan, costs: Mapping[tuple[bool, bool], float]) -> float:
    """The cost of the trials on one corpus, in trials of vanilla."""
    return sum(
        costs[_class(settings_of(trial.base) | dict(trial.overrides))]
        for trial in _one_corpus(plan)
    )


if __name__ == "__main__":
    main()
