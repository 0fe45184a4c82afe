"""The only place that talks to other ranks."""

from megazero.comm.group import Alone, Done, Group, Stuck, Work
from megazero.comm.nccl import before_cuda, own_device
from megazero.comm.rendezvous import environment, join, no_place, ranks
from megazero.comm.told import leave_with_launcher, say_each, say_first
from megazero.comm.wires import Wires, connect
