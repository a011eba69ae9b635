from __future__ import annotations

import pytest

from oasis_attn.errors import UserError
from oasis_attn.quantization.remedies import (
    REMEDIES,
    Remedy,
    combine,
    described,
    per_channel,
    shortest_name,
)
from oasis_attn.quantization.schemes import Scheme, get_scheme, schemes

BY_NAME = {remedy.name: remedy for remedy in REMEDIES}
STATIC = per_channel(get_scheme("w8a8-static-linear"))


def applying(scheme: Scheme) -> set[str]:
    return {remedy.name for remedy in REMEDIES if remedy.applies_to(scheme)}


def test_only_weights_with_one_scale_change() -> None:
    assert STATIC.weight.granularity == "channel"
    for name in ("w8a8-dynamic", "w4a16"):
        assert per_channel(get_scheme(name)) is get_scheme(name)


@pytest.mark.parametrize(
    ("scheme", "missing"),
    [
        (STATIC, set()),
        (get_scheme("w4a4"), {"dynamic"}),
        (get_scheme("w4a16"), {"dynamic", "prefix", "folded"}),
        (get_scheme("w4a8"), {"dynamic", "folded"}),
        (get_scheme("fp8-static"), set()),
        (get_scheme("nvfp4"), {"folded"}),
        (
            STATIC.with_options({"rotation": "hadamard", "rounding": "gptq"}),
            {"folded", "rotation", "gptq"},
        ),
        (STATIC.with_options({"rotation": "folded"}), {"folded"}),
    ],
)
def test_a_remedy_that_changes_nothing_does_not_apply(scheme, missing) -> None:
    assert applying(scheme) == set(BY_NAME) - missing


def test_a_remedy_that_the_scheme_excludes_is_refused() -> None:
    rotated = STATIC.with_options({"rotation": "hadamard"})
    assert BY_NAME["smoothquant"].applies_to(rotated)
    with pytest.raises(UserError, match="does not go with rotation"):
        BY_NAME["smoothquant"].apply_to(rotated)


def test_dynamic_ranges_make_the_dynamic_scheme() -> None:
    changed = BY_NAME["dynamic"].apply_to(STATIC)
    assert shortest_name(changed) == ("w8a8-dynamic", {})
    changed = BY_NAME["dynamic"].apply_to(per_channel(get_scheme("fp8-static")))
    assert shortest_name(changed) == ("fp8-dynamic", {})
    changed = BY_NAME["dynamic"].apply_to(get_scheme("nvfp4"))
    assert shortest_name(changed) == ("nvfp4", {"static": False})


@pytest.mark.parametrize(("name", "rotation"), [("w4a4", "hadamard"), ("mxfp4", "groups")])
def test_a_rotation_stays_within_groups(name, rotation) -> None:
    assert BY_NAME["rotation"].apply_to(get_scheme(name)).rotation == rotation


def test_a_prefix_cuts_static_ranges_unless_another_observer_is_chosen() -> None:
    prefix = BY_NAME["prefix"]
    assert prefix.apply_to(STATIC).observer == "percentile"
    assert prefix.apply_to(STATIC.with_options({"observer": "mse"})).observer == "mse"
    assert prefix.apply_to(get_scheme("w4a4")) == get_scheme("w4a4")


def test_a_combination_leaves_out_what_earlier_parts_exclude() -> None:
    def combined(*names: str) -> Remedy | None:
        return combine([BY_NAME[name] for name in names], STATIC)

    found = combined("rotation", "smoothquant", "prefix", "gptq")
    assert found.name == "rotation+prefix+gptq"
    assert found.prefix
    assert found.apply_to(STATIC) == STATIC.with_options(
        {"rotation": "hadamard", "observer": "percentile", "rounding": "gptq"}
    )
    assert not combined("rotation", "gptq").prefix
    assert combined("rotation", "smoothquant") is None
    assert combined("folded", "rotation") is None
    assert combined("folded", "rotation", "gptq").name == "folded+gptq"
    assert combined("dynamic", "folded", "rotation").name == "dynamic+rotation"
    assert combined() is None


INTEGERS = [name for name, scheme in schemes().items() if scheme.weight.element_type == "int"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in schemes()),
        *((name, {"weight.bits": 3, "rounding": "gptq"}) for name in INTEGERS),
    ],
)
def test_the_shortest_name_gives_the_scheme_again(name, options) -> None:
    scheme = get_scheme(name).with_options(options)
    found, changed = shortest_name(scheme)
    assert len(changed) <= len(options)
    assert get_scheme(found).with_options(changed) == scheme


def test_a_scheme_is_described_by_what_differs_from_its_name() -> None:
    scheme = schemes()["w8a8-static-linear"]
    assert described(scheme) == "w8a8-static-linear"
    changed = scheme.with_options({"rotation": "folded", "weight.granularity": "channel"})
    assert described(changed) == "w8a8-static-linear, rotation=folded, weight.granularity=channel"
    bare = schemes()["w4a4"].with_options({"activation": None, "head": True})
    assert described(bare) == "w4a4, head=true, activation=null"
