"""What can be known of CUDA without a device: the parts of a decoder on fake tensors, which have a device, a shape and a dtype, but no
numbers. Autograd's engine asks for a real device, so each operation's backward pass is called by hand, right behind its forward pass."""

import inspect
import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT, SHAPES, TINY, batches, resolved
from torch._subclasses import FakeTensorMode

from megazero.comm.group import placed, same
from megazero.comm.wires import connect
from megazero.model import attention, decoder, ops
from megazero.run.run import Run
from megazero.units.gate import Ruling

OPERATIONS = [c for m in (ops, attention, decoder) for _, c in inspect.getmembers(m, inspect.isclass) if issubclass(c, torch.autograd.Function)]
built_with_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a torch without CUDA cannot slice even a fake tensor of it")


def there_and_back(operation: Any) -> Any:
    def apply(*args: Any) -> torch.Tensor:
        context = SimpleNamespace(save_for_backward=lambda *tensors: setattr(context, "saved_tensors", tensors))
        y = operation.forward(context, *args)
        gradients = operation.backward(context, torch.ones_like(y))
        dx = gradients[0] if isinstance(gradients, tuple) else gradients
        assert dx is None or (dx.shape, dx.dtype, dx.device) == (args[0].shape, args[0].dtype, args[0].device), operation
        return y
    return staticmethod(apply)


@built_with_cuda
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("words", ["", "--tp 2 --attention-dropout 0.1"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_operation_takes_what_it_is_given(shape: str, packed: bool, words: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes fit, and nothing asks the device for a number."""
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "apply", there_and_back(operation))
    plan = resolved(f"{TINY} {SHAPES[shape]} --dtype {dtype} --micro-batch-size 2 {words}", 2 if "--tp 2" in words else 1, "cuda")
    with FakeTensorMode(), torch.no_grad():
        run = Run(plan, torch.device("cuda"), connect(plan.mesh, 0, "fake", 60))
        for unit in run.units.values():
            unit.open()
        (batch,), x = batches(run), torch.zeros((), device="cuda")
        if packed:
            batch = replace(batch, documents=batch.tokens, bounds=torch.zeros(5, dtype=torch.int32, device="cuda"))
        for part in run.decoder.parts.values():
            x = part(x, batch)
        assert run.decoder.head and len(OPERATIONS) == 8
        total, dx = run.decoder.head._loss(run.decoder.head.norm(x), batch, torch.ones((), device="cuda"))
        one = total.double()
        verdict = run.gate.judge(Ruling(one, told={"loss": one, "tokens": one}))
        assert dx is not None and dx.dtype == x.dtype and total.is_cuda and verdict.found_inf.is_cuda
        for unit in run.units.values():
            unit.close()
            unit.publish()


def test_one_view_of_one_storage_is_known_without_a_device() -> None:
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            x = torch.zeros(4, 4)
            assert same(x, x.view(4, 4)) and placed(x, x[:]).shape == x.shape
            assert not any(same(x, y) for y in (x.clone(), x[:2], x.T, x[1:], x.view(2, 8)))


def test_the_first_minutes_on_a_device_run_at_toy_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--device", "cpu", "--out", str(tmp_path / "figures.json")])
    runpy.run_path(str(ROOT / "benchmarks/gpu.py"), run_name="__main__")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["ceilings", "products", "norms", "attention", "parts", "waits", "profile", "steps"] and not any("failed" in f for f in figures.values()), figures
    assert all(0 < figures["norms"][f"{name} error"] < 2**-8 for name in ("ours", "formula")) and figures["attention"]["toy"] and len(figures["products"]) == 3
    assert figures["parts"]["toy"].keys() >= {"norm", "attention", "mlp", "head"} and 4 < figures["steps"]["toy"]["loss"] < 5
