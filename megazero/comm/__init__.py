"""The only place that talks to other ranks."""

from megazero.comm.group import Alone, Group, Stuck, Work
from megazero.comm.wires import Wires, connect, environment, first_to_say

__all__ = [
    "Alone", "Group", "Stuck", "Wires", "Work", "connect", "environment", "first_to_say",
]
