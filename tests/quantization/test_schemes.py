"""The table of schemes, and what a scheme refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oasis_attn.errors import UserError
from oasis_attn.quantization import Grid, Scheme, schemes


def test_names_say_the_bits():
    for name, scheme in schemes().items():
        assert scheme.name == name
        activation = 16 if scheme.activation is None else scheme.activation.bits
        assert name.startswith(f"w{scheme.weight.bits}a{activation}")
        assert ("static" in name) == scheme.static


def test_table_is_not_shared():
    schemes().clear()
    assert schemes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "max"}, "estimator: 'max' is not one of minmax"),
        ({"activation": None}, "static: granularity None has no static range"),
        (
            {"activation": Grid(bits=8, symmetric=True, granularity="token")},
            "static: granularity 'token' has no static range",
        ),
        (
            {"activation": Grid(bits=8, symmetric=True, granularity="channel")},
            "activation: granularity 'channel' is for weights",
        ),
        (
            {"weight": Grid(bits=8, symmetric=True, granularity="token")},
            "weight: granularity 'token' is for activations",
        ),
    ],
)
def test_refuses_what_does_not_go_together(change, message):
    with pytest.raises(UserError, match=message):
        replace(schemes()["w8a8-static-linear"], **change)


def test_a_scheme_of_ones_own():
    scheme = Scheme(name="mine", weight=Grid(bits=3, symmetric=True), activation=None)
    assert not scheme.static
