from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from oasis_attn import register_null_signal
from oasis_attn.errors import UserError
from oasis_attn.extension_files import load_extensions
from oasis_attn.modeling.variants import variants
from oasis_attn.study.lookup import shipped_plans
from oasis_attn.study.plan import Plan
from oasis_attn.study.plan_file import load_plan, parse_plan, plan_text
from oasis_attn.study.run import run_study
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.worker import run_alone

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.usefixtures("own_extensions")
def test_every_shipped_plan_can_be_run():
    assert {"smoke", "paper", "isolate", "signal", "beyond", "confirm"} <= set(shipped_plans())
    for name in shipped_plans():
        plan = load_plan(name)
        if name == "beyond":
            with pytest.raises(UserError, match="'attention_only' is not one of off, on, shuffled"):
                plan.check()
            plan.check(["oasis"])
            load_extensions(EXPERIMENTS / each for each in ("branch_norms.py", "null_signals.py"))
        plan.check()
        assert plan.name == name
        assert len({trial.id for trial in plan.trials}) == len(plan.trials)
        assert parse_plan(plan_text(plan), name) == plan


def test_paper_has_the_five_baselines_and_three_corpora_and_seeds():
    plan = load_plan("paper")
    (test,) = next(claim for claim in plan.claims if claim.name == "w8a8").tests
    assert plan.compare["oasis"] == test.baselines
    assert len(test.baselines) == 5
    assert len(plan.corpora) == len(plan.seeds) == 3
    assert {"w8a8-static-full", "w8a8-dynamic", "w4a4"} == set(plan.schemes)


def test_isolate_crosses_token_and_depth_normalizers_with_the_signal():
    plan = load_plan("isolate")
    table = variants()
    seen = set()
    for entry in plan.variants.values():
        s = table[entry["base"]] | entry["overrides"]
        depth = s["depth_normalizer"] if s["residual"] != "sum" else "none"
        block = s.get("depth_block_size", 1)
        seen.add((s["token_normalizer"], depth, s["null_signal"], s["residual"], block))
    depths = ("softmax", "softmax1", "sigmoid")
    full = {("softmax", depth, "off", "depth", 1) for depth in depths}
    full |= {
        ("softmax1", depth, signal, "depth", 1)
        for depth, signal in product(depths, ("off", "on", "shuffled"))
    }
    full |= {(token, "none", "off", "sum", 1) for token in ("softmax", "softmax1")}
    assert full <= seen
    assert {s[3] for s in seen} == {"sum", "depth", "official"}
    assert {s[2] for s in seen if s[4] == 4} == {"off", "on", "shuffled"}


def test_trials_are_ordered_by_seed_and_noise_seeds_are_for_the_reference_only(tiny):
    plan = tiny(seeds=[0, 1], noise_seeds=[5])
    assert [(trial.seed, trial.variant) for trial in plan.trials] == [
        (0, "vanilla"), (0, "oasis"), (1, "vanilla"), (1, "oasis"), (5, "vanilla"),
    ]  # fmt: skip


def test_an_id_depends_on_every_field_of_the_trial(tiny, corpus):
    trial = tiny().trials[0]
    assert trial.id == tiny().trials[0].id
    assert trial.id.startswith("sums-tiny-vanilla-s0-")
    changes = (
        {"windows": 4},
        {"threads": 2},
        {"schemes": ["w4a4"]},
        {"training": {"steps": 5}},
        {"evaluation": {"limit": 3}},
        {"corpora": [corpus]},
    )
    ids = {trial.id} | {tiny(**change).trials[0].id for change in changes}
    assert len(ids) == 1 + len(changes)


def test_the_reference_is_vanilla_or_the_first_variant(tiny):
    assert tiny().reference == "vanilla"
    plan = tiny(variants=["oasis", "softmax1"], compare={})
    assert plan.reference == "oasis"
    with pytest.raises(UserError, match="reference: 'vanilla' is not one of"):
        tiny(variants=["oasis", "softmax1"], compare={}, reference="vanilla")


