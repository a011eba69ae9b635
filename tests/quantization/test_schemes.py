"""The table of schemes, and combinations that are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from oasis_attn.errors import UserError
from oasis_attn.quantization import QuantSpec, Scheme, observers, schemes
from oasis_attn.quantization.schemes import OBSERVERS


def test_names_contain_the_bits():
    for name, scheme in schemes().items():
        assert scheme.name == name
        weight, activation = scheme.weight, scheme.activation
        if weight.element_type == "int":
            assert name.startswith(f"w{weight.bits}a{activation.bits if activation else 16}")
        else:
            assert f"fp{weight.bits}" in name
            assert activation.bits == weight.bits
        # All of NVFP4 has a scale of the tensor in addition to those of groups.
        assert ("static" in name or name == "nvfp4") == scheme.static


def test_every_observer_can_be_chosen():
    assert tuple(observers.OBSERVERS) == OBSERVERS


def test_table_is_not_shared():
    schemes().clear()
    assert schemes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observer": "max"}, "observer: 'max' is not one of minmax"),
        ({"activation": None}, "static: True is for activations, which are not quantized"),
        (
            {"activation": QuantSpec(bits=8, symmetric=True, granularity="token")},
            "static: granularity 'token' has no static range",
        ),
        (
            {"activation": QuantSpec(bits=8, symmetric=True, granularity="channel")},
            "activation: granularity 'channel' is for weights",
        ),
        (
            {"weight": QuantSpec(bits=8, symmetric=True, granularity="token")},
            "weight: granularity 'token' is for activations",
        ),
        ({"targets": "all"}, "targets: 'all' is not one of linear, full"),
        ({"targets": "full", "static": False}, "targets: 'full' needs static ranges"),
        ({"head": "no"}, "head: 'no' is neither true nor false"),
        ({"rotation": "hadamar"}, "did you mean 'hadamard'"),
        ({"rounding": "up"}, "rounding: 'up' is not one of nearest, gptq"),
        ({"clip_ratio": 0}, "clip_ratio: 0 is not a number above 0, up to 1"),
        ({"clip_ratio": "0.9"}, "clip_ratio: '0.9' is not a number"),
        ({"clip_ratio": 0.9}, "clip_ratio: 0.9 is for dynamic ranges; this scheme has none"),
        ({"smooth_alpha": 1.5}, "smooth_alpha: 1.5 is not a number from 0 to 1"),
        ({"smooth_alpha": True}, "smooth_alpha: True is not a number from 0 to 1"),
        (
            {"activation": schemes()["mxfp4"].activation},
            "static: granularity 'group' has no static range",
        ),
        (
            {"activation": schemes()["nvfp4"].activation, "observer": "mse"},
            "observer: 'mse' does not go with static ranges of groups",
        ),
        (
            {"activation": schemes()["nvfp4"].activation, "targets": "full"},
            "targets: 'full' quantizes attention probabilities, whose rows are not divisible",
        ),
        (
            {"smooth_alpha": 0.5, "rotation": "hadamard"},
            "smooth_alpha: 0.5 does not go with rotation 'hadamard'",
        ),
        (
            {"weight": schemes()["mxfp4"].weight, "rotation": "groups"},
            "rotation: 'groups' needs weights and activations with one group_size; they have 32",
        ),
    ],
)
def test_inconsistent_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(schemes()["w8a8-static-linear"], **change)


def test_a_custom_scheme():
    scheme = Scheme(name="mine", weight=QuantSpec(bits=3, symmetric=True), activation=None)
    assert not scheme.static


def test_which_schemes_need_calibration():
    for scheme in schemes().values():
        assert scheme.needs_calibration == scheme.static
    assert replace(schemes()["w4a4"], rounding="gptq").needs_calibration
    assert replace(schemes()["w4a4"], smooth_alpha=0.0).needs_calibration
    assert replace(schemes()["w4a4"], rotation="fitted").needs_calibration


@pytest.mark.parametrize("scheme", schemes().values(), ids=schemes())
def test_to_dict_and_from_dict_are_inverse(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_options_of_weight_and_activation():
    scheme = schemes()["w4a4"]
    varied = scheme.with_options({"weight.bits": 3, "activation": None, "rounding": "gptq"})
    weight = replace(scheme.weight, bits=3)
    assert varied == replace(scheme, weight=weight, activation=None, rounding="gptq")
    assert scheme.with_options({}) == scheme == schemes()["w4a4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight.bit": 3},
            "options: 'weight.bit' is not one of weight.bits, .*mean 'weight.bits'",
        ),
        ({"weigth.bits": 3}, "options: 'weigth.bits' is not one of name, weight"),
        ({"bits": 3}, "options: 'bits' is not one of name, .*did you mean 'weight.bits'"),
        ({"static.head": True}, "options: 'static.head' is not one of"),
        ({"activation.bits": 3}, "activation.bits: scheme 'w4a16' does not quantize activations"),
        ({"weight": 3}, "^weight: 3 is not a mapping with the fields of a format; to change one"),
        ({"weight": 0, "weight.bits": 8}, "^weight: 0 is not a mapping"),
        ({"weight": None}, "^weight: None is not a mapping"),
        ({"weight": "int8"}, "^weight: 'int8' is not .* such as weight.bits=4$"),
        ({"weight": {"bit": 4}}, "^weight: 'bit' is not one of bits, symmetric, .* mean 'bits'"),
        ({"weight": {"bits": 4}}, "^weight: {'bits': 4} lacks the field 'symmetric'"),
        ({"weight": {"bits": 0, "symmetric": True}}, "^weight.bits: 0 is not an integer"),
        ({"activation": 0}, "^activation: 0 is not a mapping with the fields of a format or null"),
        ({"activation": False}, "^activation: False is not a mapping"),
        ({"activation": {}}, "^activation: {} lacks the field 'bits'"),
        ({"name": 3}, "^name: 3 is not text"),
        ({"weight.bits": float("nan")}, "^weight.bits: nan is not an integer from 2 to 8"),
        ({"weight.granularity": ["group"]}, r"^weight.granularity: \['group'\] is not one of"),
        ({"weight.group_size": "32"}, "^weight.group_size: '32' is not an integer"),
        ({"clip_ratio": float("nan")}, "^clip_ratio: nan is not a number above 0, up to 1"),
        ({"fused_scales": 1}, "fused_scales: 1 is neither true nor false"),
        ({"fused_scales": True}, "fused_scales: True is for weights with scale_type 'e4m3', not"),
        ({"smooth_alpha": "much"}, "smooth_alpha: 'much' is not a number from 0 to 1"),
        ({"weight.bits": 1}, "^weight.bits: 1 is not an integer from 2 to 8"),
        ({"weight.element_type": "e4m3"}, "^weight.bits: 4 does not go with element_type 'e4m3'"),
    ],
)
def test_unknown_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        schemes()["w4a16"].with_options(changes)


def test_options_of_float_formats():
    scheme = schemes()["nvfp4"].with_options({"weight.group_size": 32, "static": False})
    assert (scheme.weight.group_size, scheme.activation.group_size) == (32, 16)
    assert not scheme.needs_calibration


def test_int8_kernels_do_not_compute_floats():
    for scheme in schemes().values():
        if scheme.weight.element_type != "int":
            assert scheme.simulated_only == "kernels multiply integers only"
    with_targets = schemes()["fp8-static"].with_options({"targets": "full"})
    assert with_targets.simulated_only == "no kernel quantizes between linear layers"
