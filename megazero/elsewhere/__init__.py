"""Checkpoints of other trainers, in and out. Pickles are not read here: whoever calls gives the reader."""

from megazero.elsewhere.arrive import write_model, write_module
from megazero.elsewhere.dcp import Distributed
from megazero.elsewhere.deepspeed import deepspeed_source, universal_source
from megazero.elsewhere.gguf_file import write_gguf
from megazero.elsewhere.leave import (
    LINEAR, arguments_of, divisible_by, fused, mapped, megatron_rows, nanogpt_rows, on_rank, stacked, theirs,
    torchtitan_rows, with_padding)
from megazero.elsewhere.megatron import legacy_source, megatron_architecture, of_megatron, torch_dist_source
from megazero.elsewhere.names import NamedRow, adopted
from megazero.elsewhere.others import (
    bin_source, dcp_source, nanogpt_source, of_hugging_face, of_nanogpt, of_torchtitan)
from megazero.elsewhere.source import Source, Stub, Tensors
