"""Any nn.Module as units: the parameters of each block, those that belong to no block or to several,
and their gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from megazero.base import UserError, say
from megazero.comm import Group
from megazero.engine.aliases import doubles
from megazero.engine.hidden import forget, hide, show
from megazero.engine.sliced import sliced
from megazero.plan import Action, OperandSpec, Parameter, Reductions, UnitSpec, Zero, flat
from megazero.units import Sharing, Unit, Weight

Tensor = torch.Tensor
Addresses = dict[int, tuple["Submodule", Unit]]


class Submodule:
    """A submodule's parameters, which come and go together: views of a unit's weights,
    or of nothing while those are released.

    Frozen parameters are a unit of their own, without gradients.
    `addresses` tells, by address, whose weights a storage holds now.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, sharing: Sharing,
                 addresses: Addresses) -> None:
        self.name, self.addresses = name, addresses
        self.fetch: Callable[[], bool] = lambda: False          # gets the weights for who reads them, where that may be
        self.stays = sharing.level < 3
        self.views: list[tuple[nn.Parameter, Weight, torch.Size]] = []
        self.units = []
        for trained, unit_name in ((True, name), (False, f"{name} (frozen)")):
            chosen = {n: p for n, p in parameters.items() if p.requires_grad == trained}
            if chosen:
                device = next(iter(chosen.values())).device
                self.units.append(Unit(flat(_spec(unit_name, chosen)), dtype, device, sharing, trained))
                self.views += [(p, self.units[-1].weight(n), p.shape) for n, p in chosen.items()]
        self.trained = next((u for u in self.units if u.trained), None)
        homes = {home.p: home.kind for home in sliced(parameters.values())}
        self.kinds = [homes.get(p, type(p)) for p, _, _ in self.views]
        empty = {u: u.weight_slice.new_zeros(()) for u in self.units}
        self.empties = [empty[w.unit].expand(shape) for _, w, shape in self.views]
        self.shown = [(0, 0)] * len(self.views)                 # version and address of parameters, as they were shown
        self.hidden = self.kept = False                         # kept: somebody reads outside of passes

    def fill(self, first: bool) -> None:
        """The weights become those of the first rank, whatever the others began with: a sum to which they add zeros.
        What they were goes as they come."""
        for unit in self.units:
            start = unit.master.new_zeros(unit.size)
            for p, w, _ in self.views:
                if w.unit is unit:
                    for home in sliced([p]):
                        home.open()
                        home.leave()
                    if first:
                        start[w.operand.start:w.operand.stop] = p.detach().flatten()
                    p.data = p.data.new_empty(0)
            unit.master.copy_(unit.sharing.shard.reduce_scatter(start, about=unit.flat.name).wait())
            unit.sharing.replicate.all_reduce(unit.master, about=unit.flat.name).wait()
            unit.publish()
        if self.stays:
            self._show()
        else:
            self.hide()

    @property
    def here(self) -> bool:
        """Are the weights whole, new and shown? Then nobody has to do anything for whoever reads them."""
        return not self.hidden and all(unit.here for unit in self.units)

    def gather(self) -> None:
        """The whole weights begin to arrive, if they are not here or are old."""
        with torch.inference_mode(False):                       # a buffer made now will serve training too
            for unit in self.units:
                unit.gather()

    def arrive(self) -> None:
        """They are here; parameters are views of them from now on."""
        for unit in self.units:
            unit.arrive()
        if self.hidden:
            with torch.inference_mode(False):
                self._show()

    def release(self) -> None:
        """At level 3 the whole weights are given back, if they are here; what a pass wrote into them stays."""
        if self.stays or self.kept:
            return
        if not self.hidden:
            if self._written():
                self.absorb()
            self.hide()
        for unit in self.units:                                 # of a hidden one they were gathered ahead
            if unit.weights is not None:
                unit.release()

    def _written(self) -> bool:
        """Did somebody write into parameters, or give them other data, since they were shown? (What is written through
        `p.data` leaves no trace.)"""
        return self.shown != [(p._version, p.data_ptr()) for p, _, _ in self.views]

    def changes(self) -> Iterator[str]:
        """What somebody did to the parameters since they were made: other data of the same kind are taken for weights;
        of the rest, why it cannot have the effect that was meant."""
        for (p, w, shape), (_, address) in zip(self.views, self.shown, strict=True):
            if p.requires_grad and not w.unit.trained:
                yield (f"{w.operand.name} was frozen when the engine was made and is not now; unfreeze it before, or "
                       "make a new engine.")
            if self.hidden or (p.data_ptr(), p.dtype, p.shape) == (address, w.unit.weight_slice.dtype, shape):
                continue
            if (p.dtype, p.device, p.shape) != (w.value.dtype, w.value.device, shape):
                yield (f"{w.operand.name} was made {p.dtype} of shape {tuple(p.shape)} on {p.device} after the engine "
                       f"was made, which holds it as {w.value.dtype} of shape {tuple(shape)} on {w.value.device}; "
                       "change the module before, or give the engine another dtype.")
                continue
            with torch.no_grad():
                w.value.copy_(p.view(w.value.shape))
            p.data = w.value.view(shape)

    def still(self) -> Iterator[tuple[Unit, int, int]]:
        """What this rank's slices hold of parameters that were frozen later: (unit, from, to)."""
        for p, w, _ in self.views:
            a, b = (min(max(at, w.unit.low), w.unit.high) - w.unit.low for at in (w.operand.start, w.operand.stop))
            if w.unit.trained and not p.requires_grad and a < b:
                yield w.unit, a, b

    def absorb(self) -> None:
        """What somebody wrote into the whole weights goes to the masters, element by element, so that those that nobody
        touched keep their precision. Every rank must have written the same. Raises UserError where it cannot."""
        for text in self.changes():
            raise UserError(f"model: {text}")
        for unit in self.units:
            if unit.weights is None or unit.weight_slice is unit.master and self.stays:
                continue
            unit.updated()
            unit.arrive()
            here = unit.weights[unit.low:unit.high]
            unit.master.copy_(torch.where(here != unit.master.to(here.dtype), here.to(unit.master.dtype), unit.master))
            if not self.stays and unit.weight_slice is not unit.master:
                unit.weight_slice.copy_(here)

    def take(self, world: Group, writer: int) -> None:
        """The whole weights become those of one rank: a sum to which the others add zeros."""
        for unit in self.units:
            assert unit.weights is not None
            if world.rank != writer:
                unit.weights.zero_()
            world.all_reduce(unit.weights, about=unit.flat.name).wait()

    def _show(self) -> None:
        for unit in self.units:
            assert unit.weights is not None
            self.addresses[unit.weights.untyped_storage().data_ptr()] = self, unit
        self.hidden = False
        for (p, w, shape), kind in zip(self.views, self.kinds, strict=True):
            show(p, kind, w.value.view(shape))
        self.shown = [(p._version, p.data_ptr()) for p, _, _ in self.views]

    def leave(self) -> None:
        """Parameters are their own again, whole."""
        self.gather()
        self.arrive()
        for (p, w, shape) in self.views:
            p.data = w.value.view(shape).clone()
            forget(p)

    def hide(self) -> None:
        """Parameters hold nothing, and say so to whoever reads them."""
        self.hidden = True
        for unit in self.units:
            if unit.weights is not None:
                self.addresses.pop(unit.weights.untyped_storage().data_ptr(), None)
        for (p, w, _), empty in zip(self.views, self.empties, strict=True):
            hide(p, w.operand.name, empty, lambda _: self.fetch(), lambda _: False)


