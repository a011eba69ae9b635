"""What the retrofit guide says follows from its records, and its tables are made from them."""

from pathlib import Path

import pytest
from experiments import retrofit_families, retrofit_training

import retrofit
from oasis_attn.records import Record
from oasis_attn.report.markdown import markdown

DOCS = Path(__file__).parents[1] / "docs"


def test_retrofit() -> None:
    folder = DOCS / "results" / "retrofit"
    table = markdown(retrofit.table(Record.load(folder / "record.json")))
    assert (folder / "table.md").read_text() == table
    assert table.strip() in (DOCS / "retrofit.md").read_text()


def test_what_the_page_says_of_nulls_without_training() -> None:
    record = Record.load(DOCS / "results" / "retrofit" / "record.json")
    original, one, six, pruned = retrofit.MODELS
    eight, _, full, full_rotated, *_ = retrofit.SCHEMES
    rotated = [scheme for scheme in retrofit.SCHEMES if "Hadamard" in scheme]

    def value(name: str, where: str, metric: str = retrofit.PERPLEXITY) -> float:
        return record.metric(metric, f"{name} / {where}").value

    def largest(name: str, text: str, layers: str = "layers 3 to 9") -> float:
        rows = record.tables[f"{name} / {text}"][retrofit.LAYERS[layers]]
        return max(abs(row["value"]) for row in rows)

    assert [layer for layer, _ in record.settings["nulls"][pruned]["neurons"]] == [2, 2]
    activations = [
        value(name, retrofit.FIRST, "outlier.max_activation") for name in retrofit.MODELS
    ]
    assert max(activations[1:]) < 1000 < activations[0]
    for text in retrofit.TEXTS:
        plain = {name: value(name, text) for name in retrofit.MODELS}
        assert plain[original] > plain[one] > plain[six] > plain[pruned]
        for scheme in retrofit.SCHEMES:
            assert value(one, f"{text} / {scheme}") < value(original, f"{text} / {scheme}")
        for name, limit in ((one, 1.06), (six, 1.04), (pruned, 1.03)):
            assert value(name, f"{text} / {eight}") < limit * plain[name]
            assert value(name, f"{text} / {full_rotated}") < 1.03 * plain[name]
        assert value(original, f"{text} / {full_rotated}") > 100 * plain[original]
        assert 0.8 < largest(six, text) / largest(one, text) < 1
        assert largest(pruned, text) < largest(six, text) / 3
        assert value(pruned, f"{text} / {full}") < 2 * plain[pruned]
        assert value(six, f"{text} / {full}") > 5 * plain[six]
        last = [largest(name, text, "layer 29") for name in (one, six, pruned)]
        later = record.tables[f"{retrofit.LATER} / {text}"][29]
        assert max(last) < later or text == "wikitext-2"
        for scheme in ("w4a4", "w4a4, GPTQ"):
            assert value(pruned, f"{text} / {scheme}") > 40 * plain[pruned]
        for scheme in rotated:
            assert value(pruned, f"{text} / {scheme}") < 4 * plain[pruned]


