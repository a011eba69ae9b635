from __future__ import annotations

import pytest
import torch
from scipy import stats

from oasis_attn.measure import diagnose
from oasis_attn.measure.hooks import HookPoint
from oasis_attn.measure.outliers import (
    SILENT,
    Outliers,
    inf_norm,
    literature_kurtosis,
    massive,
    moments,
    pearson_kurtosis,
)

from .models import native, tokens

LAYER = HookPoint(name="layers.0", kind="layer", layer=0, module=torch.nn.Identity())
MLP = HookPoint(name="layers.0.mlp", kind="mlp", layer=0, module=torch.nn.Identity())


def kurtosis(x_BM):
    return literature_kurtosis(moments(x_BM))


def pearson(x_BM):
    return pearson_kurtosis(moments(x_BM))


def test_inf_norm_by_hand():
    x_BM = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.5, float("nan")], [0.0, float("-inf"), 1.0]])
    assert inf_norm(x_BM).tolist()[0] == 3
    assert inf_norm(x_BM)[1].isnan()
    assert inf_norm(x_BM)[2] == float("inf")


@pytest.mark.parametrize("n", [2, 7, 1 << 18, (1 << 18) + 1])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kurtosis_against_scipy(n, offset):
    x_BM = torch.randn(2, n, generator=torch.Generator().manual_seed(n)) + offset
    before = x_BM.clone()
    # scipy divides by the biased variance.
    expected = stats.kurtosis(x_BM.double().numpy(), axis=1, fisher=False) * ((n - 1) / n) ** 2
    torch.testing.assert_close(kurtosis(x_BM), torch.tensor(expected), rtol=2e-3, atol=0)
    torch.testing.assert_close(kurtosis(x_BM.double()), kurtosis(x_BM))
    assert torch.equal(x_BM, before)


