"""ZeRO for any nn.Module: its blocks become units, and hooks do what the program does for our own decoder.

    forward of a block   its weights are gathered, those of the next one begin to travel; afterwards they are released
    what autograd saves  at level 3, where it lies in a unit's weights, is a `Handle`, which is looked up in backward
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
from typing import Any

import torch
from torch import nn

from megazero.base import UserError, give_back, printable, say
from megazero.comm import Stuck, Wires
from megazero.engine.aliases import kept
from megazero.engine.blocks import (
    Accumulation,
    Addresses,
    Submodule,
    belongings,
    cast_buffers,
    mistakes,
    repeated,
    share,
)
from megazero.engine.groups import grouped, mistaken
from megazero.engine.hooks import Hook, running
from megazero.engine.passes import Passes, weighed
from megazero.plan import Action, LossScale, Progress, Zero, ending, tensors_of
from megazero.settings import Optimization
from megazero.units import TORCH_DTYPE, Buffers, Gate, Ruling, Sharing, UnitActions, Updater, Verdict, Weight, later

Tensor = torch.Tensor
CONSTANT = LossScale(value=1.0, minimum=1.0, window=1, hysteresis=1, constant=True)


class Engine(Passes):
    """Trains a module on this rank: `engine(...)`, `engine.backward(loss)` and `engine.step()` for each micro-batch.

    model           any module whose parameters lie on one device. Rank 0's are taken, and its buffers
    wires           a mesh of data-parallel ranks: `shard` and `replicate` say who shares what `zero.level` shares
    accumulation    micro-batches of a step on each rank; `step` acts after the last one
    blocks          submodules that are gathered and released one by one; default: all repeated layers
    overlap         levels 1 and 2: weights travel after a step beside what follows, and nobody but blocks reads them
    lr              learning rate of the next step; settings.lr to begin with
    groups          of parameters, as torch.optim has them: each has the rate and the options that it says when a step
                    begins. Default: one rate, matrices are decayed
    trains          without, all parameters are frozen: weights are shared, and that is all

    What is not the engine's is asked of the module.
    """

    def __init__(self, model: nn.Module, wires: Wires, settings: Optimization, zero: Zero, dtype: str = "fp32",
                 accumulation: int = 1, scale: LossScale = CONSTANT, blocks: Sequence[nn.Module] | None = None,
                 overlap: bool = False, groups: Sequence[Mapping[str, Any]] = (), trains: bool = True) -> None:
        part(model)
        modules = list(dict.fromkeys(repeated(model) if blocks is None else blocks))
        if errors := [*mistakes(model, modules, trains), *(mistaken(model, groups) if groups else ()),
                      *_mistakes(wires, settings, zero, dtype, accumulation)]:
            raise UserError(*errors)
        assert settings.lr is not None
        if zero.level == 3 and not modules and wires.rank == 0:
            say("model: has no repeated layers (nn.ModuleList), so all its weights are gathered at once: level 3 saves "
                "optimizer state and gradients alone; name `blocks`")
        for text in kept(model) if wires.rank == 0 else ():
            say(text)
        self.frozen = [] if trains else [p for p in model.parameters() if p.requires_grad]      # until it is destroyed
        for p in self.frozen:
            p.requires_grad_(False)
        addresses: Addresses = {}
        sharing = Sharing(zero.level, wires["shard"], wires["replicate"], stage=wires["stage"],
                          buffers=Buffers(poison=wires.late))
        names = {m: n for n, m in model.named_modules()}
        cast_buffers(model, TORCH_DTYPE[dtype])
        made: dict[nn.Module, Submodule] = {}
        for m, own in belongings(model, modules).items():       # one is whole at a time
            made[m] = Submodule(names[m] or "root", own, TORCH_DTYPE[dtype], sharing, addresses)
            made[m].fill(wires.rank == 0)
            give_back()
        share([b.detach() for b in model.buffers() if b.numel()], wires["world"])
        super().__init__(model, made, addresses, wires, zero, TORCH_DTYPE[dtype])
        self.scale, self.lr, self.overlap, self.groups = scale, settings.lr, overlap, groups
        self.renew()
        units = [b.trained for b in made.values() if b.trained]
        self.ending = ending([u.flat.name for u in units])
        self.gate = Gate(units, settings.clip_grad, wires["world"], tells=True)
        self.updater = Updater(units, settings, [a.units for a in self.ending if a.kind == "update"],
                               grouped(model, groups, settings.optimizer) if groups else None)
        self.actions = UnitActions({u.flat.name: u for u in units}, wires, self.gate, self.updater)
        self.sums = Accumulation(units, zero, accumulation, self._do, self._agree)
        self.ruling = Ruling()                                  # of this step: what its losses are
        self.verdict: Verdict | None = None                     # of the last step
        self.found_inf: Callable[[], list[float]] | None = None  # of the last step, until the host has read it
        self.means = True                                       # every micro-batch of this step counts as one
        self.skipped = 0
        self.applied = False                                    # the last step that the host knows of
        self.boundary: bool | None = None                       # does the next backward end the step? None: by count
        self.over = ""                                          # why this engine does nothing any more

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The module's own forward pass. Calling the module itself is the same."""
        self._check()
        return self.module(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """Of the module, what the engine has not."""
        if "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.module, name)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True,
                 tokens: int | Tensor | None = None) -> None:
        """Adds the gradients of one micro-batch; plain loss.backward() does too, with no word of the loss.

        `loss` is a mean over this rank's micro-batch; the step's loss and gradient are means over micro-batches and
        ranks: each counts as one, or as its `tokens` if it is a mean over so many. Without `scale_wrt_gas` they are
        sums over micro-batches, and means over ranks. If it fails, the step changes nothing, on all ranks.
        """
        self._check()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"kind {type(loss).__name__}"
            raise UserError(f"backward: a loss of {kind}; give a tensor of one number, such as loss.mean().")
        if not (tokens is None or isinstance(tokens, int | float) and tokens >= 0
                or isinstance(tokens, Tensor) and tokens.numel() == 1):
            raise UserError(f"backward: tokens is {printable(str(tokens), 60)}; give the number of those that the loss "
                            "is a mean over.")
        loss = loss.reshape(())
        one = torch.ones_like(loss.detach(), dtype=self.gate.wide)
        weight = one if tokens is None else (one * tokens).reshape(())
        self._start(sure=True)
        self.means = self.means and tokens is None and scale_wrt_gas
        self.weigh = weighed(None if tokens is None else weight)
        self.ruling.tell("loss", (loss.detach() * weight).where(weight > 0, 0))
        self.ruling.tell("tokens", weight if scale_wrt_gas else weight * (self.sums.micro == 0))
        scaled: Any = loss.to(self.gate.wide) * self.scale.value
        try:
            scaled.backward(retain_graph=retain_graph)
        except BaseException as error:
            self._fail(error)
            raise
        self._finish()

    def step(self, partial: bool = False) -> Verdict | None:
        """After the last micro-batch: updates the weights, or changes nothing if a loss or a gradient was not finite
        anywhere. Before that: None, unless the step is to end with the micro-batches that it has had, `partial` on all
        ranks (from level 2 after the same number on each)."""
        self._check()
        if not (self.sums.over or partial and self.sums.micro):
            return None
        if not self.sums.over:
            self.sums.end()
        for block in self.all if self.zero.level < 3 else ():  # what somebody wrote since: clipped, averaged ones
            block.absorb()
        zero = torch.zeros((), dtype=self.gate.wide, device=self.gate.device)
        self.ruling.scale = zero + self.scale.value
        self.ruling.lr = torch.stack([zero + lr for lr in [float(g["lr"]) for g in self.groups] or [self.lr]])
        self.ruling.trace = float(self.wires.line.marks.trace)
        self._update()
        self.settle()
        self.verdict, self.ruling = self.ruling.verdict, Ruling()
        assert self.verdict is not None, "the ending judges"
        self.found_inf = later(torch.stack((self.verdict.found_inf, self.verdict.astray)))
        self.sums.begin()
        self.means = True
        self.steps += 1
        self.renew()
        return self.verdict

    def _update(self) -> None:
        """What was frozen since the engine was made stays as it is, moments too. (Steps are counted for all: Adam's
        bias correction of what is thawed again is that of the others, where torch counts each by itself.)"""
        still = [(unit, part, part.clone()) for block in self.all for unit, a, b in block.still()
                 for part in (unit.master[a:b], *self.updater.beside(unit, a + unit.low, b + unit.low))]
        self._do([*self.sums.reductions.finish(), *self.ending])
        for unit, part, before in still:
            unit.updated()
            part.copy_(before)
            unit.publish()

    def mean(self) -> Tensor | None:
        """The factor that makes the step's sums its gradient, once all of them are here; None before."""
        if not self.sums.over:
            return None
        self._do(self.sums.reductions.finish())
        tokens = self.wires["world"].all_reduce(self.ruling.told["tokens"].reshape(1).clone()).wait()
        return self.ruling.nominal / tokens.clamp(min=1) / self.scale.value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of a step that is not over, on all ranks; after a step there are none."""
        self._check()
        self._do(self.sums.reductions.finish())
        self.ruling, self.means = Ruling(), True
        self.sums.begin()
        self.left.clear()
        self._forget()

    # ---- when a step ends

    def gradient_accumulation_steps(self) -> int:
        return self.sums.micro_batches

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Whether the next backward passes end a step, on all ranks; None: they are counted."""
        self.boundary = is_boundary

    def is_gradient_accumulation_boundary(self) -> bool:
        """Has the last micro-batch of this step had its backward pass, or would the next one be it?"""
        by_count = self.sums.micro + 1 >= self.sums.micro_batches
        return self.sums.over or (by_count if self.boundary is None else self.boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within end no step."""
        before, self.boundary = self.boundary, False
        try:
            yield
        finally:
            self.boundary = before

    def count_as(self, micro_batches: int) -> None:
        """This step's gradient is its sum divided by so many micro-batches of each rank, whatever it had; where none
        said its tokens. Its loss stays the mean."""
        if self.means and micro_batches != self.sums.micro:
            told, counted = self.ruling.told, micro_batches / self.sums.micro
            told["tokens"], told["loss"] = told["tokens"] * counted, told["loss"] * counted

    def start_sums(self) -> None:
        if self.sums.over:
            raise UserError(f"backward: this step has had its {self.sums.micro} micro-batches; "
                            "call step(), or raise accumulation.")
        if self.sums.micro == 0 and not self.scale.constant:    # it stays the same until the step is over
            self.settle()
        self.weigh = weighed(None if self.scale.value == 1 else
                             torch.tensor(self.scale.value, dtype=self.gate.wide, device=self.gate.device))
        self.sums.start(self.is_gradient_accumulation_boundary())

    def untold(self) -> None:
        one = torch.ones((), dtype=torch.float64, device=self.gate.device)
        self.ruling.tell("loss", 0 * one)
        self.ruling.tell("tokens", one)

    # ---- what became of steps

    @property
    def global_steps(self) -> int:
        """Steps so far, skipped ones too."""
        return self.steps

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing. Waits for the last one's verdict, as the two below."""
        self.settle()
        return self.skipped

    def was_step_applied(self) -> bool:
        """Did the last step change the weights?"""
        self.settle()
        return self.applied

    def get_global_grad_norm(self) -> float | None:
        """Of the last step, before clipping; None before the first."""
        return None if self.verdict is None else float(self.verdict.norm)

    def settle(self) -> None:
        """Reads the last step's verdict, when the next step is under way (its forward pass where the loss scale moves,
        all of it where not): tells of a skipped one, moves the loss scale."""
        if self.found_inf is None:
            return
        (found_inf, astray), self.found_inf = self.found_inf(), None
        if astray:
            raise UserError(f"step {self.steps:,}: ranks gathered or summed different blocks, and nothing was changed; "
                            "let every rank call the same blocks in the same order where weights are shared (level 3).")
        self.applied = not found_inf
        self.skipped += not self.applied
        self.scale = self.scale.after(self.applied)
        if not self.applied and self.wires.rank == 0:
            say(f"step {self.steps:,} skipped: its loss or a gradient is not finite; nothing was changed, "
                f"loss scale {self.scale.value:g}")

    def resume(self, progress: Progress | None, updates: int | None) -> None:
        """Weights came from elsewhere, and moments of so many `updates`: a step begins, with a progress the one that
        follows it."""
        if progress is not None:
            self.steps, self.skipped, self.scale = progress.step, progress.step - progress.applied, progress.loss_scale
            self.verdict, self.found_inf, self.applied = None, None, True       # none that was skipped
        if updates is not None:
            self.updater.set_steps(updates)
        self.renew()

    @property
    def updates(self) -> int:
        """Steps that the optimizer counts: those that were applied since its moments began. All ranks ask."""
        return self._agree([int(self.updater.steps[0]) if self.updater.steps else 0])[0]

    def moments(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Of each parameter that is trained what the optimizer keeps, whole, on all ranks together."""
        for block in self.all:
            for unit in [block.trained] if block.trained else []:
                unit.updated()
                for p, w, shape in block.views:
                    if w.unit is unit:
                        yield p, {kind: self.updater.whole(unit, kind, w.operand.name).view(own)
                                  for kind, own in self.kept(w, shape).items()}

    def set_moments(self, given: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Turned round; every rank gives all of them. Parameters that are not given keep theirs. Raises UserError."""
        known = [(w, given[p], self.kept(w, shape)) for block in self.all for p, w, shape in block.views
                 if p in given and w.unit.trained]
        for w, own, kinds in known:
            for kind, shape in kinds.items():
                if not isinstance(own.get(kind), Tensor) or own[kind].shape != shape:
                    raise UserError(f"optimizer state: has no {kind} of {w.operand.name} of shape {list(shape)}; give "
                                    "what state_dict() gave.")
        for w, own, kinds in known:
            for kind in kinds:
                self.updater.set_whole(w.unit, kind, w.operand.name, own[kind])
        steps = [float(own["step"]) for own in given.values() if "step" in own]
        if steps:
            self.updater.set_steps(int(max(steps)))

    def kept(self, w: Weight, shape: torch.Size) -> dict[str, torch.Size]:
        """Shapes of what the optimizer keeps of a parameter of this shape."""
        (piece,) = w.operand.pieces
        logical = piece.shard.parameter.shape                   # (1,) of a scalar
        return {kind: shape if own == logical else torch.Size(own)
                for kind, own in tensors_of(logical, self.updater.groups.rule(piece)).items()}

    # ---- what fails

    def _check(self) -> None:
        if self.over:
            raise UserError(f"engine: {self.over}; make a new one.")
        self.recover()

    def recover(self) -> None:
        if self.in_backward and not running():
            self.untold()
            self._fail(None)

    def _fail(self, error: BaseException | None) -> None:
        """The backward pass failed here. The other ranks go on and count on what is missing: it travels all the same,
        and the step, whose loss is no number now, changes nothing anywhere."""
        if isinstance(error, Stuck):
            self.over = "its ranks have lost each other"
            return
        if not (self.sure or self.taken):
            self.in_backward = False
            return
        self.ruling.tell("loss", torch.full((), torch.nan, dtype=torch.float64, device=self.gate.device))
        for block in list(reversed(self.left[self.owed:])) if self.zero.level == 3 else ():
            self._enter(block)
            self._leave(block)
        self._finish()

    def destroy(self) -> None:
        """The module is as it was before, with the trained weights, whole, on all ranks."""
        if self.over:
            return
        self.zero_grad()
        for handle in self.handles:
            handle.remove()
        for block in self.all:
            block.leave()
        for p in self.frozen:
            p.requires_grad_(True)
        self.addresses.clear()
        self.over = ("was destroyed, or another one was made of its module (as transformers' Trainer does when train() "
                     "follows evaluate() or train(): megazero.Trainer may)")

    # ---- weights outside of passes

    def renew(self) -> None:
        """Below level 3 every rank gathers all, in one order, two blocks at a time: parameters are whole between steps,
        for whoever reads them. With `overlap` they travel beside what follows, and are hidden until their block's turn.
        They have changed: torch refuses a backward pass of before."""
        blocks = self.all if self.zero.level < 3 else []
        torch.autograd.graph.increment_version([p for block in blocks for p, _, _ in block.views])
        for i, block in enumerate(blocks):
            for wanted in blocks[i:i + 2]:
                wanted.gather()
            if self.overlap:
                block.hide()
            else:
                block.arrive()

    @contextmanager
    def whole(self, *parameters: nn.Parameter, writer: int | None = None) -> Iterator[None]:
        """Within, these parameters (all, if none is named) are whole, to be read and written. All ranks come here, and
        write the same; or `writer` alone writes. Raises UserError for a parameter that is not the engine's, a writer
        that is no rank."""
        if writer is not None and writer not in range(self.wires.mesh.world):
            raise UserError(f"whole: writer {writer} is no rank; write one from 0 to {self.wires.mesh.world - 1}.")
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
                self._shut(block)

    # ---- what ranks do together

    def _do(self, actions: Sequence[Action]) -> None:
        """As in a program."""
        for action in actions:
            self.doing(str(action))
            self.actions.do[action.kind](action, self.ruling)

    def all_have(self, one: bool) -> bool:
        """Do all ranks say so?"""
        return bool(self.wires["saved"].all_reduce(torch.tensor([int(not one)]), "max").wait().item() == 0)

    def _agree(self, numbers: list[int]) -> list[int]:
        """Rank 0's."""
        told = torch.tensor(numbers, dtype=torch.float64, device=self.gate.device) * (self.wires.rank == 0)
        return [int(n) for n in self.wires["world"].all_reduce(told).wait().tolist()]


def part(model: nn.Module) -> None:
    """An engine that was made of this module before gives it back."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, Hook) and hook.owner:
                hook.owner.destroy()


def _mistakes(wires: Wires, settings: Optimization, zero: Zero, dtype: str, accumulation: int) -> Iterator[str]:
    mesh = wires.mesh
    if mesh.dp < mesh.world:
        yield (f"mesh: tp {mesh.size('tp')}, pp {mesh.size('pp')}: a module is shared among data-parallel ranks alone; "
               f"write Mesh.of(dp={mesh.world}).")
    if zero.level not in range(4):
        yield f"zero: level {zero.level} is not known; write 0, 1, 2 or 3."
    if dtype not in TORCH_DTYPE:
        yield f"dtype {dtype}: is not known; write one of {', '.join(TORCH_DTYPE)}."
    if accumulation < 1:
        yield f"accumulation {accumulation}: must be at least 1."
    if settings.lr is None:
        yield "lr: is missing; give the highest learning rate."
