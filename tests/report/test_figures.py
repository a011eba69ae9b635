from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from example_records import diagnosis as made
from oasis_attn.errors import UserError
from oasis_attn.records import DiagnosisRecord
from oasis_attn.report import figures


def diagnosis(name: str = "tiny", **tables: Any) -> DiagnosisRecord:
    own = {
        "sink.mass": [[0.1, 0.9], [0.5, 0.0]],
        "outlier.inf_norm_layer": [1.0, 100.0],
        "outlier.kurtosis_layer": [3.0, "nan"],
    }
    return made(name, tables=own | tables)


def test_a_map_shows_every_value_where_it_belongs_on_a_fixed_scale() -> None:
    figure = figures.record_maps(diagnosis(), "tiny")["first-token-mass"]
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().tolist() == [[0.1, 0.9], [0.5, 0.0]]
    assert mesh.get_clim() == (0, 1)
    assert figure.axes[0].yaxis_inverted()
    assert figure.axes[0].get_title(loc="left") == "Attention on the first token: tiny"


def test_routers_that_see_fewer_sources_leave_cells_empty() -> None:
    record = diagnosis(**{"depth.weights": [[1.0], [0.4, 0.6]]})
    figure = figures.record_maps(record, "tiny")["depth-weights"]
    values = figure.axes[0].collections[0].get_array().filled(math.nan)
    assert math.isnan(values[0][1])
    assert values[1].tolist() == [0.4, 0.6]


def test_lines_are_one_per_record_and_named() -> None:
    figure = figures.outlier_lines({"first": diagnosis(), "second": diagnosis()})
    largest, kurtosis = figure.axes
    assert [line.get_label() for line in largest.lines] == ["first", "second"]
    assert largest.lines[0].get_ydata().tolist() == [1.0, 100.0]
    assert largest.get_yscale() == kurtosis.get_yscale() == "log"


def test_a_record_without_the_table_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"outlier\.inf_norm_layer.*sink\.mass"):
        figures.outlier_lines({"bare": made(tables={"sink.mass": [[0.5]]})})


def test_a_diagnosis_gets_the_figures_it_has_tables_for() -> None:
    assert set(figures.diagnosis_figures(diagnosis())) == {"first-token-mass", "outliers"}
    full = diagnosis(**{"null.mass": [[0.5]], "depth.weights": [[1.0]]})
    assert set(figures.diagnosis_figures(full)) == {
        "first-token-mass", "outliers", "null-mass", "depth-weights",
    }  # fmt: skip


def test_png_is_written_atomically(tmp_path: Path) -> None:
    path = figures.save_png(
        figures.diagnosis_figures(diagnosis())["first-token-mass"], tmp_path / "new" / "map.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [child.name for child in path.parent.iterdir()] == ["map.png"]


def test_every_figure_is_written_as_png_and_svg(tmp_path: Path) -> None:
    written = figures.save_figures(figures.diagnosis_figures(diagnosis()), tmp_path)
    assert sorted(path.name for path in written) == [
        "first-token-mass.png", "first-token-mass.svg", "outliers.png", "outliers.svg",
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_svg_has_the_colors_of_the_page_and_no_links() -> None:
    text = figures.svg(figures.diagnosis_figures(diagnosis())["first-token-mass"])
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert figures.INK not in text
    assert "matplotlib.org" not in text
    assert ">Attention on the first token: tiny<" in text
