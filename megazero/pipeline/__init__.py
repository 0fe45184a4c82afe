"""Schedules of a pipeline, and their clock. Pure."""

from megazero.pipeline.schedule import KINDS, SCHEDULES, Costs, Pass, most_held, passes
from megazero.pipeline.split import by_cost, ends_as_layers, from_layout, shares
from megazero.pipeline.timeline import Timeline, draw, simulate, svg
from megazero.pipeline.weighing import Load, Loads
