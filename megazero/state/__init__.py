"""What of a run outlives it: checkpoints."""

from megazero.state.checkpoint import (
    INDEX, LATEST, SPECIAL, TAG, Reader, Slice, complete, fill, is_special, mismatches, newest, tagged)
from megazero.state.elsewhere import foreign, recognised
from megazero.state.compare import check, checkpoints, log_lines, report, runs
from megazero.state.logs import Log, board_log, metrics_log
from megazero.state.merge import merge
from megazero.state.record import Record, about, buffers_of, changed, header, jumps, restore, resumed, slices, unfit
from megazero.state.saving import Writer, planned, set_aside, write, write_alone
from megazero.state.tensor_files import (
    CODES, DIMENSIONS, OF_CODE, OF_DTYPE, Planned, Stored, contents, header_of, stream)
