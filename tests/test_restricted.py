"""The one reader of pickles: it makes tensors and words, runs nothing, and says which class it was asked for."""

import argparse
import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from restricted import load, load_metadata

from megazero.base.errors import UserError
from megazero.elsewhere.source import Stub, words_of


class Asks:
    """A pickle of it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(path: Path) -> dict[str, Asks]:
    """Ways to leave a file there, were they run."""
    command = f"touch {path}"
    return {"system": Asks(os.system, command), "eval": Asks(eval, f"__import__('os').system({command!r})"),
            "exec": Asks(exec, f"open({str(path)!r}, 'w')"), "open": Asks(open, str(path), "w"), "getattr": Asks(getattr, Asks(__import__, "os"), "system"),
            "chain": Asks(getattr, Asks(getattr, Asks(__import__, "os"), "path"), "join"), "load": Asks(torch.load, str(path)),
            "numpy": Asks(np.load, str(path)), "partial": Asks(__import__("functools").partial, os.system, command),
            "hub": Asks(torch.hub.load, str(path), "x"), "compile": Asks(compile, "1", "x", "exec")}


@pytest.mark.parametrize("name", touch(Path()))
@pytest.mark.parametrize("where", ["torch.save", "metadata", "bytes"])
def test_a_pickle_that_would_run_something_is_refused_by_name(name: str, where: str, tmp_path: Path) -> None:
    trap = touch(tmp_path / "run")[name]
    file = tmp_path / "x.pt"
    torch.save({"model": torch.ones(2), "args": [trap]}, file)
    with pytest.raises(UserError, match=r"asks for [\w.]+, which is no weight and could run any code"):
        if where == "metadata":
            file.write_bytes(pickle.dumps({"a": trap}))
            load_metadata(file)
        else:
            load(file if where == "torch.save" else file.read_bytes(), file)
    assert not (tmp_path / "run").exists()


def raw(opcodes: bytes, path: Path) -> Path:
    """A file of torch.save whose pickle is these opcodes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", opcodes)
        file.writestr("x/version", "3\n")
        file.writestr("x/byteorder", "little")
    return path


@pytest.mark.parametrize("opcodes", [
    b"\x80\x02cmegatron.core\nX\n(S'__class__'\ntR.", b"\x80\x02cmegatron.core.X\n__init__\n}b.", b"\x80\x02cargparse\nNamespace\n}b.",
    b"\x80\x02cargparse\nNamespace\n(NU\x01tb.", b"\x80\x02\x82\x01.", b"\x80\x02cargparse\nNamespace.__init__\n.", b"\x80\x02cmegatron\nos.system\n(tR."])
def test_opcodes_by_hand_reach_nothing(opcodes: bytes, tmp_path: Path) -> None:
    """Stubs may be called with anything; what is put into one stays in it."""
    before = dict(vars(Stub))
    for read in (lambda: load(raw(opcodes, tmp_path / "x.pt")), lambda: load_metadata(raw_bytes(opcodes, tmp_path / "y"))):
        with contextlib.suppress(UserError):
            assert isinstance(read(), Stub | type)
    assert dict(vars(Stub)) == before


def raw_bytes(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def test_objects_become_stubs_and_tensors_stay(tmp_path: Path) -> None:
    content = {"args": argparse.Namespace(hidden=4, dtype=torch.bfloat16, at=Path("/x")), "w": torch.arange(6.0).view(2, 3), "n": None,
               "rng": [np.random.RandomState(1).get_state(), np.float64(2.0)], "o": OrderedDict(a=1), "t": (1, "x", True, 2.5), "b": io.BytesIO(b"x")}
    torch.save(content, tmp_path / "x.pt")
    found = load(tmp_path / "x.pt")
    assert words_of(found["args"])["hidden"] == 4 and isinstance(words_of(found["args"])["at"], Stub)
    assert torch.equal(found["w"], content["w"]) and found["t"] == content["t"] and isinstance(found["b"], Stub)


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"text", lambda b: pickle.dumps({"a": 1}),
                                    lambda b: b[:200] + bytes(64) + b[264:]])
def test_damage_is_one_sentence(damage: Any, tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(damage((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(UserError, match="x.pt: is no file of torch.save, or was cut or damaged"):
        load(tmp_path / "x.pt")
    for content in (b"", b"\x80", b"\x80\x02}", b"\x80\x02Q."):
        with pytest.raises(UserError, match="is no index of a distributed checkpoint"):
            load_metadata(raw_bytes(content, tmp_path / ".metadata"))
    with pytest.raises(UserError, match="cannot be read"):
        load_metadata(tmp_path / "none")
