from __future__ import annotations

import math
from dataclasses import replace

import pytest

from example_records import ENVIRONMENT, TEXT, diagnosis, model_info
from oasis_attn.quantization.schemes import schemes
from oasis_attn.records import DoctorRecord, Metric, Try
from oasis_attn.report.record_findings import findings
from oasis_attn.report.record_page import record_sections
from oasis_attn.report.remedies import doctor_conclusion, doctor_table, ranked

Numbers = dict[str, tuple[float, float] | str]
ALL = ("dynamic", "smoothquant", "prefix", "rotation", "gptq")


def record(tries: Numbers, **changes) -> DoctorRecord:
    """The tries with their increase and work at run time, or with their problem."""
    metrics = [Metric(name="perplexity.windowed", value=10.0)]
    for name, found in tries.items():
        if not isinstance(found, str):
            increase, work = found
            values = {
                "perplexity.windowed": 10 * (1 + increase),
                "doctor.increase": increase,
                "doctor.run_time_work": work,
                "doctor.seconds": 12.3,
            }
            metrics += [Metric(name=n, value=value, where=name) for n, value in values.items()]
    fields = {
        "model": model_info("folder/m"),
        "sha256": "0",
        "scheme": schemes()["w8a8-static-linear"].to_dict(),
        "tolerance": 0.05,
        "tries": tuple(
            Try(name=name, scheme={}, prefix=(), problem=found if isinstance(found, str) else "")
            for name, found in tries.items()
        ),
        "data": TEXT,
        "calibration": TEXT,
        "metrics": tuple(metrics),
        "environment": ENVIRONMENT,
    }
    return DoctorRecord(**fields | changes)


def noise(static: float):
    kinds = {"static": static, "static_rest": 0.0, "dynamic": 0.0}
    return diagnosis(
        metrics=tuple(Metric(name=f"range.noise_{k}", value=v) for k, v in kinds.items())
    )


MANY: Numbers = {
    "plain": (0.84, 0.0),
    "dynamic": (0.02, 1.0),
    "prefix": (0.042, 0.0),
    "rotation": (float("nan"), 0.3),
    "smoothquant": "it fails",
}


def test_of_good_tries_the_one_with_least_work_is_first() -> None:
    found = record(MANY)
    assert [tried.name for tried in ranked(found)] == ["prefix", "dynamic", "plain", "rotation"]
    strict = record(MANY, tolerance=0.01)
    assert [tried.name for tried in ranked(strict)] == ["dynamic", "prefix", "plain", "rotation"]
    table = doctor_table(found)
    assert table.title == "m: w8a8-static-linear, tolerance 5 %"
    assert table.rows[:2] == (
        ("full precision", "10", "-", "-", "-"),
        ("prefix", "10.42", "+4.2 %", "0", "12"),
    )


def test_the_page_of_a_record_begins_with_the_conclusion() -> None:
    records = {"m": record(MANY)}
    assert findings(records) == list(doctor_conclusion(None, records["m"], ()))
    (numbers, *_) = record_sections(records, {"m": "record.json"})
    assert numbers.items[0] == doctor_table(records["m"])
    begun = replace(records["m"], tries=())
    assert findings({"m": begun}) == ["`perplexity.windowed` is 10 (n = 1)."]
    assert record_sections({"m": begun}, {"m": "record.json"})


def test_what_is_said_of_good_tries() -> None:
    table = {
        "group": ["all", "none", "mlp.down_proj", "mlp.up_proj"],
        "all_but": [40.0, 10.0, 11.0, 39.0],
        "only": [40.0, 10.0, 39.0, 11.0],
    }
    found = record(MANY, tables={"sensitivity": table})
    assert doctor_conclusion(noise(2.0), found, ALL) == (
        "w8a8-static-linear alone changes the perplexity by +84 %; 5 % is the limit.",
        "mlp.down_proj alone causes 93 % of the loss: so much is gone if it is not quantized.",
        "Within the limit: a prefix (+4.2 %), dynamic ranges (+2 %).",
        "The best is a prefix: it has the least work at run time.",
        "Not possible: SmoothQuant; it fails.",
        "Not tried: GPTQ. With --all, they are tried too.",
    )


def test_a_group_causes_from_nothing_to_all_of_the_loss() -> None:
    for total, best in ((11.0, 9.9), (11.0, 12.0), (math.inf, 10.0)):
        table = {"group": ["all", "none", "a", "b"], "all_but": [total, 10.0, best, 13.0]}
        found = record(MANY, tables={"sensitivity": table})
        assert not any("of the loss" in text for text in doctor_conclusion(None, found, ALL))


def test_what_is_said_if_nothing_is_good() -> None:
    tries: Numbers = {"plain": (9.0, 0.0), "rotation": (2.0, 1.0), "gptq": (4.0, 0.0)}
    found = record(tries | {"rotation+gptq": (0.5, 1.0)})
    assert doctor_conclusion(noise(0.0), found, ("rotation", "gptq"))[1:] == (
        "No try is within the limit. The best is a rotation at run time with GPTQ (+50 %).",
    )


def test_what_is_said_if_no_remedy_helps() -> None:
    """The conclusion names the try that the commands apply, and why it is the best."""
    found = record({"plain": (0.09, 1.0), "gptq": (0.1, 1.0), "rotation": (0.2, 1.3)})
    assert doctor_conclusion(noise(0.0), found, ("rotation", "gptq"))[1:] == (
        "No try is within the limit, and none is better than w8a8-static-linear alone.",
    )
    impossible = record({"plain": (0.09, 1.0), "smoothquant": "it fails"})
    assert doctor_conclusion(noise(0.0), impossible, ())[1:] == (
        "No try is within the limit, and none is better than w8a8-static-linear alone.",
        "Not possible: SmoothQuant; it fails.",
    )
    equal = record({"plain": (0.5, 0.0), "gptq": (0.02, 0.0), "smoothquant": (0.01, 0.0)})
    assert doctor_conclusion(noise(0.0), equal, ())[-1] == (
        "The best is SmoothQuant: of those with the least work at run time, it has the smallest"
        " increase."
    )
    fine = record({"plain": (0.03, 0.0), "gptq": (0.01, 0.0)})
    assert doctor_conclusion(noise(0.0), fine, ())[-1] == "The best is GPTQ (+1 %)."


@pytest.mark.parametrize("static", [0.0, 2.0])
def test_what_is_said_if_there_is_nothing_to_cure(static) -> None:
    said = doctor_conclusion(noise(static), record({"plain": (-0.001, 0.0)}), ALL)
    assert said[:2] == (
        "For w8a8-static-linear, there is nothing to cure.",
        "w8a8-static-linear alone changes the perplexity by -0.1 %; 5 % is the limit.",
    )
    assert [text.startswith("The diagnosis expects a break") for text in said[2:]] == (
        [True] if static else []
    )