def test_kurtosis_never_writes_to_float64_activations():
    x_BM = torch.randn(1, 100, dtype=torch.float64)
    before = x_BM.clone()
    kurtosis(x_BM)
    assert torch.equal(x_BM, before)


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 1_000_000, generator=generator)
    assert kurtosis(normal).item() == pytest.approx(3, abs=0.03)
    uniform = torch.rand(1, 1_000_000, generator=generator)
    assert kurtosis(uniform).item() == pytest.approx(1.8, abs=0.01)
    # One spike among n - 1 zeros: about n; and a constant, by the 1e-6, is 0 and not NaN.
    spike = torch.zeros(1, 10_000)
    spike[0, 5] = 25_000
    assert kurtosis(spike).item() == pytest.approx(10_000, rel=1e-3)
    assert kurtosis(torch.ones(1, 10)).item() == 0


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("n", [2, 7, (1 << 18) + 1])
def test_pearson_kurtosis_against_scipy(n, offset):
    x_BM = torch.randn(2, n, generator=torch.Generator().manual_seed(n)) + offset
    expected = stats.kurtosis(x_BM.double().numpy(), axis=1, fisher=False)
    torch.testing.assert_close(pearson(x_BM), torch.tensor(expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(pearson(x_BM.double()), pearson(x_BM))


@pytest.mark.parametrize("exponent", range(-300, 301, 50))
def test_pearson_kurtosis_has_no_scale(exponent):
    x_BM = torch.randn(3, 999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_BM[1, 5] = 80
    x_BM[2] = x_BM[2].sign()
    value, scaled = pearson(x_BM), pearson(x_BM * 10.0**exponent)
    torch.testing.assert_close(scaled, value, rtol=1e-12, atol=0)
    assert value[1] > 300
    assert value[2] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_pearson_kurtosis_has_no_scale_in_float32(exponent):
    x_BM = torch.randn(2, 999, generator=torch.Generator().manual_seed(0)) + 0.3
    torch.testing.assert_close(pearson(x_BM * 10.0**exponent), pearson(x_BM), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pearson_kurtosis_of_one_hot_and_constant_tensors(dtype):
    smallest = float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))
    n = 1000
    for value in (smallest, 0.1, 1.0, float(torch.finfo(dtype).max)):
        spike = torch.zeros(1, n, dtype=dtype)
        spike[0, 5] = value
        expected = (n * n - 3 * n + 3) / (n - 1)  # of a Bernoulli variable of 1 / n
        assert pearson(spike).item() == pytest.approx(expected, rel=1e-9)
        for constant in (torch.full((1, n), value, dtype=dtype), torch.zeros(1, n, dtype=dtype)):
            assert pearson(constant).isnan().all()
            assert moments(constant).constant.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_last_bit_of_one_value_is_no_constant(dtype):
    x_BM = torch.ones(1, 1 << 18, dtype=dtype)
    x_BM[0, 77] += torch.finfo(dtype).eps
    assert not moments(x_BM).constant.any()
    assert pearson(x_BM).item() == pytest.approx(1 << 18, rel=1e-4)


def test_pearson_kurtosis_is_never_below_1():
    signs_BM = torch.tensor([[1.0, -1.0] * 50, [3.0, 3.1] * 50, [1e-30, -1e-30] * 50])
    assert (pearson(signs_BM) >= 1).all()
    torch.testing.assert_close(pearson(signs_BM), torch.ones(3).double())


def test_what_is_not_finite_has_no_kurtosis():
    for bad in (float("nan"), float("inf")):
        row = moments(torch.tensor([[1.0, 2.0, bad]]))
        assert pearson_kurtosis(row).isnan()
        assert not row.constant


def seen(*scales):
    """One tensor of standard normal values for each scale, in two sequences; 0 is a zero tensor."""
    points = [
        HookPoint(name=f"x{index}", kind=kind, layer=0, module=torch.nn.Identity())
        for index, kind in enumerate(["layer", "mlp", *["norm"] * (len(scales) - 2)])
    ]
    outliers, ids_BT = Outliers(points), torch.zeros(1, 16, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for _sequence in range(2):
        for point, scale in zip(points, scales, strict=True):
            outliers.update(point, torch.randn(1, 16, 32, generator=generator) * scale, ids_BT)
    return {(m.name, m.where): m.value for m in outliers.metrics()}, outliers.tables()


def test_silent_tensors_are_named_and_have_no_part_in_our_mean():
    loud, _ = seen(1.0, 1.0, 1.0, 1.0, 2.0)
    values, tables = seen(1.0, 0.5 * SILENT, 1.0, 0.0, 2.0)
    assert loud["outlier.silent_tensors", ""] == loud["outlier.understated_kurtosis", ""] == 0
    for name in ("outlier.silent_tensors", "outlier.understated_kurtosis"):
        assert values[name, ""] == 2
        assert {where for n, where in values if n == name and where} == {"x1", "x3"}
    each = {where: v for (name, where), v in values.items() if name == "outlier.pearson_kurtosis"}
    assert set(each) == {
        "x0",
        "x1",
        "x2",
        "x4",
    }  # a silent tensor has a kurtosis, a constant has none
    active = [each["x0"], each["x2"], each["x4"]]
    assert values["outlier.mean_pearson_kurtosis", ""] == pytest.approx(sum(active) / 3)
    assert values["outlier.max_pearson_kurtosis", ""] == max(active)
    # The literature's mean is of all five, two of them far below 1.
    assert values["outlier.kurtosis", "x1"] < 1e-3
    assert values["outlier.kurtosis", "x3"] == 0
    assert values["outlier.avg_kurtosis", ""] < 0.7 * values["outlier.mean_pearson_kurtosis", ""]
    assert tables["outlier.pearson_kurtosis_layer"] == [each["x0"]]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_a_model_of_any_scale_has_the_same_silent_tensors_and_our_kurtosis(scale):
    values, _ = seen(1.0, 0.5 * SILENT, 1.0, 0.0, 2.0)
    scaled, _ = seen(*(scale * x for x in (1.0, 0.5 * SILENT, 1.0, 0.0, 2.0)))
    for (name, where), value in values.items():
        if "pearson" in name or "silent" in name:
            assert scaled[name, where] == pytest.approx(value, rel=1e-5)


def test_small_tensors_are_not_silent_but_understated():
    """As in a model at its start: everything is small, and the literature's epsilon is not."""
    values, _ = seen(0.02, 0.02, 0.02, 0.02)
    assert values["outlier.silent_tensors", ""] == 0
    assert values["outlier.understated_kurtosis", ""] == 4
    assert values["outlier.avg_kurtosis", ""] < 1
    assert values["outlier.mean_pearson_kurtosis", ""] == pytest.approx(3, abs=0.5)


def test_where_all_is_silent_there_is_no_mean():
    values, tables = seen(0.0, 0.0)
    assert values["outlier.silent_tensors", ""] == 2
    assert str(values["outlier.mean_pearson_kurtosis", ""]) == "nan"
    assert str(values["outlier.max_pearson_kurtosis", ""]) == "nan"
    assert str(tables["outlier.pearson_kurtosis_layer"]) == "[nan]"


def test_half_precision_is_summed_in_double():
    x_BM = 60_000 * torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(kurtosis(x_BM), kurtosis(x_BM.double()))


def test_every_tensor_of_a_llama_against_stored_activations():
    model, ids = native("llama"), tokens()
    hooked: dict[str, torch.Tensor] = {}
    names = ["norm"]
    for layer in range(3):
        below = ("", ".mlp", ".self_attn.o_proj", ".input_layernorm", ".post_attention_layernorm")
        names += [f"layers.{layer}{part}" for part in below]
    for name in names:
        model.model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: hooked.__setitem__(name, output)
        )
    with torch.no_grad():
        model(input_ids=ids)
    stored = dict(hooked)  # diagnosing runs the hooks again
    record = diagnose(model, ids)
    largest, kurtoses = {}, {}
    for name, x_NTD in stored.items():
        x_NM = x_NTD.flatten(1)
        largest[name] = x_NM.abs().amax(1).mean().item()
        centered = x_NM - x_NM.mean(1, keepdim=True)
        fourth = (centered**4).mean(1) / (x_NM.std(1, unbiased=True) ** 4 + 1e-6)
        kurtoses[name] = fourth.mean().item()
    assert {m.where: m.value for m in record.each("outlier.max_inf_norm") if m.where} == (
        pytest.approx(largest)
    )
    assert {m.where: m.value for m in record.each("outlier.kurtosis")} == pytest.approx(kurtoses)
    assert record["outlier.max_inf_norm"] == pytest.approx(max(largest.values()))
    assert record["outlier.avg_kurtosis"] == pytest.approx(sum(kurtoses.values()) / len(names))
    assert record["outlier.max_kurtosis"] == pytest.approx(max(kurtoses.values()))
    assert record["outlier.max_inf_norm_mlp"] == pytest.approx(
        max(value for name, value in largest.items() if name.endswith("mlp"))
    )
    layers = [f"layers.{layer}" for layer in range(3)]
    assert record["outlier.max_inf_norm_layer"] == pytest.approx(max(map(largest.get, layers)))
    assert record.tables["outlier.inf_norm_layer"] == pytest.approx([largest[n] for n in layers])
    assert record.tables["outlier.kurtosis_layer"] == pytest.approx([kurtoses[n] for n in layers])


def test_massive_activations_by_hand():
    x_BTD = torch.full((2, 4, 8), 0.5)
    x_BTD[0, 0, 3] = -5000
    x_BTD[1, 1, 3] = 6000
    x_BTD[1, 2, 1] = 501  # over a thousand medians
    x_BTD[1, 2, 5] = 499  # not over a thousand medians
    ids_BT = torch.tensor([[9, 1, 2, 3], [1, 9, 2, 3]])
    outliers = Outliers([LAYER, MLP])
    outliers.update(LAYER, x_BTD, ids_BT)
    outliers.update(MLP, x_BTD, ids_BT)  # only hidden states count
    counts = {m.name: m.value for m in outliers.metrics() if not m.where}
    assert counts["outlier.massive"] == 3
    tables = outliers.tables()
    places = [
        {"layer": 0, "channel": 1, "token": 2, "largest": 501, "position": 2},
        {"layer": 0, "channel": 3, "token": 9, "largest": 6000, "position": 1},
    ]
    assert tables["outlier.massive"] == [
        places[0] | {"count": 1, "first_position": 2},
        places[1] | {"count": 2, "first_position": 0},
    ]
    assert tables["outlier.largest"] == [places[1]]


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (7, 9), (64, 96)])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 300.0])
def test_massive_activations_exceed_a_thousand_medians(shape, scale):
    generator = torch.Generator().manual_seed(0)
    for spread in (1, 4, 12):  # of the logarithms of the sizes
        x_TD = scale * torch.exp(spread * torch.randn(shape, generator=generator))
        expected = x_TD > max(100, 1000 * float(x_TD.median()))
        assert torch.equal(massive(-x_TD), expected)


def test_nothing_below_100_is_massive():
    x_BTD = torch.zeros(1, 4, 8)
    x_BTD[0, 0, 0] = 99
    outliers = Outliers([LAYER, MLP])
    outliers.update(LAYER, x_BTD, torch.zeros(1, 4, dtype=torch.long))
    assert outliers.tables()["outlier.massive"] == []


def test_flat_mlp_outputs_are_read_per_sequence():
    x_BTD = torch.randn(2, 4, 8)
    ids_BT = torch.zeros(2, 4, dtype=torch.long)
    deep, flat = Outliers([LAYER, MLP]), Outliers([LAYER, MLP])
    for outliers, x in ((deep, x_BTD), (flat, x_BTD.flatten(0, 1))):
        outliers.update(LAYER, x_BTD, ids_BT)
        outliers.update(MLP, x, ids_BT)
    assert deep.metrics() == flat.metrics()
