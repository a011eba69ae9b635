from __future__ import annotations

import pytest
import torch
from torch import nn

from oasis_attn.measure import diagnose
from oasis_attn.measure.hooks import HookPoint
from oasis_attn.measure.range_noise import RangeNoise
from oasis_attn.quantization.prefix_search import _noise

from .models import CONFIGS, native, tokens


def points(*names: str) -> list[HookPoint]:
    return [
        HookPoint(name=name, kind="layer", layer=layer, module=nn.Identity())
        for layer, name in enumerate(names)
    ]


def noise(width: float, values: torch.Tensor) -> float:
    """The definition: (r / 255)^2 / 12 over the mean square of the values."""
    return (width / 255) ** 2 / 12 / values.square().mean().item()


def test_a_token_that_sets_the_range_is_found_and_left_out() -> None:
    torch.manual_seed(0)
    x_BTD = torch.randn(2, 9, 32, dtype=torch.float64)
    x_BTD[:, 3, 5] = 1000.0
    ids_BT = torch.arange(18).view(2, 9)
    measured = RangeNoise(points("a", "b"))
    measured.update(points("a")[0], torch.randn(2, 9, 32))
    measured.update(points("a", "b")[1], x_BTD)
    measured.classify(ids_BT)

    _, row = measured.tables()["range.noise"]
    expected = {"static": 0.0, "static_rest": 0.0, "dynamic": 0.0}
    for x_TD in x_BTD:
        median = x_TD[x_TD.square().mean(-1).argsort()[4]]
        rest = x_TD[[0, 1, 2, 4, 5, 6, 7, 8]]
        each = sorted(noise((x_D.max() - x_D.min()).item(), x_D) for x_D in x_TD)
        expected["static"] += noise(1000 - x_TD.min().item(), median) / 2
        expected["static_rest"] += noise((rest.max() - rest.min()).item(), median) / 2
        expected["dynamic"] += each[4] / 2
    assert row == {"tensor": "b"} | {k: pytest.approx(v) for k, v in expected.items()}
    assert expected["static"] > 0.1 > expected["static_rest"]

    ratios = [1000 / x_TD.abs().amax(-1).sort().values[4].item() for x_TD in x_BTD]
    assert measured.tables()["range.outlier_tokens"] == [
        {
            "position": 3,
            "token": token,
            "windows": 1,
            "ratio": pytest.approx(ratio),
            "layers": [1],
        }
        for token, ratio in sorted(zip((3, 12), ratios, strict=True), key=lambda x: -x[1])
    ]
    metrics = {metric.name: metric for metric in measured.metrics()}
    assert (metrics["range.outlier_tokens"].value, metrics["range.outlier_tokens"].n) == (1, 2)
    rows = measured.tables()["range.noise"]
    for kind in expected:
        mean = sum(row[kind] for row in rows) / 2
        assert metrics[f"range.noise_{kind}"].value == pytest.approx(mean)


def test_a_tensor_of_zeros_has_no_noise() -> None:
    ids_BT = torch.zeros(1, 5, dtype=torch.int64)
    x_BTD = torch.zeros(1, 5, 8)
    x_BTD[0, 2] = 100.0  # the median token is still zero
    measured = RangeNoise(points("a"))
    measured.update(points("a")[0], x_BTD)
    measured.classify(ids_BT)
    assert [metric.value for metric in measured.metrics()] == [0, 0, 0, 0]


def test_the_range_of_float16_is_wide_enough() -> None:
    torch.manual_seed(0)
    x_BTD = (1e-3 * torch.randn(1, 9, 32)).half()
    x_BTD[0, 3, 5:7] = torch.tensor([-40000, 40000])
    found = []
    for values in (x_BTD, x_BTD.double()):
        measured = RangeNoise(points("a"))
        measured.update(points("a")[0], values)
        measured.classify(torch.zeros(1, 9, dtype=torch.int64))
        (outlier,) = measured.tables()["range.outlier_tokens"]
        noises = [metric.value for metric in measured.metrics()]
        found.append([*noises, outlier["ratio"], float(_noise(values))])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_tensor_of_a_model_has_its_noise(family) -> None:
    record = diagnose(native(family), tokens(2, 20))
    rows = record.tables["range.noise"]
    named = {metric.where for metric in record.each("outlier.max_inf_norm") if metric.where}
    assert {row["tensor"] for row in rows} == named
    assert all(0 < row["dynamic"] <= row["static"] for row in rows)
    mean = sum(row["static"] for row in rows) / len(rows)
    assert record["range.noise_static"] == pytest.approx(mean)
