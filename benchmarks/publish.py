"""Put a study on record: plan, compact records and tables into docs/results, verdicts into
docs/study.md.

python benchmarks/publish.py FOLDER

FOLDER is a study's, finished or not; what is there of the same plan is replaced.  A page with all
figures is made on demand: `oasis study report docs/results/NAME --out page.html`.
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
from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.model import OasisForCausalLM
from oasis_attn.modeling.sizes import text_config
from oasis_attn.modeling.variants import settings_of
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table
from oasis_attn.study.bar import RULE
from oasis_attn.study.folder import StudyFolder
from oasis_attn.study.measures import Measure, measures
from oasis_attn.study.page import standing, write_report
from oasis_attn.study.plan import Plan
from oasis_attn.study.plan_file import load_plan
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import noise_floor
from oasis_attn.study.tables import bar_summary
from oasis_attn.study.verdict import NOT_TESTED, judge

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "study.md"
STUDIES = ("paper", "isolate", "signal", "beyond", "confirm")
VOCABULARY = 2048  # of the studies' models
BATCH = 262_144  # tokens a step
TOKENS = 20  # a parameter, after Hoffmann et al. (arXiv 2203.15556)
ROUTING = 1.2  # what depth routing adds to a step
CHANGE, POWER = 0.1, 0.8
SILENT = 0.99  # the null mass of a head that says nothing
SUSTAINED = 3.5e14  # operations per second in bfloat16 on one H100 or H200


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
    """docs/study.md with each table made anew."""
    made = verdicts, start, twins, silent, bar, scaling
    blocks = {make.__name__: make() for make in made}
    for name, table in blocks.items():
        begin, end = f"<!-- benchmarks/publish.py: {name} -->\n", "<!-- end -->\n"
        head, mark, rest = text.partition(begin)
        if not mark:
            raise UserError(f"study.md: it has no {begin.strip()!r}")
        text = head + begin + table + end + rest.partition(end)[2]
    return text


def on_record() -> dict[str, Results]:
    """The studies under docs/results, by name."""
    places = {name: DOCS / "results" / name for name in STUDIES}
    folders = {name: StudyFolder.open(place) for name, place in places.items() if place.is_dir()}
    return {name: Results(folder.plan, folder.records()) for name, folder in folders.items()}


def verdicts() -> str:
    """What the rule says of each claim, a column a study that is on record."""
    columns: dict[str, list[str]] = {}
    lines = []
    for name, results in on_record().items():
        judged = judge(results)
        columns.setdefault("claim", [each.claim.text for each in judged])
        columns[f"`{name}`"] = [
            "" if each.verdict == NOT_TESTED else each.verdict for each in judged
        ]
        lines.append(f"[`{name}`](results/{name}/tables.md): {standing(results)}")
    rows = tuple(zip(*columns.values(), strict=True))
    table = Table(title="", columns=tuple(columns), rows=rows, words=len(columns))
    return markdown(table) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def twins() -> str:
    """How far rows that are one function come apart, beside what a change of seed does."""
    results = on_record()["isolate"]
    known = {measure.name: measure for measure in measures(())}
    # Those that the scale of a mix, in which twins do differ, is no part of.
    mlp = Measure(name="outlier.max_inf_norm_mlp", head="max inf-norm, MLP outputs", scale="ratio")
    seen = known["perplexity.windowed"], mlp, known["sink.mass"], known["null.mass"]
    pairs = one_function(results.plan)
    rows = []
    for measure in seen:
        values = [[results.values(measure, row) for row in pair] for pair in pairs]
        alike = [(a[unit], b[unit]) for a, b in values for unit in a if unit in b]
        seeds = [list(table.values()) for pair in values for table in pair]
        floors = [noise_floor(runs, measure.scale) for runs in (alike, seeds)]
        floors.append(results.floor(measure))
        shown = (f"{floor:.0%} (n {n})" if n else "" for floor, n in floors)
        rows.append((measure.head, *shown, f"{pairs_to_see(floors[0][0], measure.scale):,}"))
    reference = f"{results.plan.reference}, another seed: the noise floor"
    head = "measure", "twins, the same seed", "the same rows, another seed", reference
    columns = (*head, f"pairs that show a change of {CHANGE:.0%}")
    table = markdown(Table(title="", columns=columns, rows=tuple(rows), words=1))
    return "Twins here: " + "; ".join(" and ".join(pair) for pair in pairs) + ".\n\n" + table


@cache
def start() -> str:
    """How far rows that are one function but for the norms' eps are apart before any training."""
    rows = []
    for pair in ("oasis", "oasis_depth_softmax"), ("oasis", "oasis_unit"):
        for eps in (1e-6, 1e-12):
            (logits, gradient), (other, other_gradient) = (_at_start(row, eps) for row in pair)
            apart = (
                (logits - other).abs().max() / logits.std(),
                (gradient - other_gradient).norm() / gradient.norm(),
            )
            shown = (f"{100 * x:.1f} %" if x > 1e-5 else "below 0.001 %" for x in apart)
            rows.append((" and ".join(pair), f"{eps:.0e}", *shown))
    head = "rows", "eps of the norms", "largest difference of logits, over their deviation"
    columns = (*head, "difference of the gradient, over its norm")
    return markdown(Table(title="", columns=columns, rows=tuple(rows), words=1))


def _at_start(variant: str, eps: float) -> tuple[Tensor, Tensor]:
    """Logits and gradient of a new model of the studies' size, in float64."""
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


def pairs_to_see(floor: float, scale: str) -> int:
    """How many pairs, which chance moves apart by `floor`, show `CHANGE` at p 0.05, at `POWER`."""
    normal = NormalDist()
    spreads = normal.inv_cdf(0.975) + normal.inv_cdf(POWER)
    ratio = math.log1p(floor) / math.log1p(CHANGE) if scale == "ratio" else floor / CHANGE
    return math.ceil((spreads * ratio) ** 2)


def one_function(plan: Plan) -> list[list[str]]:
    """Rows that differ in softmax or softmax1 over depth alone: see `OasisConfig`."""
    groups: dict[str, list[str]] = {}
    for name, row in plan.variants.items():
        settings = OasisConfig(**settings_of(row["variant"]) | row["settings"]).settings
        if settings["residual"] == "depth" and settings["depth_normalizer"] == "softmax1":
            settings["depth_normalizer"] = "softmax"
        groups.setdefault(repr(settings), []).append(name)
    return [rows for rows in groups.values() if len(rows) == 2]


def silent() -> str:
    """Rows of `beyond` in which the null has taken all that some heads could say."""
    results = on_record()["beyond"]
    heads: dict[str, list[bool]] = {}
    layers: dict[str, list[bool]] = {}
    for cell, record in results.records.items():
        for null_H in record.tables.get("null.mass", []):
            mute_H = [null > SILENT for null in null_H]
            heads.setdefault(cell.row, []).extend(mute_H)
            layers.setdefault(cell.row, []).append(all(mute_H))
    rows = [
        (row, *(f"{sum(found)} of {len(found)}" for found in (heads[row], layers[row])))
        for row in results.plan.variants
        if any(heads.get(row, ()))
    ]
    columns = "variant", "silent heads, of all seeds", "layers in which all are"
    return markdown(Table(title="", columns=columns, rows=tuple(rows), words=1))


def bar() -> str:
    """How the proposed variants stand against the bar; empty before a study of them."""
    held = [results for results in on_record().values() if results.plan.bar]
    if not held:
        return ""
    tables = (f"`{each.plan.name}`:\n\n{markdown(bar_summary(each))}" for each in held)
    return f"{RULE}\n\n" + "\n".join(tables)


def scaling() -> str:
    """What the plans cost at sizes where sinks are known to form."""
    cells = {name: len(load_plan(name).cells) for name in STUDIES}
    cells["paper"] //= len(load_plan("paper").corpora)
    rows = []
    for size in ("small", "medium"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config(size))
        parameters = model.num_parameters()
        tokens = TOKENS * parameters
        steps = round(tokens / BATCH, -2)
        hours = ROUTING * 6 * parameters * tokens / SUSTAINED / 3600
        all_hours = (f"{float(f'{hours * n:.2g}'):,.0f}" for n in cells.values())
        counts = f"{parameters / 1e6:.0f} M", f"{tokens / 1e9:.1f} G", f"{steps:,.0f} x {BATCH:,}"
        rows.append((size, *counts, f"{hours:.2g}", *all_hours))
    names = (f"`{name}`, {count} cells" for name, count in cells.items())
    head = "size", "parameters", "tokens a cell", "steps x tokens", "GPU hours a cell"
    return markdown(Table(title="", columns=(*head, *names), rows=tuple(rows), words=1))


if __name__ == "__main__":
    main()