def _spec(name: str, parameters: Mapping[str, nn.Parameter]) -> UnitSpec:
    """Each parameter one operand; matrices are decayed, vectors are not."""
    logical = [Parameter(n, tuple(p.shape) or (1,), group="matrix" if p.dim() > 1 else "vector")
               for n, p in parameters.items()]
    return UnitSpec(name, tuple(OperandSpec(p.name, (p,)) for p in logical))


class Accumulation:
    """The gradients of a step, from the parameters' to this rank's slices of their sum over all ranks: hooks say how
    far backward is, `Reductions` what must be done then, and `do` does it.

    Sums travel in one order on all ranks, whatever each of them calls: the last block first, until the first backward
    pass has shown rank 0's own, which `agree` gives to all; again in steps 2, 4, 8 ..., for what a module calls may
    change. What is ready early waits.
    """

    def __init__(self, units: Sequence[Unit], zero: Zero, micro_batches: int, do: Callable[[Sequence[Action]], None],
                 agree: Callable[[list[int]], list[int]]) -> None:
        """`units`: the root's first, then those of the blocks. `micro_batches`: of a step."""
        self.zero, self.micro_batches, self.do, self.agree = zero, micro_batches, do, agree
        self.order, self.agreed = list(reversed(units)), False
        self.waited = 0                                         # the most whole sums that waited at a time
        self.begun = 0                                          # steps
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.begun += 1
        self.reductions = Reductions({}, self.zero)
        self.micro = 0                                          # micro-batches of this step that are done
        self.last = self.due = self.over = False
        self.growing: set[Unit] = set()
        self.ready: list[Unit] = []                             # their backward pass of this micro-batch is over
        self.gone = 0                                           # so many of `order` travel

    def start(self, last: bool) -> None:
        """A micro-batch begins, the `last` one of the step or not; are its sums to travel?"""
        self.last = last
        self.due = last or (self.zero.level >= 2 and (self.micro + 1) % self.zero.every == 0)

    def end(self) -> None:
        """The step has fewer micro-batches than it was said to have: what there is travels now."""
        self.start(last=True)
        for unit in self.order:
            self._travel(unit)
        self.gone, self.over = 0, True

    def add(self, weight: Weight, grad: Tensor) -> None:
        """One parameter's gradient of this micro-batch."""
        if weight.unit in self.ready:
            raise UserError(f"{weight.operand.name}: its gradient came after the backward pass of "
                            f"{weight.unit.flat.name}, which autograd recomputes and whose weight is read outside of "
                            "it; checkpoint with use_reentrant=False, or give `blocks` without that one.")
        self._open(weight.unit)
        weight.add(grad)

    def close(self, unit: Unit) -> None:
        """The unit's backward pass is over: its sum begins to travel when its turn comes, if it is due."""
        if not self.due or unit in self.ready:
            return
        self.ready.append(unit)
        while self.gone < len(self.order) and self.order[self.gone] in self.ready:
            self._travel(self.order[self.gone])
        self._count(len(self.ready) - self.gone)

    def _travel(self, unit: Unit) -> None:
        self._open(unit)                                        # even without a gradient: the other ranks count on ours
        self.reductions.left[unit.flat.name] = 1 if self.last else 2        # this one, and the last
        self.do(self.reductions.complete(unit.flat.name))
        self.growing.discard(unit)
        self.gone += 1

    def _count(self, waiting: int) -> None:
        """Says once that whole sums wait, which takes memory from level 2."""
        if waiting > 0 and self.agreed and self.zero.level >= 2 and not self.waited:
            say(f"gradients of {self.ready[-1].flat.name} wait for those of {self.order[self.gone].flat.name}: this "
                "rank calls blocks in another order than rank 0 did at first, and keeps whole sums that long")
        self.waited = max(self.waited, waiting)

    def next(self) -> None:
        """The micro-batch is over, and every unit closed."""
        again = self.last and self.begun & (self.begun - 1) == 0
        if self.ready and (again or not self.agreed):
            self.order = [self.order[i] for i in self.agree([self.order.index(u) for u in self.ready])]
            self.agreed = True
        self.ready, self.gone, self.over = [], 0, self.last
        self.micro += 1

    def _open(self, unit: Unit) -> None:
        if unit not in self.growing:
            self.do(self.reductions.begin(unit.flat.name))
            self.growing.add(unit)


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating buffers follow the parameters whose dtype they share. What is not saved with the module (frequencies of
    rotary positions) keeps its precision."""
    shared = {p.dtype for p in model.parameters()}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in shared and name not in module._non_persistent_buffers_set:
                buffer.data = buffer.data.to(dtype)


def share(buffers: Sequence[Tensor], world: Group) -> None:
    """They become those of the first rank, bit by bit: a sum of bytes to which the others add zeros."""
    wide = [b.contiguous().view(-1).view(torch.uint8) for b in buffers]
    if world.size == 1 or not wide:
        return
    told = torch.cat(wide) if world.rank == 0 else torch.zeros_like(torch.cat(wide))
    total = world.all_reduce(told).wait().split([len(part) for part in wide])
    for buffer, part in zip(buffers, total, strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def repeated(model: nn.Module) -> list[nn.Module]:
    """The layers: children of each nn.ModuleList, or nn.Sequential with two of a kind, that is not inside another: so
    of encoder and decoder alike, and no experts of a layer. Layers have parts of their own; if none has, they are
    simple ones."""
    lists = {f"{n}.": m for n, m in model.named_modules() if _repeats(m)}
    outer = [[child for child in m.children() if any(True for _ in child.parameters())] for n, m in lists.items()
             if not any(n != other and n.startswith(other) for other in lists)]
    made = [layers for layers in outer if any(map(_has_parts, layers))]
    return [layer for layers in made or outer for layer in layers]


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _repeats(m: nn.Module) -> bool:
    kinds = [type(child) for child in m.children() if _has_parts(child)]
    return (isinstance(m, nn.ModuleList) and not isinstance(m, ParametrizationList)
            or isinstance(m, nn.Sequential) and len(set(kinds)) < len(kinds))


def belongings(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Which parameters, by name, belong to the model itself (first) and to each block that has any. One that is known
    by several names has the first; it is the model's own if they lie in different places."""
    inside = {f"{n}.": m for n, m in model.named_modules(remove_duplicate=False) if m in blocks}
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    own: dict[nn.Module, dict[str, nn.Parameter]] = {model: {}, **{m: {} for m in blocks}}
    for p, known in names.items():
        places = {next((m for prefix, m in inside.items() if n.startswith(prefix)), model) for n in known}
        own[places.pop() if len(places) == 1 else model][known[0]] = p
    return {m: parameters for m, parameters in own.items() if parameters or m is model}


def mistakes(model: nn.Module, blocks: Sequence[nn.Module], trains: bool = True) -> Iterator[str]:
    """What keeps a module from being trained as blocks."""
    names = {m: n for n, m in model.named_modules() if m is not model}
    for block in blocks:
        kind = f"blocks: the {type(block).__name__}"
        if block not in names:
            yield f"{kind} is not a submodule of the model; give modules that are inside it."
        elif around := next((m for m in blocks if m is not block and block in list(m.modules())), None):
            yield f"{kind} {names[block]} is inside the block {names.get(around)}; give one of the two."
    parameters = dict(model.named_parameters())
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1 or "meta" in devices:
        yield f"model: its parameters lie on {', '.join(devices)}; move them to this rank's device with model.to(...)."
    for name, p in parameters.items():
        if not p.is_floating_point():
            yield f"model: {name} is {p.dtype}; make it a buffer, since parameters are floating-point numbers."
    yield from doubles(model)
    if trains and not any(p.requires_grad for p in parameters.values()):
        yield "model: no parameter requires a gradient; leave requires_grad on for those to be trained."
