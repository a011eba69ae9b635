from __future__ import annotations

import pytest
import torch
from scipy import stats

from oasis_attn.measure import diagnose
from oasis_attn.measure.outliers import Outliers, inf_norm, kurtosis
from oasis_attn.measure.parts import Tap

from .models import native, tokens

LAYER = Tap(name="layers.0", kind="layer", layer=0, module=torch.nn.Identity())
MLP = Tap(name="layers.0.mlp", kind="mlp", layer=0, module=torch.nn.Identity())


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
        centred = x_NM - x_NM.mean(1, keepdim=True)
        fourth = (centred**4).mean(1) / (x_NM.std(1, unbiased=True) ** 4 + 1e-6)
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
    x_BTD[1, 0, 3] = 6000
    x_BTD[1, 2, 1] = 501  # over a thousand medians
    x_BTD[1, 2, 5] = 499  # not over a thousand medians
    ids_BT = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3]])
    outliers = Outliers([LAYER, MLP])
    outliers.see(LAYER, x_BTD, ids_BT)
    outliers.see(MLP, x_BTD, ids_BT)  # only hidden states count
    counts = {m.name: m.value for m in outliers.metrics() if not m.where}
    assert counts["outlier.massive"] == 3
    assert outliers.tables()["outlier.massive"] == [
        {"layer": 0, "channel": 1, "token": 2, "count": 1, "largest": 501, "first_position": 2},
        {"layer": 0, "channel": 3, "token": 9, "count": 2, "largest": 6000, "first_position": 0},
    ]


def test_nothing_below_100_is_massive():
    x_BTD = torch.zeros(1, 4, 8)
    x_BTD[0, 0, 0] = 99
    outliers = Outliers([LAYER, MLP])
    outliers.see(LAYER, x_BTD, torch.zeros(1, 4, dtype=torch.long))
    assert outliers.tables()["outlier.massive"] == []


def test_flat_mlp_outputs_are_read_per_sequence():
    x_BTD = torch.randn(2, 4, 8)
    ids_BT = torch.zeros(2, 4, dtype=torch.long)
    deep, flat = Outliers([LAYER, MLP]), Outliers([LAYER, MLP])
    for outliers, x in ((deep, x_BTD), (flat, x_BTD.flatten(0, 1))):
        outliers.see(LAYER, x_BTD, ids_BT)
        outliers.see(MLP, x, ids_BT)
    assert deep.metrics() == flat.metrics()
