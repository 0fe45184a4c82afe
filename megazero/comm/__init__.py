"""The only place that talks to other ranks."""

from megazero.comm.gloo import Gloo
from megazero.comm.group import Alone, Channel, Done, Group, Line, Stuck, Work
from megazero.comm.wires import Wires, connect, environment, first_to_say

__all__ = ["Alone", "Channel", "Done", "Gloo", "Group", "Line", "Stuck", "Wires", "Work",
           "connect", "environment", "first_to_say"]
