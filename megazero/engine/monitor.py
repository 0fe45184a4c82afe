"""Curves in DeepSpeed's words, over the samples so far: for TensorBoard, and tables of comma-separated values."""

from collections.abc import Mapping
from pathlib import Path

from megazero.state import Log, board_log

PREFIX = "Train/Samples"


class Monitor:
    """Of rank 0. A disk that does not take a line ends nothing (state/logs.py)."""

    def __init__(self, board: Path | None, tables: Path | None) -> None:
        """The folders of each; None for none."""
        self.board = board_log(board, resumed=0) if board else None
        self.folder, self.tables = tables, dict[str, Log]()

    def add(self, samples: int, figures: Mapping[str, float]) -> None:
        if self.board:
            self.board.add({"split": PREFIX, "step": samples, **figures})
        for name, value in figures.items() if self.folder else ():
            self._table(name).add({"step": samples, "value": value})

    def _table(self, name: str) -> Log:
        assert self.folder is not None
        if name not in self.tables:
            path = self.folder / f"{PREFIX}/{name}.csv".replace("/", "_")
            self.tables[name] = Log(path, lambda row: f"{row['step']},{row['value']}\n".encode(),
                                    head=f"step,{name}\n".encode())
        return self.tables[name]