def test_a_plan_goes_through_yaml_and_json(tiny):
    plan = tiny(variants={"vanilla": None, "off": {"base": "oasis_signal_off"}}, compare={})
    assert parse_plan(plan_text(plan), "x") == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_text_that_looks_like_a_number_stays_text(tiny):
    for name in ("1e3", "0o7", "off", "True", "null"):
        assert parse_plan(plan_text(tiny(name=name)), "x").name == name


def test_a_variant_may_have_its_own_learning_rates(tiny):
    entry = {"base": "oasis", "training": {"learning_rates": {"beta": 0.1}}}
    plan = tiny(variants={"vanilla": None, "fast": entry}, compare={})
    vanilla, fast = plan.trials[:2]
    assert fast.training == {**vanilla.training, "learning_rates": {"beta": 0.1}}
    assert dict(fast.training_config(Path("x")).rates)["beta"] == 0.1
    common = {"learning_rates": {"beta": 0.2, "router": 0.3}}
    plan = tiny(variants={"vanilla": None, "fast": entry}, compare={}, training=common)
    vanilla, fast = plan.trials[:2]
    assert vanilla.training == common
    assert fast.training == {"learning_rates": {"beta": 0.1, "router": 0.3}}
    with pytest.raises(UserError, match="training of 'fast': 'steps' is not one of learning_rate"):
        tiny(variants={"fast": entry | {"training": {"steps": 3}}}, compare={}).check()


