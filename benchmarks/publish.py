"""Publish a study: write plan, compact records and tables to docs/results, and update the tables
of docs/study.md.

python benchmarks/publish.py FOLDER

FOLDER is the folder of a study, finished or not.  It replaces the published results of the plan.
A page with all figures is made on demand: `oasis study report docs/results/NAME --page page.html`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table
from oasis_attn.study.criteria import RULE
from oasis_attn.study.plan import Plan
from oasis_attn.study.plan_file import load_plan
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import noise_floor
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_metrics import StudyMetric, study_metrics
from oasis_attn.study.study_report import progress_text, write_report
from oasis_attn.study.tables import criteria_summary
from oasis_attn.study.verdict import CLAIM_NOT_TESTED, judge

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "study.md"
STUDIES = ("paper", "isolate", "signal", "beyond", "confirm")
VOCABULARY = 2048  # vocabulary size of the models in the studies
BATCH = 262_144  # tokens per step
TOKENS = 20  # tokens per parameter (Hoffmann et al., arXiv 2203.15556)
ROUTING = 1.2  # relative cost of a step with depth routing
CHANGE, POWER = 0.1, 0.8
SILENT = 0.99  # mean null probability of a silent head
SUSTAINED = 3.5e14  # FLOP/s in bfloat16 on one H100 or H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = StudyFolder.open(parser.parse_args().folder)
    place, text = DOCS / "results" / folder.plan.name, PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=place.parent) as stage:
        new = Path(stage, folder.plan.name)
        folder.publish(new)
        report = Path(stage, "report")
        write_report(StudyFolder.open(new), report / "index.html")
        shown = [path for path in report.glob("*.png") if f"{place.name}/{path.name}" in text]
        for path in (report / "tables.md", *shown):
            shutil.copy(path, new)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
    write_text(PAGE, page(text))


def page(text: str) -> str:
    """docs/study.md with every table generated again."""
    generators = verdicts, initial_differences, equivalent, silent, criteria, scaling
    blocks = {generate.__name__: generate() for generate in generators}
    for name, table in blocks.items():
        begin, end = f"<!-- benchmarks/publish.py: {name} -->\n", "<!-- end -->\n"
        head, mark, rest = text.partition(begin)
        if not mark:
            raise UserError(f"study.md: {begin.strip()!r} is missing")
        text = head + begin + table + end + rest.partition(end)[2]
    return text


def published() -> dict[str, Results]:
    """The results of each study under docs/results, by name."""
    places = {name: DOCS / "results" / name for name in STUDIES}
    folders = {name: StudyFolder.open(place) for name, place in places.items() if place.is_dir()}
    return {name: Results(folder.plan, folder.records()) for name, folder in folders.items()}


def verdicts() -> str:
    """The verdict on each claim, one column per published study."""
    columns: dict[str, list[str]] = {}
    lines = []
    for name, results in published().items():
        judged = judge(results)
        columns.setdefault("claim", [each.claim.text for each in judged])
        columns[f"`{name}`"] = [
            "" if each.verdict == CLAIM_NOT_TESTED else each.verdict for each in judged
        ]
        lines.append(f"[`{name}`](results/{name}/tables.md): {progress_text(results)}")
    rows = tuple(zip(*columns.values(), strict=True))
    table = Table(columns=tuple(columns), rows=rows, text_columns=len(columns))
    return markdown(table) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def equivalent() -> str:
    """The difference between trained equivalent variants, compared with that between seeds."""
    results = published()["isolate"]
    known = {metric.name: metric for metric in study_metrics(())}
    # Equivalent variants differ in the scale of a mix, which these metrics do not depend on.
    mlp = StudyMetric(
        name="outlier.max_inf_norm_mlp", label="max inf-norm, MLP outputs", scale="ratio"
    )
    metrics = known["perplexity.windowed"], mlp, known["sink.mass"], known["null.mass"]
    pairs = equivalent_variants(results.plan)
    rows = []
    for metric in metrics:
        values = [[results.values(metric, variant) for variant in pair] for pair in pairs]
        same_seed = [(a[each], b[each]) for a, b in values for each in a if each in b]
        other_seed = [list(table.values()) for pair in values for table in pair]
        floors = [noise_floor(runs, metric.scale) for runs in (same_seed, other_seed)]
        floors.append(results.noise_floor(metric))
        shown = (f"{floor:.0%} (n {n})" if n else "" for floor, n in floors)
        rows.append((metric.label, *shown, f"{pairs_needed(floors[0][0], metric.scale):,}"))
    reference = f"{results.plan.reference}, another seed: the noise floor"
    columns = "metric", "equivalent variant, same seed", "same variant, another seed", reference
    columns = (*columns, f"pairs needed to detect a change of {CHANGE:.0%}")
    table = markdown(Table(columns=columns, rows=tuple(rows)))
    return "Equivalent variants: " + "; ".join(map(" and ".join, pairs)) + ".\n\n" + table


@cache
def initial_differences() -> str:
    """The difference between equivalent variants before training, with two values of eps."""
    rows = []
    for pair in ("oasis", "oasis_depth_softmax"), ("oasis", "oasis_unit"):
        for eps in (1e-6, 1e-12):
            (logits, gradient), (other, other_gradient) = (_initial(name, eps) for name in pair)
            differences = (
                (logits - other).abs().max() / logits.std(),
                (gradient - other_gradient).norm() / gradient.norm(),
            )
            shown = (f"{100 * x:.1f} %" if x > 1e-5 else "below 0.001 %" for x in differences)
            rows.append((" and ".join(pair), f"{eps:.0e}", *shown))
    columns = (
        "variants",
        "eps of the norms",
        "largest difference of logits / their standard deviation",
        "norm of the gradient difference / norm of the gradient",
    )
    return markdown(Table(columns=columns, rows=tuple(rows)))


def _initial(variant: str, eps: float) -> tuple[Tensor, Tensor]:
    """Logits and gradient of an untrained model with the size of the studies, in float64."""
    backbone = text_config("nano", VOCABULARY)
    backbone.rms_norm_eps = eps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = settings_of(variant)
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


def equivalent_variants(plan: Plan) -> list[list[str]]:
    """Pairs that differ only in softmax or Softmax1 over depth: see `OasisConfig`."""
    groups: dict[str, list[str]] = {}
    for name, entry in plan.variants.items():
        config = OasisConfig(**settings_of(entry["base"]) | entry["overrides"]).settings
        if config["residual"] == "depth" and config["depth_normalizer"] == "softmax1":
            config["depth_normalizer"] = "softmax"
        groups.setdefault(repr(config), []).append(name)
    return [names for names in groups.values() if len(names) == 2]


def silent() -> str:
    """The variants of `beyond` with heads that give almost all attention to the null."""
    results = published()["beyond"]
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
    held = [results for results in published().values() if results.plan.candidates]
    if not held:
        return ""
    tables = (f"`{each.plan.name}`:\n\n{markdown(criteria_summary(each))}" for each in held)
    return f"{RULE}\n\n" + "\n".join(tables)


def scaling() -> str:
    """The cost of the plans at sizes at which sinks are known to form."""
    trials = {name: len(load_plan(name).trials) for name in STUDIES}
    trials["paper"] //= len(load_plan("paper").corpora)
    rows = []
    for size in ("small", "medium"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config(size))
        parameters = model.num_parameters()
        tokens = TOKENS * parameters
        steps = round(tokens / BATCH, -2)
        hours = ROUTING * 6 * parameters * tokens / SUSTAINED / 3600
        all_hours = (f"{float(f'{hours * n:.2g}'):,.0f}" for n in trials.values())
        counts = f"{parameters / 1e6:.0f} M", f"{tokens / 1e9:.1f} G", f"{steps:,.0f} x {BATCH:,}"
        rows.append((size, *counts, f"{hours:.2g}", *all_hours))
    names = (f"`{name}`, {count} trials" for name, count in trials.items())
    head = "size", "parameters", "tokens per trial", "steps x tokens", "GPU hours per trial"
    return markdown(Table(columns=(*head, *names), rows=tuple(rows)))


if __name__ == "__main__":
    main()
