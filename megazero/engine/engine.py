"""ZeRO for any nn.Module: its blocks become units, and hooks do what the program does for our own decoder.

    forward of a block   its weights are gathered, those of the next one begin to travel; afterwards they are released
    what autograd saves  a tensor that lies in a unit's weights becomes a `Handle`, which is looked up again in backward
    backward of a block  begins with the gradient of an output: its weights are gathered, those of the block before
                         begin to travel. Gradients of parameters go into the unit's sum. Ends when the gradients of its
                         inputs are complete: the weights are released, the sum begins to travel
    step                 norm, gate and update over slices, as in any run (units/actions.py)

What belongs to no block, or to several (a tied embedding), is the root: whole from the forward pass to the end of
backward. Sums travel in one order that ranks agree on; weights of level 3 in the order in which blocks are called, so
there every rank must call the same. When autograd recomputes a block (torch.utils.checkpoint, either kind, around a
block or within it), hooks run once more, in backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megazero.base import UserError, say
from megazero.comm import Wires
from megazero.engine.blocks import Accumulation, Addresses, Submodule, belongings, longest_list, mistakes
from megazero.plan import Action, LossScale, Zero, ending
from megazero.settings import Optimization
from megazero.units import (
    TORCH_DTYPE,
    Buffers,
    Gate,
    Ruling,
    Sharing,
    Unit,
    UnitActions,
    Updater,
    Verdict,
    Weight,
    later,
)

Tensor = torch.Tensor
CONSTANT = LossScale(value=1.0, minimum=1.0, window=1, hysteresis=1, constant=True)
NOT_OURS = "loss.backward(): the engine must know of it; write engine.backward(loss)."


class Handle(NamedTuple):
    """What autograd keeps instead of a tensor that lies in a unit's weights.
    `generation` is the step whose weights it means."""

    block: Submodule
    unit: Unit
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    generation: int


class Kept(NamedTuple):
    """Any other tensor that autograd saves. Under hooks torch does not see whether it was changed since:
    we do, by its version."""

    tensor: Tensor
    version: int


class _Mark(torch.autograd.Function):
    """Hands its tensors on; in backward, once all that read them is done, calls `leave`."""

    @staticmethod
    def forward(ctx: Any, leave: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.leave = leave
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.leave()
        return None, *gradients


class Engine:
    """Trains a module on this rank: `engine(...)`, `engine.backward(loss)` and `engine.step()` for each micro-batch.

    model           any module whose parameters lie on one device. Rank 0's are taken; buffers stay each rank's own
    wires           a mesh of data-parallel ranks: `shard` and `replicate` say who shares what `zero.level` shares
    accumulation    micro-batches of a step on each rank; `step` acts after the last one
    blocks          submodules that are gathered and released one by one;
                    default: the children of the longest nn.ModuleList
    overlap         levels 1 and 2: weights travel after a step beside what follows, and nobody but blocks reads them
    lr              learning rate of the next step; settings.lr to begin with
    """

    def __init__(self, model: nn.Module, wires: Wires, settings: Optimization, zero: Zero, dtype: str = "fp32",
                 accumulation: int = 1, scale: LossScale = CONSTANT, blocks: Sequence[nn.Module] | None = None,
                 overlap: bool = False) -> None:
        modules = list(dict.fromkeys(longest_list(model) if blocks is None else blocks))
        if errors := [*mistakes(model, modules), *_mistakes(wires, settings, dtype, accumulation)]:
            raise UserError(*errors)
        assert settings.lr is not None
        self.module, self.wires, self.zero, self.scale, self.lr = model, wires, zero, scale, settings.lr
        self.overlap = overlap
        self.addresses: Addresses = {}
        sharing = Sharing(zero.level, wires["shard"], wires["replicate"], buffers=Buffers(poison=wires.late))
        names = {m: n for n, m in model.named_modules()}
        made = {m: Submodule(names[m] or "root", own, TORCH_DTYPE[dtype], sharing, self.addresses)
                for m, own in belongings(model, modules).items()}
        self.root, *self.blocks = self.all = list(made.values())
        for block in made.values():
            block.fill(wires.rank == 0)
        self._renew()
        units = [b.trained for b in made.values() if b.trained]
        self.ending = ending([u.flat.name for u in units])
        self.gate = Gate(units, settings.clip_grad, wires["world"], tells=True)
        self.updater = Updater(units, settings, [a.units for a in self.ending if a.kind == "update"])
        self.actions = UnitActions({u.flat.name: u for u in units}, wires, self.gate, self.updater)
        self.sums = Accumulation(units, zero, accumulation, self._do, self._agree)
        self.ruling = Ruling()                                  # of this step: what its losses are
        self.steps = 0
        self.found_inf: Callable[[], list[float]] | None = None  # of the last step, until the host has read it
        self.graph = self.in_backward = False                   # graph: will backward follow this forward pass?
        self.saving: saved_tensors_hooks | None = None          # while the module's forward pass runs
        self.order: list[Submodule] = []                            # calls of the last forward pass:
                                                                # which weights to gather ahead
        self.calls: list[Submodule] = []                            # calls of this one
        self.left: list[Submodule] = []                             # calls whose backward pass is not over
        self._register(made)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The module's own forward pass. Calling the module itself is the same."""
        self._check()
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch. `loss` is a mean over this rank's micro-batch; the step's loss and
        gradient are means over micro-batches and ranks."""
        if self.sums.micro == self.sums.micro_batches:
            raise UserError(f"backward: this step has had its {self.sums.micro_batches} micro-batches; "
                            "call step(), or raise accumulation.")
        self._check()
        if not self.scale.constant:                             # else nothing depends on what became of the last step
            self._settle()
        self.ruling.tell("loss", loss.detach())
        self.ruling.tell("tokens", torch.ones_like(loss.detach()))       # each loss counts as one
        self.in_backward = True
        (loss.to(self.gate.wide) * (self.scale.value / self.losses)).backward()  # type: ignore[no-untyped-call]
        self.in_backward = False
        # those whose inputs, or which themselves, had no part in it too
        for block in (*reversed(self.blocks), self.root):
            self._close(block)
            self._release(block, backward=True)
        self.left.clear()
        self.sums.next()

    def step(self) -> Verdict | None:
        """After the last micro-batch: updates the weights, or changes nothing if a loss or a gradient was not finite
        anywhere. Before that: None."""
        if self.sums.micro < self.sums.micro_batches:
            return None
        if thawed := [p for b in self.all for p, w, _ in b.views
                      if p.requires_grad and not w.unit.trained]:
            raise UserError(f"model: {len(thawed)} parameters were frozen when the engine was made and are not now; "
                            "unfreeze them before.")
        for block in self.all if self.zero.level < 3 else ():  # what somebody wrote since: clipped, averaged ones
            block.absorb()
        loss = self.ruling.told["loss"]
        self.ruling.scale, self.ruling.nominal = torch.full_like(loss, self.scale.value), self.losses
        self.ruling.lr = torch.full_like(loss, self.lr, dtype=self.gate.wide)
        self.ruling.trace = float(self.wires.line.marks.trace)
        self._do([*self.sums.reductions.finish(), *self.ending])
        verdict, self.ruling = self.ruling.verdict, Ruling()
        assert verdict is not None, "the ending judges"
        self._settle()
        self.found_inf = later(torch.stack((verdict.found_inf, verdict.astray)))
        self.sums.begin()
        self.steps += 1
        self._renew()
        return verdict

    def _renew(self) -> None:
        """Below level 3 every rank gathers all, in one order: parameters are whole between steps, for whoever reads
        them. With `overlap` they travel beside what follows, and are hidden until their block's turn."""
        for block in self.all if self.zero.level < 3 else ():
            block.gather()
        for block in self.all if self.zero.level < 3 else ():
            if self.overlap:
                block.hide()
            else:
                block.arrive()

    @contextmanager
    def whole(self, *parameters: nn.Parameter, writer: int | None = None) -> Iterator[None]:
        """Within, these parameters (all, if none is named) are whole, to be read and written. All ranks come here, and
        write the same; or `writer` alone writes. Raises UserError for a parameter that is not the engine's."""
        known = {p: block for block in self.all for p, _, _ in block.views}
        if not set(parameters) <= set(known):
            raise UserError("whole: a parameter is not one that the engine found in its model; name those of "
                            "engine.module.parameters().")
        blocks = dict.fromkeys(known[p] for p in parameters or known)
        closed = [block for block in blocks if self._open(block)]
        try:
            yield
        finally:
            for block in blocks:
                if writer is not None:
                    block.take(self.wires["world"], writer)
                block.absorb()
            for block in closed:
                block.release()

    def _open(self, block: Submodule) -> bool:
        """The block's weights are here, for readers outside of its forward pass; were they hidden?"""
        hidden = block.hidden
        block.gather()
        block.arrive()
        return hidden

    def _do(self, actions: Sequence[Action]) -> None:
        """As in a program."""
        for action in actions:
            self.wires.line.doing = str(action)
            self.actions.do[action.kind](action, self.ruling)

    def _agree(self, numbers: list[int]) -> list[int]:
        """Rank 0's."""
        told = torch.tensor(numbers, dtype=torch.float64, device=self.gate.device) * (self.wires.rank == 0)
        return [int(n) for n in self.wires["world"].all_reduce(told).wait().tolist()]

    def _check(self) -> None:
        if self.in_backward:
            raise UserError("engine: its last backward pass failed, and part of the gradients of this step is lost; "
                            "make a new engine.")

    @property
    def losses(self) -> int:
        """Losses of a step, of all ranks."""
        return self.sums.micro_batches * self.wires.mesh.dp

    def _settle(self) -> None:
        """Reads the last step's verdict, when the next step is under way (its forward pass where the loss scale moves,
        all of it where not): tells of a skipped one, moves the loss scale."""
        if self.found_inf is None:
            return
        (found_inf, astray), self.found_inf = self.found_inf(), None
        if astray:
            raise UserError(f"step {self.steps:,}: ranks gathered or summed different blocks, and nothing was changed; "
                            "let every rank call the same blocks in the same order where weights are shared (level 3).")
        finite = not found_inf
        self.scale = self.scale.after(finite)
        if not finite and self.wires.rank == 0:
            say(f"step {self.steps:,} skipped: its loss or a gradient is not finite; nothing was changed, "
                f"loss scale {self.scale.value:g}")

    # ---- weights

    def _enter(self, block: Submodule) -> None:
        """The block is about to run, forward or backward: its weights are needed, the next block's soon."""
        ahead = self._ahead(block) if self.zero.prefetch else None
        self.wires.line.doing = f"{'backward' if self.in_backward else 'forward'} of {block.name}"
        block.gather()
        if ahead:
            ahead.gather()
        block.arrive()

    def _ahead(self, block: Submodule) -> Submodule | None:
        """The block that follows, if all goes as in the last forward pass;
        in backward, the one that was called before."""
        if self.in_backward:
            i = self._last_call(block)
            return self.left[i - 1] if i > 0 else None
        n = len(self.calls)
        as_before = self.order[:n][-1:] == self.calls[-1:]
        return self.order[n] if n < len(self.order) and as_before else None

    def _last_call(self, block: Submodule) -> int:
        """Where the block stands in `left`, or -1."""
        return next((i for i in reversed(range(len(self.left))) if self.left[i] is block), -1)

    def _release(self, block: Submodule, backward: bool) -> None:
        """After a pass in which weights are not kept for the next. Passes of a step are counted as in a program."""
        number = 2 * self.sums.micro + backward
        if not self.graph or (number + 1) % self.zero.keep == 0 or number + 1 == 2 * self.sums.micro_batches:
            block.release()

    def _pack(self, x: Tensor) -> Handle | Kept:
        """What autograd keeps of a tensor."""
        home = self.addresses.get(x.untyped_storage().data_ptr()) if x.layout == torch.strided else None
        if home is None:
            return Kept(x.detach(), x._version)                 # x itself could own the graph that owns it
        return Handle(*home, x.dtype, int(x.storage_offset()), x.shape, x.stride(), self.steps)

    def _unpack(self, kept: Handle | Kept) -> Tensor:
        """The tensor again, in backward."""
        if isinstance(kept, Kept):
            if kept.tensor._version != kept.version:
                raise RuntimeError(f"a tensor of shape {tuple(kept.tensor.shape)} that backward needs "
                                   "was changed in place since")
            return kept.tensor
        if kept.generation != self.steps:
            raise UserError(f"backward: reads weights of {kept.block.name} as of step {kept.generation}, but step "
                            f"{self.steps} has changed them; run the forward pass again after step().")
        if not self.in_backward:
            raise UserError(NOT_OURS)
        self._enter(kept.block)
        assert kept.unit.weights is not None
        storage = kept.unit.weights.untyped_storage()
        return torch.empty(0, dtype=kept.dtype, device=storage.device).set_(  # type: ignore[call-overload]
            storage, kept.offset, kept.size, kept.stride)

    # ---- hooks

    def _register(self, made: Mapping[nn.Module, Submodule]) -> None:
        self.module.register_forward_pre_hook(self._begin)
        self.module.register_forward_hook(self._end, always_call=True)
        for module, block in made.items():
            if module is not self.module:
                module.register_forward_pre_hook(partial(self._before, block), with_kwargs=True)
                module.register_forward_hook(partial(self._after, block))
            for p, weight, _ in block.views:
                p.grad = None
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(partial(self._take, weight))
        homes = {p: block for block in self.all for p, _, _ in block.views}
        for module in self.module.modules():
            whose = [*filter(None, [made.get(module)]), *(homes[p] for p in module.parameters(recurse=False))]
            for block in dict.fromkeys(whose):
                self._keep_books(module, block)

    def _keep_books(self, module: nn.Module, block: Submodule) -> None:
        """`state_dict` and `load_state_dict` of a module find the weights of a block whole, on all ranks together."""
        closed: list[bool] = []

        def enter(*_: Any) -> None:
            closed.append(self._open(block))

        def copied(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
            mine = {u.weights.untyped_storage().data_ptr() for u in block.units if u.weights is not None}
            for name, t in found.items() if closed[-1] else ():
                if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() in mine:
                    found[name] = t.clone()                     # a view of what is given back now
            leave()

        def leave(*_: Any) -> None:
            block.absorb()
            if closed.pop():
                block.release()

        module.register_state_dict_pre_hook(enter)
        module.register_state_dict_post_hook(copied)
        module.register_load_state_dict_pre_hook(enter)
        module.register_load_state_dict_post_hook(leave)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        """The model's forward pass begins. In backward, here and below, it is recomputed:
        its backward pass is prepared already."""
        if self.in_backward:
            return
        self.graph, self.order, self.calls = torch.is_grad_enabled(), self.calls, []
        self._enter(self.root)
        self.saving = saved_tensors_hooks(self._pack, self._unpack)
        self.saving.__enter__()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self.saving is None:
            return
        self.saving.__exit__()
        self.saving = None
        for block in self.blocks if self.graph else (*self.blocks, self.root):  # what was gathered ahead and not called
            self._release(block, backward=False)

    def _before(self, block: Submodule, module: nn.Module, inputs: Any, named: Any) -> Any:
        """A block's forward pass begins. Its inputs are marked, so that the end of its backward pass is known."""
        if not self.in_backward:
            if self.saving is None:
                raise UserError(f"{block.name}: was called outside of the model's own forward pass; call engine(...).")
            self.calls.append(block)
            self.left += [block] * self.graph
        self._enter(block)
        leaves, spec = tree_flatten((inputs, named))
        given = {id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}
        if not given or not torch.is_grad_enabled():
            return None
        marked = dict(zip(given, _Mark.apply(partial(self._leave, block), *given.values()), strict=True))
        return tree_unflatten([marked.get(id(x), x) for x in leaves], spec)

    def _after(self, block: Submodule, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Its forward pass is over. The first gradient of an output begins its backward pass."""
        if self.in_backward:
            return
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: self._enter(block))
        self._release(block, backward=False)

    def _leave(self, block: Submodule) -> None:
        """The backward pass of one call of a block is over."""
        i = self._last_call(block)
        # else of a forward pass before another's backward: the end will close it
        if i >= 0:
            self.left.pop(i)
            if block not in self.left:
                self._close(block)
        self._release(block, backward=True)

    def _close(self, block: Submodule) -> None:
        if block.trained:
            self.sums.close(block.trained)

    def _take(self, weight: Weight, p: Tensor) -> None:
        """A parameter's gradient is there."""
        assert p.grad is not None
        if not self.in_backward:
            raise UserError(NOT_OURS)
        self.sums.add(weight, p.grad)
        p.grad = None


def _mistakes(wires: Wires, settings: Optimization, dtype: str, accumulation: int) -> Iterator[str]:
    mesh = wires.mesh
    if mesh.dp < mesh.world:
        yield (f"mesh: tp {mesh.size('tp')}, pp {mesh.size('pp')}: a module is shared among data-parallel ranks alone; "
               f"write Mesh.of(dp={mesh.world}).")
    if dtype not in TORCH_DTYPE:
        yield f"dtype {dtype}: is not known; write one of {', '.join(TORCH_DTYPE)}."
    if accumulation < 1:
        yield f"accumulation {accumulation}: must be at least 1."
    if settings.lr is None:
        yield "lr: is missing; give the highest learning rate."
