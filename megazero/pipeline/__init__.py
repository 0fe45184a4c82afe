"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import Costs, KINDS, Pass, SCHEDULES, from_layout, most_held, passes, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg
