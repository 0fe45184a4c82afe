"""The only reader of pickles: of files of torch.save, and of the `.metadata` of a distributed checkpoint. Training
never comes here; tools/convert_checkpoint.py does, for checkpoints of other trainers.

A pickle is a program. Here it runs none: torch's weights-only loader makes tensors, lists and mappings and calls
nothing else, and an object of a class that other trainers put into their checkpoints becomes a Stub, which does
nothing. A file that asks for any other class or function is refused, and the sentence says which.
"""

import io
import pickle
import re
import stat
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from megazero.base import LONGEST, UserError, printable, read_bytes
from megazero.elsewhere import Stub

# classes whose objects are kept as Stubs: what Megatron, DeepSpeed, numpy and argparse put beside weights
STUBS = re.compile(
    r"(megatron|deepspeed|transformer_engine|apex|torchtitan)(\.\w+)+|argparse\.Namespace|types\.SimpleNamespace|"
    r"numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|ndarray|dtype|dtypes\.\w+)|_io\.BytesIO|signal\.Signals|"
    r"pathlib\.(Posix|PurePosix|Windows)?Path|datetime\.\w+|collections\.defaultdict|"
    r"torch\.distributed\.checkpoint\.\w+\.\w+")


def load(file: Path | bytes, named: Path | None = None) -> Any:
    """What torch.save wrote to a file, its tensors mapped, or to some bytes of the file `named`. Raises UserError."""
    path = named or (file if isinstance(file, Path) else Path())
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):        # a pipe would wait for ever
            raise ValueError("is not a regular file")
        with _nothing_allowed():
            asked = get_unsafe_globals_in_checkpoint(_opened(file))
            for name in asked:
                if not STUBS.fullmatch(name):
                    raise _refused(path, name)
            add_safe_globals([(Stub, name) for name in asked])
            return torch.load(_opened(file), "cpu", weights_only=True, mmap=True if isinstance(file, Path) else None)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except UserError:
        raise
    except Exception as error:              # of a stranger's bytes: torch raises whatever its opcodes meet
        if named_one := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(path, named_one[1]) from None
        raise UserError(f"{path}: is no file of torch.save, or was cut or damaged "
                        f"({printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 120)}); "
                        "fetch it again.") from None


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """What another library of this process allowed torch's loader to make does not count here."""
    before = get_safe_globals()
    clear_safe_globals()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # of torch, about protocols of a stranger's file
            yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _opened(file: Path | bytes) -> Any:
    return io.BytesIO(file) if isinstance(file, bytes) else str(file)


def _refused(path: Path, name: str) -> UserError:
    return UserError(f"{path}: asks for {printable(name, 120)}, which is no weight and could run any code; it is not "
                     "opened. Save the weights alone, as a state_dict of tensors.")


# ---- .metadata of a distributed checkpoint

def _size(dims: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(dims)


M, FS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTYPES = {("torch", str(d).removeprefix("torch.")): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): _size, ("torch.serialization", "_get_layout"): Stub,
    ("torch", "device"): Stub, ("pathlib", "PosixPath"): Stub, ("pathlib", "PurePosixPath"): Stub,
    **{(M, name): Stub for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")},
    **{("torch.distributed.checkpoint.planner", name): Stub for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")},
    (FS, "_StorageInfo"): Stub, (FS, "_StoragePrefix"): Stub, **DTYPES}


class _Metadata(pickle.Unpickler):
    """Knows the classes of KNOWN, and no other."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise _refused(self.path, f"{module}.{name}")
        return KNOWN[module, name]


def load_metadata(path: Path) -> Any:
    """What the .metadata of a distributed checkpoint says, its objects as Stubs. Raises UserError."""
    try:
        return _Metadata(path, read_bytes(path, LONGEST)).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except UserError:
        raise
    except Exception as error:              # of a stranger's bytes: pickle raises whatever its opcodes meet
        raise UserError(f"{path}: is no index of a distributed checkpoint, or was cut or damaged "
                        f"({printable(str(error), 120) or type(error).__name__}); fetch it again.") from None
