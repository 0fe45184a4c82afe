"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import KINDS, SCHEDULES, Costs, Pass, from_layout, most_held, passes, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg

__all__ = [
    "Costs", "KINDS", "Pass", "SCHEDULES", "Timeline", "draw", "from_layout", "most_held", "passes", "shares",
    "simulate", "svg",
]
