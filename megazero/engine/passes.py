"""Forward and backward passes of a module whose blocks are units, as hooks see them (engine.py says how they go)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megazero.base import UserError
from megazero.comm import Wires
from megazero.engine.blocks import Accumulation, Addresses, Submodule
from megazero.engine.hidden import away
from megazero.engine.hooks import Handle, Hook, Kept, Mark, at_its_end, reaches, running
from megazero.plan import Zero
from megazero.units import Weight

Tensor = torch.Tensor


class Passes:
    """What runs: a forward pass (`saving`), a backward pass (`in_backward`).

    order, calls    blocks as the last forward pass called them, and this one: which weights to gather ahead
    left            calls whose backward pass is not over; those from `last` on are of the last forward pass
    owed            how many of them are of other passes than the backward pass that runs, as far as one can tell
    sure            the backward pass is known to be for gradients of parameters; else it shows when one comes (`taken`)
    """

    def __init__(self, module: nn.Module, made: dict[nn.Module, Submodule], addresses: Addresses, wires: Wires,
                 zero: Zero, dtype: torch.dtype) -> None:
        self.module, self.addresses, self.wires, self.zero = module, addresses, wires, zero
        self.root, *self.blocks = self.all = list(made.values())
        self.half = dtype if dtype.itemsize == 2 else None
        self.sums: Accumulation
        self.steps = 0
        self.graph = self.in_backward = self.sure = self.taken = False      # graph: will backward follow this forward?
        self.weigh: Callable[[Tensor], Tensor] = lambda grad: grad          # a gradient of this micro-batch
        self.saving: AbstractContextManager[None] | None = None
        self.within = 0                                         # calls of the model within its own pass
        self.order: list[Submodule] = []
        self.calls: list[Submodule] = []
        self.left: list[Submodule] = []
        self.last = self.owed = 0
        self.handles: list[Any] = []
        self.away: dict[nn.Parameter, Tensor] = {}
        self.took: dict[nn.Parameter, str] = {}                 # parameters whose gradients came, and their names
        self._register(made)

    # ---- weights

    def _enter(self, block: Submodule) -> None:
        """The block is about to run, forward or backward: its weights are needed, the next block's soon."""
        ahead = self._ahead(block) if self.zero.prefetch else None
        self.doing(f"{'backward' if self.in_backward else 'forward'} of {block.name}")
        for wanted in (block, ahead):
            if wanted and not wanted.here:
                wanted.gather()
        if not block.here:
            block.arrive()

    def doing(self, what: str) -> None:
        """For reports: ranks that make unlike numbers of micro-batches wait for each other in vain."""
        self.wires.line.doing = f"step {self.steps + 1}, micro-batches done {self.sums.micro}: {what}"

    def _fetch(self, block: Submodule) -> bool:
        """A part of the block is read before its turn, or after it: in the model's own forward pass, and where autograd
        recomputes it, the block comes. It is given back at the end of the pass, at the latest."""
        within = self.saving is not None or running() and self.in_backward
        if within:
            self._enter(block)
        return within

    def _ahead(self, block: Submodule) -> Submodule | None:
        """The block that follows, if all goes as in the last forward pass;
        in backward, the one that was called before."""
        if self.in_backward:
            i = self._last_call(block)
            return self.left[i - 1] if i > 0 else None
        n = len(self.calls)
        as_before = self.order[:n][-1:] == self.calls[-1:]
        return self.order[n] if self.saving and n < len(self.order) and as_before else None

    def _last_call(self, block: Submodule) -> int:
        """Where the block stands in `left`, or -1."""
        return next((i for i in reversed(range(len(self.left))) if self.left[i] is block), -1)

    def _release(self, block: Submodule, backward: bool) -> None:
        """After a pass in which weights are not kept for the next. Passes of a step are counted as in a program."""
        number = 2 * self.sums.micro + backward
        if not self.graph or (number + 1) % self.zero.keep == 0 or number + 1 == 2 * self.sums.micro_batches:
            block.release()

    def _pack(self, x: Tensor) -> Handle | Kept:
        """What autograd keeps of a tensor at level 3."""
        home = self.addresses.get(x.untyped_storage().data_ptr()) if x.layout == torch.strided else None
        if home is None:
            return Kept(x.detach(), x._version)                 # x itself could own the graph that owns it
        base = x if x._base is None else x._base
        return Handle(*home, x.dtype, int(x.storage_offset()), x.shape, x.stride(), self.steps, home[1].published,
                      base if isinstance(base, nn.Parameter) else None, base._version)

    def _unpack(self, kept: Handle | Kept) -> Tensor:
        """The tensor again, in backward."""
        if isinstance(kept, Kept):
            if kept.tensor._version != kept.version:
                raise RuntimeError(f"a tensor of shape {tuple(kept.tensor.shape)} that backward needs "
                                   "was changed in place since")
            return kept.tensor
        if kept.step != self.steps:
            raise UserError(f"backward: reads weights of {kept.block.name} as of step {kept.step}, but they "
                            f"are those of step {self.steps} now; run the forward pass again.")
        if kept.changed:
            raise UserError(f"backward: reads weights of {kept.block.name} that were written since its forward pass; "
                            "write them before the forward pass, or after backward.")
        self._enter_backward(kept.block)
        assert kept.unit.weights is not None
        storage = kept.unit.weights.untyped_storage()
        return torch.empty(0, dtype=kept.dtype, device=storage.device).set_(  # type: ignore[call-overload]
            storage, kept.offset, kept.size, kept.stride)

    # ---- hooks

    def _hang(self, register: Callable[..., Any], do: Callable[..., Any], **named: Any) -> None:
        self.handles.append(register(Hook(self, do), **named))

    def _register(self, made: dict[nn.Module, Submodule]) -> None:
        self._hang(self.module.register_forward_pre_hook, self._begin, with_kwargs=True)
        self._hang(self.module.register_forward_hook, self._end, always_call=True)
        for module, block in made.items():
            if module is not self.module:
                self._hang(module.register_forward_pre_hook, partial(self._before, block), with_kwargs=True)
                self._hang(module.register_forward_hook, partial(self._after, block))
            for p, weight, _ in block.views:
                p.grad, p.holder = None, Hook(self)  # type: ignore[attr-defined]
                if p.requires_grad:
                    self._hang(p.register_post_accumulate_grad_hook, partial(self._take, weight))
        homes = {p: block for block in self.all for p, _, _ in block.views}
        for block in self.blocks:
            block.fetch = partial(self._fetch, block)
        self.known = set(map(id, homes))
        for module in self.module.modules():
            own = [homes[p] for p in module.parameters(recurse=False)]
            if self.root in own and module is not self.module:
                self._lend(module)
            for block in dict.fromkeys([made[module], *own] if module in made else own):
                self._keep_books(module, block)

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        """The model's forward pass begins. In backward, here and below, it is recomputed:
        its backward pass is prepared already."""
        if running() or self.saving is not None:                # it may call itself
            self.within += 1
            return None
        self.recover()
        self.notice()
        self._forget()
        self.graph, self.order, self.calls = torch.is_grad_enabled(), self.calls, []
        self._enter(self.root)
        self.last = len(self.left)
        # below level 3 weights stay where they are, and torch itself sees what is written into them (`renew`)
        self.saving = saved_tensors_hooks(self._pack, self._unpack) if self.zero.level == 3 else nullcontext()
        self.saving.__enter__()
        leaves, spec = tree_flatten((inputs, named))
        cast = self._cast(leaves)
        return tree_unflatten(leaves, spec) if cast else None

    def _cast(self, leaves: list[Any]) -> bool:
        """In half precision what goes into the model or a block is cast, as its weights are; was there anything?"""
        before = list(leaves)
        if self.half:
            leaves[:] = [x.to(self.half) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        return any(x is not y for x, y in zip(before, leaves, strict=True))

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self.within:
            self.within -= 1
            return
        if self.saving is None:
            return
        self.saving.__exit__(None, None, None)
        self.saving = None
        if outputs is None:                                     # it failed
            del self.left[self.last:]
            self.graph = False
        self._watch(outputs, lambda _: self._note())
        for block in self.blocks if self.graph else self.all:   # what was gathered ahead and not called
            self._release(block, backward=False)

    def _before(self, block: Submodule, module: nn.Module, inputs: Any, named: Any) -> Any:
        """A block's forward pass begins. Its inputs are marked, so that the end of its backward pass is known."""
        if not running():
            if self.saving is None:
                self._outside(block.name)
            else:
                self.calls.append(block)
                self.left += [block] * self.graph
        self._enter(block)
        leaves, spec = tree_flatten((inputs, named))
        cast = self._cast(leaves)
        given = {id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}
        if not given or not torch.is_grad_enabled():
            return tree_unflatten(leaves, spec) if cast else None
        marked = dict(zip(given, Mark.apply(partial(self._leave, block), *given.values()), strict=True))
        return tree_unflatten([marked.get(id(x), x) for x in leaves], spec)

    def _after(self, block: Submodule, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Its forward pass is over. The first gradient of an output begins its backward pass."""
        if running():
            return
        self._watch(outputs, lambda _: self._enter_backward(block))
        if self.saving is None:
            block.release()
        else:
            self._release(block, backward=False)

    @staticmethod
    def _watch(outputs: Any, do: Callable[[Tensor], None]) -> None:
        """Called with the gradient of each."""
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(do)

    def _outside(self, name: str) -> None:
        """Something is called outside of the model's own forward pass."""
        if torch.is_grad_enabled():
            raise UserError(f"{name}: was called outside of the model's own forward pass; call engine(...), or call it "
                            "under torch.no_grad().")
        self.graph = False

    def _lend(self, module: nn.Module) -> None:
        """A part that is no block, with parameters of the root's, may be called by itself without gradients."""
        opened: list[bool] = []

        def lend(*_: Any) -> None:
            hidden = self.root.hidden
            if hidden:
                self._outside("the model's own part " + type(module).__name__)
            opened.append(hidden and self._open(self.root))

        def take_back(*_: Any) -> None:
            if opened and opened.pop():
                self._shut(self.root)

        self._hang(module.register_forward_pre_hook, lend)
        self._hang(module.register_forward_hook, take_back, always_call=True)

    # ---- readers outside of passes

    def _open(self, block: Submodule) -> bool:
        """The block's weights are here to stay; were they hidden?"""
        hidden = block.hidden
        block.gather()
        block.arrive()
        block.kept = block.kept or hidden
        return hidden

    def _shut(self, block: Submodule) -> None:
        block.kept = False
        block.release()

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
                self._shut(block)

        self._hang(module.register_state_dict_pre_hook, enter)
        self._hang(module.register_state_dict_post_hook, copied)
        self._hang(module.register_load_state_dict_pre_hook, enter)
        self._hang(module.register_load_state_dict_post_hook, leave)

    def notice(self) -> None:
        """What somebody did to the module since the engine was made has the effect that was meant, or is refused."""
        if {id(p) for p in self.module.parameters()} != self.known:
            names = {id(w): n for n, w in self.module.named_parameters()}
            held = {id(p): w.operand.name for b in self.all for p, w, _ in b.views}
            other = [names.get(i, held.get(i, "")) for i in {**names, **held} if i not in names or i not in held]
            raise UserError(f"model: {other[0]} was added, replaced or taken away after the engine was made; make a "
                            "new engine.")
        if found := [text for block in self.all for text in block.changes()]:
            raise UserError(f"model: {found[0]}")

    # ---- backward

    def _note(self) -> None:
        """A backward pass reaches the module. One that `backward` did not tell begins here: plain loss.backward(), or
        torch.autograd.grad, which is for no gradient of parameters."""
        if self.in_backward:
            return
        inner = torch.is_grad_enabled()                         # create_graph: its own steps are kept for another one
        if inner and self.saving is None and self.zero.level == 3:
            raise UserError("create_graph=True outside of the model's forward pass: its weights are not whole there at "
                            "level 3; compute that gradient within the model's forward, or use level 2.")
        self._start(sure=not inner and any(reaches(p) for b in self.all for p, _, _ in b.views if p.requires_grad))
        at_its_end(self._over)

    def _start(self, sure: bool) -> None:
        if sure:
            self.start_sums()
        self._forget()
        self.in_backward, self.sure, self.taken = True, sure, False
        self.owed = self.last if len(self.left) > self.last else 0

    def _over(self) -> None:
        """A pass that began by itself is over."""
        if self.sure or self.taken:
            self.untold()
            self._finish()
            return
        self.in_backward = False
        for block in self.all if self.saving is None and not self.left else ():
            block.release()

    def _finish(self) -> None:
        """All gradients of the micro-batch are there."""
        self.in_backward = False
        # those whose inputs, or which themselves, had no part in it too
        for block in (*reversed(self.blocks), self.root):
            self._close(block)
            self._release(block, backward=True)
        self.left.clear()
        for p, name in self.took.items():                       # whoever looks for its gradient is told where it is
            if p not in self.away:
                self.away[p] = away(p, name)
            p.grad = self.away[p]
        self.sums.next()

    def _forget(self) -> None:
        for p in self.took:
            p.grad = None
        self.took.clear()

    def _enter_backward(self, block: Submodule) -> None:
        self._note()
        self._enter(block)

    def _leave(self, block: Submodule) -> None:
        """The backward pass of one call of a block is over."""
        if not self.sure and self.saving is not None:           # a gradient within forward: another one will come
            return
        i = self._last_call(block)
        # else of a forward pass before another's backward: the end will close it
        if i >= 0:
            self.left.pop(i)
            if self.sure and block not in self.left and not self._awaited(block):
                self._close(block)
        self._release(block, backward=True)

    def _awaited(self, block: Submodule) -> bool:
        """Will a gradient of its parameters come later in this pass, for they were read before the block was called?
        Then the end closes it."""
        return any(p.requires_grad and p not in self.took and reaches(p) for p, _, _ in block.views)

    def _close(self, block: Submodule) -> None:
        if block.trained:
            self.sums.close(block.trained)

    def _take(self, weight: Weight, p: nn.Parameter) -> None:
        """A parameter's gradient is there."""
        assert p.grad is not None
        self._note()
        if not (self.sure or self.taken):
            self.start_sums()
        self.taken = True
        self.sums.add(weight, self.weigh(p.grad.to_dense() if p.grad.is_sparse else p.grad))
        p.grad = None
        self.took[p] = weight.operand.name

    # ---- what the engine says to it

    def recover(self) -> None:
        """A backward pass that failed is put behind."""
        raise NotImplementedError

    def start_sums(self) -> None:
        """The next micro-batch's gradients are about to come."""
        raise NotImplementedError

    def untold(self) -> None:
        """A pass of whose loss nobody told."""
        raise NotImplementedError


def weighed(weight: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A gradient times a number; times zero it is zero, whatever it was."""
    if weight is None:
        return lambda grad: grad
    return lambda grad: (grad.to(torch.promote_types(grad.dtype, torch.float32)) * weight).where(weight != 0, 0)
