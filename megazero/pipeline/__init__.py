"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import Costs, KINDS, Pass, SCHEDULES, most_held, passes
from megazero.pipeline.split import from_layout, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg
