"""What the tries of the doctor came to: their ranking, as a table and in sentences.

The rules.  A try is good if its increase of perplexity is at most the tolerance.  Of the good
tries, the one with the least work at run time is the best; of equal ones, the one with the smallest
increase.  If none is good, the one with the smallest increase is the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from oasis_attn.quantization.schemes import Scheme
from oasis_attn.records import DiagnosisRecord, DoctorRecord, Record, Try
from oasis_attn.report.conclusion import scheme_breaks
from oasis_attn.report.tables import ABSENT, Table, label, number, percent

PLAIN = "plain"
"""The name of the try without a remedy."""
_NUMBERS = ("perplexity.windowed", "doctor.increase", "doctor.run_time_work", "doctor.seconds")
_WORDS = {
    "dynamic": "dynamic ranges",
    "smoothquant": "SmoothQuant",
    "prefix": "a prefix",
    "folded": "a folded rotation",
    "rotation": "a rotation at run time",
    "gptq": "GPTQ",
}


def has_tries(record: Record) -> TypeGuard[DoctorRecord]:
    """Whether a record is of the doctor and has all its numbers.

    These are of the unquantized model, of the scheme alone, and of the tries.
    """
    if not isinstance(record, DoctorRecord):
        return False
    possible = {tried.name for tried in record.tries if not tried.problem}
    measured = ({metric.where for metric in record.each(name)} for name in _NUMBERS)
    unquantized = any(not metric.where for metric in record.each("perplexity.windowed"))
    return unquantized and PLAIN in possible and all(possible <= places for places in measured)


def increase(record: DoctorRecord, tried: Try) -> float:
    """The increase of perplexity with a try, infinite if it is not possible or not a number."""
    if tried.problem:
        return math.inf
    value = record.metric("doctor.increase", tried.name).value
    return math.inf if math.isnan(value) else value


def is_good(record: DoctorRecord, tried: Try) -> bool:
    """Whether a try is within the tolerance."""
    return increase(record, tried) <= record.tolerance


def ranked(record: DoctorRecord) -> list[Try]:
    """The tries that are possible, the best one first."""

    def rank(tried: Try) -> tuple[float, ...]:
        work, rise = _work(record, tried), increase(record, tried)
        return (0, work, rise) if is_good(record, tried) else (1, rise, work)

    return sorted((tried for tried in record.tries if not tried.problem), key=rank)


def doctor_table(record: DoctorRecord) -> Table:
    """One row per try that is possible, the best one first."""
    full = (number(record["perplexity.windowed"]), ABSENT, ABSENT, ABSENT)
    return Table(
        title=f"{label(record)}: {record.scheme['name']}, tolerance {percent(record.tolerance)}",
        columns=("try", "perplexity", "increase", "run-time work", "seconds"),
        rows=(
            ("full precision", *full),
            *(_row(record, tried) for tried in ranked(record)),
        ),
    )


def doctor_conclusion(
    diagnosis: DiagnosisRecord | None, record: DoctorRecord, remedies: Sequence[str]
) -> tuple[str, ...]:
    """What the tries came to, in sentences.

    Args:
        diagnosis: of the same model, to say if it expected something else; or None.
        record: the tries.
        remedies: names of the remedies for the scheme, to say which were not tried.
    """
    plain = next(tried for tried in record.tries if tried.name == PLAIN)
    scheme, limit = record.scheme["name"], percent(record.tolerance)
    best = ranked(record)[0]
    named_best = f"The best is {in_words(best)} ({_change(record, best)})."
    changes = (
        f"{scheme} alone changes the perplexity by {_change(record, plain)}; {limit} is the limit."
    )
    if is_good(record, plain):
        asked = Scheme.from_dict(record.scheme)
        expected = diagnosis and asked.static and scheme_breaks(diagnosis, asked)["static"]
        but = [
            "The diagnosis expects a break, but the predictions of this model do not depend on it."
        ]
        better = [named_best] if best.name != PLAIN else []
        cured = f"For {scheme}, there is nothing to cure."
        return cured, changes, *(but if expected else []), *better
    said = [changes, *_about_sensitivity(record)]
    good = [tried for tried in ranked(record) if is_good(record, tried)]
    if good:
        named = [f"{in_words(each)} ({_change(record, each)})" for each in good]
        said.append(f"Within the limit: {', '.join(named)}.")
        if len(good) > 1:
            first, second = (_work(record, tried) for tried in good[:2])
            reason = (
                "it has the least work at run time"
                if first < second
                else "of those with the least work at run time, it has the smallest increase"
            )
            said.append(f"The best is {in_words(best)}: {reason}.")
    elif best.name != PLAIN:
        said.append(f"No try is within the limit. {named_best}")
    elif len(record.tries) > 1:
        said.append(f"No try is within the limit, and none is better than {scheme} alone.")
    problems = [each for each in record.tries if each.problem]
    said += [f"Not possible: {in_words(each)}; {each.problem}." for each in problems]
    tried = {part for each in record.tries for part in each.name.split("+")}
    if left := [_WORDS[name] for name in remedies if name not in tried]:
        said.append(f"Not tried: {', '.join(left)}. With --all, they are tried too.")
    return tuple(said)


def in_words(tried: Try) -> str:
    """The remedies of a try, such as `SmoothQuant with GPTQ`."""
    return " with ".join(_WORDS.get(part, part) for part in tried.name.split("+"))


def _about_sensitivity(record: DoctorRecord) -> list[str]:
    """Which group of tensors costs most, as a share of what all groups cost."""
    table = record.tables.get("sensitivity")
    if table is None:
        return []
    loss = {
        name: math.log(float(x)) for name, x in zip(table["group"], table["all_but"], strict=True)
    }
    cost = loss.pop("all") - loss["none"]
    least = loss.pop("none")
    if not (loss and 0 < cost < math.inf):
        return []
    group = min(loss, key=lambda name: loss[name])
    part = (cost - (loss[group] - least)) / cost
    # Above 1, the loss without this group is smaller than that of the unquantized model; below 0,
    # larger than with it.
    if not 0 < part <= 1:
        return []
    share = percent(part)
    return [f"{group} alone causes {share} of the loss: so much is gone if it is not quantized."]


def _work(record: DoctorRecord, tried: Try) -> float:
    return record.metric("doctor.run_time_work", tried.name).value


def _change(record: DoctorRecord, tried: Try) -> str:
    value = increase(record, tried)
    return f"{'+' if value > 0 else ''}{percent(value)}"


def _row(record: DoctorRecord, tried: Try) -> tuple[str, ...]:
    def value(metric: str) -> float:
        return record.metric(metric, tried.name).value

    return (
        tried.name,
        number(value("perplexity.windowed")),
        _change(record, tried),
        number(value("doctor.run_time_work")),
        f"{value('doctor.seconds'):,.0f}",
    )