def test_yaml_is_read_as_of_version_1_2(tmp_path):
    text = """
name: words
about: x
variants:
  vanilla:
  mine: {base: oasis, overrides: {null_signal: off}}
corpora: [pydoc]
seeds: [0]
compare: {}
training: {learning_rate: 4e-3, bf16: False}
"""
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.variants["mine"]["overrides"] == {"null_signal": "off"}
    assert plan.training == {"learning_rate": 0.004, "bf16": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name: 'a/b'"),
        ({"name": 3}, "name: 3 is not text"),
        ({"about": None}, "field 'about' is missing"),
        ({"about": None, "seeds": None}, "fields 'about', 'seeds' are missing"),
        ({"seedz": [1]}, "did you mean 'seeds'"),
        ({"seeds": []}, "seeds: a study requires at least one"),
        ({"seeds": 3}, "seeds: 3 is not a list"),
        ({"seeds": ["0"]}, "seeds: '0' is not a whole number"),
        ({"seeds": [True]}, "seeds: True is not a whole number"),
        ({"seeds": [-1]}, "seeds: -1"),
        ({"seeds": [2**32]}, "seeds: 4294967296 is not a whole number from 0 to"),
        ({"corpora": {"pydoc": ["perplexity"]}}, "every trial measures perplexity"),
        ({"training": {"bf16": "maybe"}}, "bf16: 'maybe' is neither true nor false"),
        ({"training": {"learning_rates": 3}}, "learning_rates: 3 is not a mapping"),
        ({"training": {"trainable": 5}}, "trainable: 5 is not a list"),
        ({"seeds": [1, 1]}, "has duplicates"),
        ({"noise_seeds": [0]}, "noise_seeds: 0 is already one of seeds"),
        ({"reference": "vanila", "noise_seeds": [3]}, "did you mean 'vanilla'"),
        ({"windows": 1}, "windows: 1"),
        ({"windows": 2.5}, "windows: 2.5"),
        ({"threads": 0}, "threads: 0"),
        ({"sizes": ["nanno"]}, "did you mean 'nano'"),
        ({"corpora": ["pydok"]}, "did you mean 'pydoc'"),
        ({"corpora": {"pydoc": ["arit"]}}, "did you mean 'arith'"),
        ({"schemes": ["w4a5"]}, "schemes: 'w4a5'"),
        ({"training": {"stepz": 3}}, "did you mean 'steps'"),
        ({"training": {"seed": 3}}, "training: 'seed'"),
        ({"training": {"steps": 0}}, "steps: 0"),
        ({"training": {"vocab_size": 1.5}}, "vocab_size: 1.5 is not a whole number"),
        ({"training": {"learning_rate": 1e38}}, "learning_rate: 1e\\+38"),
        ({"name": "a" * 5000}, "is not a file name of at most 64 letters"),
        ({"seeds": [10**23]}, "seeds: 1000"),
        ({"windows": 10**23}, "windows: 1000"),
        ({"windows": 2.5}, "windows: 2.5 is not a whole number"),
        ({"training": [3]}, "training: 3 is not text"),
        ({"evaluation": {"limmit": 3}}, "did you mean 'limit'"),
        ({"evaluation": {"limit": 0}}, "limit: 0"),
        ({"variants": ["vanila", "oasis"]}, "did you mean 'vanilla'"),
        ({"variants": {"vanilla": {"overrides": {"null_logit": 1}}}}, "requires another name"),
        ({"variants": {"mine": {"base": "oasis", "set": {}}}}, "overrides"),
        (
            {"variants": {"mine": {"base": "oasis", "overrides": {"null_logits": 1}}}},
            "did you mean",
        ),
        (
            {"variants": {"mine": {"base": "vanilla", "overrides": {"null_signal": "on"}}}},
            "null_signal",
        ),
        ({"compare": {"oasys": ["vanilla"]}}, "did you mean 'oasis'"),
        ({"compare": {"oasis": ["oasis"]}}, "requires baselines other than itself"),
        ({"compare": {"oasis": []}}, "requires baselines other than itself"),
    ],
)
def test_a_wrong_plan_is_one_clear_error(plain, changes, message):
    wrong = plain(**changes)
    if "variants" in changes and "compare" not in changes:
        wrong["compare"] = {}
    with pytest.raises(UserError, match=message):
        Plan.from_dict(wrong).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1", "is not YAML"),
        ("seeds: [1]\nseeds: [2]", "duplicate key 'seeds'"),
        ("[1]", r"plan: \[1\] is not a mapping of fields"),
        ("", "plan: None is not a mapping of fields"),
        ("? [a, b]\n: c", "a key that is not a scalar"),
        ("name: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plan(path)


def test_an_error_for_an_unknown_plan_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        load_plan("smokey")
    with pytest.raises(UserError, match="cannot be read"):
        load_plan("absent.yaml")


@pytest.mark.usefixtures("own_extensions")
def test_an_unregistered_name_is_an_error_of_running_a_study_only(tiny, tmp_path):
    entry = {"base": "oasis", "overrides": {"null_signal": "largest"}}
    plan = tiny(variants={"vanilla": None, "largest": entry}, compare={})
    message = "null_signal: 'largest' is not one of off, on, shuffled, averaged; .*register it with"
    with pytest.raises(UserError, match=f"^{message} register_null_signal, or load its file with"):
        run_study(plan, tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()
    folder = StudyFolder.begin(tmp_path / "out", plan)
    assert folder.status().total == 2
    with pytest.raises(UserError, match=message):
        run_alone(str(folder.path), plan.trials[1].id)
    assert [path.name for path in folder.path.iterdir()] == ["plan.yaml"]
    plan.check(["vanilla"])
    register_null_signal("largest", lambda null_BHT, _layer: null_BHT.amax(1))
    plan.check()


def test_a_plan_cannot_name_files_to_run(plain):
    with pytest.raises(UserError, match="plan: 'extensions' is not one of"):
        Plan.from_dict(plain() | {"extensions": ["signals.py"]})


def test_published_results_can_be_read_after_a_setting_is_removed(tiny):
    entry = {"base": "oasis", "overrides": {"removed": 1}}
    plan = tiny(variants={"vanilla": None, "old": entry}, compare={})
    assert parse_plan(plan_text(plan), "x") == plan
    with pytest.raises(UserError, match="'removed' is not one of"):
        plan.check()
