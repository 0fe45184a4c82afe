"""What of a run outlives it: checkpoints."""

from megazero.state.checkpoint import SPECIAL, Reader, Slice, complete, is_special, mismatches
from megazero.state.compare import check, checkpoints, log_lines, report, runs
from megazero.state.logs import Log, board_log, metrics_log
from megazero.state.merge import merge
from megazero.state.record import Record, about, changed, header, jumps, restore, resumed, slices, unfit
from megazero.state.saving import Writer, planned, set_aside, write_alone
from megazero.state.tensor_files import CODES, OF_CODE, Planned, Stored, contents, header_of, stream
