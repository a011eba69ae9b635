from __future__ import annotations

import csv
import io

import pytest

from full_disk import files_of_at_most
from oasis_attn.errors import UserError
from oasis_attn.report import Table
from oasis_attn.report.document import Fold, Gallery, Section
from oasis_attn.report.export import csv_text, latex_text, save_figures, save_tables

from .test_html import picture

TABLE = Table(
    title="Means of 50 %",
    columns=("variant", "max |h|"),
    rows=(("a_b, 1,000", "27,347 ± 1,005"), ('quoted "c"', "0.5")),
)


def test_csv_can_be_read_back_and_numbers_have_no_separators():
    rows = list(csv.reader(io.StringIO(csv_text(TABLE))))
    assert rows == [
        ["variant", "max |h|"],
        ["a_b, 1,000", "27347 ± 1005"],
        ['quoted "c"', "0.5"],
    ]


def test_latex_is_a_tabular_with_escaped_text():
    text = latex_text(TABLE)
    assert text.startswith("% Means of 50 %\n\\begin{tabular}{lr}\n\\toprule\n")
    assert r"a\_b, 1,000 & 27,347 $\pm$ 1,005 \\" in text
    assert r"max \textbar{}h\textbar{} \\" in text
    long = Table(columns=("claim",), rows=(("word " * 20,),))
    assert r"{p{0.4\linewidth}}" in latex_text(long)


def test_every_figure_and_table_has_files_with_a_name_of_its_own(tmp_path):
    bare = Table(columns=("", ""), rows=(("key", "1"),))
    sections = [
        Section("A", [TABLE, picture(), Fold("more", (TABLE, bare))]),
        Section("B", [Gallery((picture(), picture("other")))]),
    ]
    figures = save_figures(sections, tmp_path / "f")
    assert [path.name for path in figures] == [
        "line.png", "line.svg", "line-2.png", "line-2.svg", "other.png", "other.svg",
    ]  # fmt: skip
    assert figures[0].read_bytes().startswith(b"\x89PNG")
    text = figures[1].read_text()
    assert "<svg" in text
    assert "var(--" not in text
    assert "currentColor" not in text
    tables = save_tables(sections, tmp_path / "t")
    assert [path.name for path in tables] == [
        "means-of-50.csv", "means-of-50.tex", "means-of-50-2.csv", "means-of-50-2.tex",
        "table.csv", "table.tex",
    ]  # fmt: skip
    assert tables[4].read_text() == "key,1\n"


@pytest.mark.parametrize(("save", "name"), [(save_figures, "figures"), (save_tables, "tables")])
def test_a_full_disk_is_an_error_about_the_folder_of_the_files(tmp_path, save, name):
    with (
        files_of_at_most(4),
        pytest.raises(UserError, match=rf"^{name}: '.*' cannot be written: File too large"),
    ):
        save([Section("A", [TABLE, picture()])], tmp_path)
