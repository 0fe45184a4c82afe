"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import KINDS, SCHEDULES, Costs, Pass, most_held, passes
from megazero.pipeline.split import from_layout, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg

__all__ = [
    "Costs", "KINDS", "Pass", "SCHEDULES", "Timeline", "draw", "from_layout", "most_held", "passes", "shares",
    "simulate", "svg",
]
