"""Records in; tables, figures and one self-contained HTML page out.

Drawing is in `report.figures` and the page in `report.html`; both load matplotlib.
"""

from __future__ import annotations

from oasis_attn.report.tables import (
    Table,
    comparison,
    label,
    layer_table,
    number,
    summary_table,
    variants_table,
)

__all__ = [
    "Table",
    "comparison",
    "label",
    "layer_table",
    "number",
    "summary_table",
    "variants_table",
]
