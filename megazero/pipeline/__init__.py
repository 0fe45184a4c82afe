"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import SCHEDULES, Costs, Pass, bubble_time, from_layout, held, passes, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg

__all__ = [
    "Costs", "Pass", "SCHEDULES", "Timeline", "bubble_time", "draw", "from_layout", "held", "passes", "shares",
    "simulate", "svg",
]
