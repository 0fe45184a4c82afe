"""The only place that talks to other ranks."""

from megazero.comm.group import Alone, Done, Group, Stuck, Work
from megazero.comm.wires import Wires, connect, environment, first_to_say
