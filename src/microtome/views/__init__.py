"""Floor 6: results as figures, tables, claims and reports. Pure functions of values; nothing here runs a model."""

from typing import TYPE_CHECKING

from microtome.common.lazy import lazy

_HOMES = {
    "Bars": "microtome.views.charts",
    "Lines": "microtome.views.charts",
    "Scatter": "microtome.views.charts",
    "Series": "microtome.views.charts",
    "Check": "microtome.views.claims",
    "Claim": "microtome.views.claims",
    "at_least": "microtome.views.claims",
    "at_most": "microtome.views.claims",
    "between": "microtome.views.claims",
    "equal": "microtome.views.claims",
    "near": "microtome.views.claims",
    "Directions": "microtome.views.directions",
    "Figure": "microtome.views.figure",
    "Heatmap": "microtome.views.heatmap",
    "Patterns": "microtome.views.heatmap",
    "Report": "microtome.views.report",
    "Section": "microtome.views.report",
    "Table": "microtome.views.report",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from microtome.views.charts import Bars as Bars
    from microtome.views.charts import Lines as Lines
    from microtome.views.charts import Scatter as Scatter
    from microtome.views.charts import Series as Series
    from microtome.views.claims import Check as Check
    from microtome.views.claims import Claim as Claim
    from microtome.views.claims import at_least as at_least
    from microtome.views.claims import at_most as at_most
    from microtome.views.claims import between as between
    from microtome.views.claims import equal as equal
    from microtome.views.claims import near as near
    from microtome.views.directions import Directions as Directions
    from microtome.views.figure import Figure as Figure
    from microtome.views.heatmap import Heatmap as Heatmap
    from microtome.views.heatmap import Patterns as Patterns
    from microtome.views.report import Report as Report
    from microtome.views.report import Section as Section
    from microtome.views.report import Table as Table
else:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
