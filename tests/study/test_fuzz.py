"""Random plans and records are read correctly or refused with a `UserError`."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from example_records import diagnosis
from oasis_attn.errors import UserError
from oasis_attn.records import Metric, Record
from oasis_attn.study.plan import Plan
from oasis_attn.study.plan_file import parse_plan, plan_text
from oasis_attn.study.results import Results
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_report import tables_text
from oasis_attn.study.verdict import judge
from study import factories

BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = [
    "vanilla", "oasis", "stdlib", "nano", "arith", "w4a4", "base", "overrides", "training",
    "steps", "learning_rate", "limit", "null_logit", "", "a\0b", "../x", "a" * 5000,
]  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([*WORDS, 1.5, 1e38, 10**23, -1, float("inf"), float("nan")]),
    st.text(max_size=6),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=4))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
PLAN = {
    "name": "tiny",
    "about": "Nothing.",
    "variants": {"vanilla": None, "mine": {"base": "oasis", "overrides": {"null_logit": 1.0}}},
    "corpora": {"stdlib": ["arith"], "pydoc": []},
    "seeds": [0, 1],
    "noise_seeds": [2],
    "sizes": ["nano"],
    "compare": {"mine": ["vanilla"]},
    "reference": "vanilla",
    "training": {"steps": 4, "vocab_size": 270, "learning_rates": {"router": 0.1}},
    "windows": 3,
    "threads": 1,
    "schemes": ["w4a4"],
    "candidates": ["mine"],
    "claims": [
        {
            "name": "one",
            "text": "One.",
            "tests": [
                {
                    "metric": "perplexity.windowed",
                    "variant": "mine",
                    "baselines": ["vanilla"],
                    "expect": "lower",
                    "size": -0.1,
                    "margin": 0.05,
                }
            ],
        }
    ],
    "criteria": [
        {
            "metric": "sink.mass",
            "against": "reference",
            "limit": 0.0,
            "applies_if": {"metric": "sink.mass", "above": 0.1, "otherwise": "no sinks"},
        },
        {"metric": "perplexity.windowed@w4a4", "against": "unquantized", "limit": "noise floor"},
    ],
    "evaluation": {"limit": 2},
}
TRAINING = ["block_length", "batch_size", "learning_rate", "trainable", "lora_rank", "warmup",
            "clip", "bf16", "eval_split", "save_every", "anneal_null"]  # fmt: skip


@st.composite
def changed(draw, value):
    """`value` with an item replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(value)))
        after = dict(value)
        action = draw(st.integers(0, 5))
        if action == 0:
            del after[name]
        elif action == 1:
            after[draw(KEYS)] = draw(VALUES)
        else:
            after[name] = draw(changed(value[name]))
        return after
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    return draw(VALUES)


def accepted(read, *args):
    """The result of `read`; None if it refuses the input with a one-line error."""
    try:
        return read(*args)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


@BOUNDED
@given(given=st.one_of(VALUES, changed(PLAN), changed(PLAN).flatmap(changed)))
def test_any_values_are_a_plan_or_refused(given):
    plan = accepted(Plan.from_dict, given)
    if plan is not None:
        accepted(plan.check)
        assert parse_plan(plan_text(plan), plan.name) == plan


@BOUNDED
@given(name=st.sampled_from(TRAINING), value=VALUES)
def test_any_setting_of_training_is_taken_or_refused(name, value):
    plan = accepted(Plan.from_dict, PLAN | {"training": {name: value}})
    if plan is not None:
        accepted(plan.check)


MARKS = [
    "name: ", "seeds", "\n", "  ", "- ", "{", "}", "[", "]", ", ", ": ", "&a ", "*a ", "? ", "<<: ",
    "!!bool ", "!!int ", "!!float ", "!!map ", "!!set ", "!!timestamp ", "!!str ", "!!binary ",
    "!!omap ", "!!python/name:os.system ", "1e9", "0777", "09", "9" * 5000, "'", '"', "|\n",
    "%YAML 1.1\n", "---\n", "#", "\t", "\ufeff", "\x00", "2001-99-99",
]  # fmt: skip
GOOD = diagnosis(metrics=(Metric(name="b", value=1.0),))
TEXT = st.lists(
    st.one_of(
        st.sampled_from(MARKS),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)  # fmt: skip


@BOUNDED
@given(text=st.one_of(TEXT, TEXT.map(lambda more: json.dumps(PLAN)[:-1] + ", " + more)))
def test_any_text_is_a_plan_or_refused(text):
    accepted(parse_plan, text, "random.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000,
        "seeds: " + "[" * 2000 + "]" * 2000,
        "seeds: " + "[" * 9 + "]" * 9,
        "a: &a [*a]",
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 8)),
    ],
)
def test_depth_and_aliases_are_bounded(text):
    with pytest.raises(UserError, match=r"nested|more than 100,000 values"):
        parse_plan(text, "random.yaml")


@BOUNDED
@given(value=VALUES)
def test_any_json_is_a_record_or_refused(tmp_path, value):
    path = tmp_path / "record.json"
    good = json.loads(GOOD.to_json())
    for each in (value, good | {"metrics": value}, good | {"model": value}):
        path.write_text(json.dumps(each))
        record = accepted(Record.load, path)
        if record is not None:
            assert Record.load(record.save(path)).metrics == record.metrics


@settings(BOUNDED, max_examples=12)
@given(data=st.data())
def test_a_study_of_any_records_is_reported_or_refused(tmp_path_factory, data):
    plan = factories.plan(
        variants=["vanilla", "oasis"], compare={"oasis": ["vanilla"]}, corpora=["stdlib"], seeds=[0]
    )
    folder = StudyFolder.begin(tmp_path_factory.mktemp("study"), plan)
    for trial in plan.trials:
        values = {"perplexity.windowed": 20.0, "outlier.max_inf_norm": 3.0, "sink.mass": 0.1}
        record = json.loads(factories.record(trial, values).to_json())
        row = data.draw(st.sampled_from(record["metrics"]))
        row["value"] = data.draw(st.sampled_from([0.0, -1.0, 1e300, 1e-320, "nan", "inf", "-inf"]))
        if data.draw(st.booleans()):
            part = data.draw(st.sampled_from(["metrics", "model", "environment", "created"]))
            record[part] = data.draw(changed(record[part]))
        folder.record_path(trial).parent.mkdir(exist_ok=True)
        folder.record_path(trial).write_text(json.dumps(record))
    accepted(folder.status)
    results = accepted(lambda: Results(plan, folder.records()))
    if results is not None:
        accepted(lambda: tables_text(results, judge(results)))