def test_what_the_page_says_of_the_training_to_a_plain_null() -> None:
    folder = DOCS / "results" / "retrofit"
    record = Record.load(folder / "training.json")
    table = retrofit_training.table(record)
    assert (folder / "training.md").read_text() == table
    assert table.strip() in (DOCS / "retrofit.md").read_text()

    def value(name: str, metric: str, where: str) -> float:
        return record.metric(metric, f"{name} / {where}").value

    perplexity, trained, other, start = (
        retrofit_training.PERPLEXITY, "short-null", "short-original", "original",
    )  # fmt: skip
    assert value("long-null", perplexity, "wikitext-2") < value(start, perplexity, "wikitext-2")
    assert round(record.tables["long-null"]["seconds"]["training"] / 60) == 76
    assert max(record.tables["long-null"]["outlier.inf_norm_layer, wikitext-2"][:29]) < 750
    control = "long-original-same-loss"
    for text in retrofit_training.TEXTS:
        ratio = value(control, perplexity, text) / value("long-null", perplexity, text)
        assert ratio == pytest.approx(1, abs=0.011)
        assert 0.4 < value(control, retrofit_training.LAYER_SINK, text) < 0.45
        assert value(control, "outlier.max_inf_norm_layer", text) > 10_000
        for scheme in list(retrofit_training.SCHEMES)[:2]:
            eight = value(control, perplexity, f"{text}, {scheme}")
            assert eight > 1.35 * value(control, perplexity, text)
        full = value(control, perplexity, f"{text}, w8a8-static-full")
        assert full > 1000 * value(control, perplexity, text)
        eight = f"{text}, w8a8-static-linear, per channel, percentile"
        assert value("null", perplexity, eight) < 1.07 * value("null", perplexity, text)
        full = value("null", perplexity, f"{text}, w8a8-static-full")
        assert full > 5 * value("null", perplexity, text)
        for name in ("null", "nulls"):
            assert value(name, perplexity, text) < value(start, perplexity, text)
        assert value("nulls", perplexity, eight) < 1.04 * value("nulls", perplexity, text)
        assert value("long-null", retrofit_training.LAYER_SINK, text) < 0.01
        full = value("long-null", perplexity, f"{text}, w8a8-static-full")
        assert full < 1.5 * value("long-null", perplexity, text)
        assert value(trained, retrofit_training.LAYER_SINK, text) < 0.01
        assert value(other, retrofit_training.LAYER_SINK, text) > 0.6
        plain = value(trained, perplexity, text)
        assert plain < 1.01 * value(start, perplexity, text)
        eight = f"{text}, w8a8-static-linear, per channel, percentile"
        assert value(trained, perplexity, eight) < 1.035 * plain
        assert value(other, perplexity, eight) > 2 * value(other, perplexity, text)
        full = f"{text}, w8a8-static-full"
        assert value(trained, perplexity, full) < 2 * plain
        assert value(other, perplexity, full) > 1000 * value(other, perplexity, text)
    for scheme in ("w8a8-static-linear", "w8a8-static-full"):
        cells = (value(name, perplexity, f"wikitext-2, {scheme}") for name in ("nulls", trained))
        assert next(cells) < 1.06 * next(cells)
    assert round(record.tables[trained]["seconds"]["training"] / 60) == 52
    norms = record.tables[trained]["outlier.inf_norm_layer, wikitext-2"]
    assert max(norms[3:10]) < 250
    assert 1000 < max(norms) == norms[29] < 1100
    assert value(other, perplexity, "gsm8k") < value(trained, perplexity, "gsm8k")
    learned, likelihood = "short-null-next-token", retrofit_training.LIKELIHOOD
    assert value(learned, perplexity, "gsm8k") < 1.02 * value(other, perplexity, "gsm8k")
    both = [record.metric(likelihood, name).value for name in (learned, other)]
    assert both[0] > 1.02 * both[1]  # they are negative
    unseen = value(start, perplexity, "wikitext-2")
    assert value(other, perplexity, "wikitext-2") == pytest.approx(0.93 * unseen, rel=5e-3)
    assert value(learned, perplexity, "wikitext-2") == pytest.approx(unseen, rel=6e-3)
    for text in retrofit_training.TEXTS:
        assert value(learned, retrofit_training.LAYER_SINK, text) < 0.02
        linear = f"{text}, w8a8-static-linear"
        assert value(learned, perplexity, linear) < 0.8 * value(other, perplexity, linear)
        eight = f"{text}, w8a8-static-linear, per channel, percentile"
        for scheme, limit in ((eight, 1.04), (f"{text}, w8a8-static-full", 1.4)):
            plain = value(learned, perplexity, text)
            assert value(learned, perplexity, scheme) < limit * plain


def test_what_the_page_says_of_models_that_are_trained_with_bos() -> None:
    folder = DOCS / "results" / "retrofit"
    record = Record.load(folder / "families.json")
    table = retrofit_families.table(record)
    assert (folder / "families.md").read_text() == table
    assert table.strip() in (DOCS / "retrofit.md").read_text()
    original, removed, words, shared, replaced, prefix = retrofit_families.CASES
    found = {(row["family"], row["model"], row["bos"]): row for row in record.tables["runs"]}
    for family in retrofit_families.FAMILIES:
        ratio, sink, null = (
            {case: found[family, *case][name] for case in retrofit_families.CASES}
            for name in ("retrofit.perplexity_ratio", "sink.max_mass", "null.max_mass")
        )
        for seed in range(retrofit_families.SEEDS):
            assert sink[original][seed] > 0.5
            assert ratio[removed][seed] > 4
            assert sink[words][seed] > 0.95 * sink[original][seed]
            assert abs(null[shared][seed] - sink[shared][seed]) < 0.02
            assert sink[replaced][seed] < 0.1
            assert abs(null[replaced][seed] - sink[original][seed]) < 0.02
            assert all(
                0.99 < ratio[case][seed] < 1.01 for case in (words, shared, replaced, prefix)
            )
        quantized = f"retrofit.perplexity_ratio@{retrofit_families.SCHEME}"
        assert all(
            abs(value - 1) < 0.01 for case in (original, replaced)
            for value in found[family, *case][quantized]
        )  # fmt: skip
