"""Checkpoints of other trainers, in and out. Pickles are not read here: whoever calls gives the reader."""

from megazero.elsewhere.arrive import write_model
from megazero.elsewhere.dcp import Distributed
from megazero.elsewhere.megatron import legacy_source, megatron_architecture, megatron_weights, torch_dist_source
from megazero.elsewhere.names import MEGATRON, as_ours
from megazero.elsewhere.source import Source, Stub, Tensors
