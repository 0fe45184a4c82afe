"""One thread per test process, and this folder's helpers on the path."""

import sys
from pathlib import Path
from threading import RLock

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tools"))        # as for a tool that is run by its path
torch.set_num_threads(1)
# its lock is shared by all processes that are forked from here: one that a test kills while it writes would keep it from all others
tqdm.monitor_interval = 0
tqdm.set_lock(RLock())


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process need no measured peak: half a second each."""
    monkeypatch.setattr("megazero.run.train.peak_flops", lambda *_: (1e12, "assumed in tests"))


@pytest.fixture(autouse=True)
def _gpu_where_there_is_one(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
