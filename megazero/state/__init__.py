"""What of a run outlives it: checkpoints."""

from megazero.state.checkpoint import Reader, Slice, complete, fill, mismatches, owned
from megazero.state.compare import check, checkpoints, log_lines, report, runs
from megazero.state.merge import merge
from megazero.state.saving import Writer, planned, set_aside, write_alone
from megazero.state.tensor_files import CODES, OF_CODE, Planned, stream
