"""What a ds_config.json asks for: read, compared with the table of keys, its meaning on this number of ranks. Pure."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazero.base import UserError, loads, printable, read_bytes, said
from megazero.engine.keys import IDLE, MUST, REFUSED, TABLE, Key, fits, form_of, taken
from megazero.plan import LossScale
from megazero.settings import nearest

LONGEST = 2**20             # bytes of a file
MANY = 10                   # mistakes that are told
PAGE = "docs/deepspeed.md lists the keys"
STRING = r'("(?:\\.|[^"\\])*")'
COMMENT = re.compile(STRING + r"|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
TRAILING = re.compile(STRING + r"|,(?=\s*[}\]])")
Values = Mapping[str, Any]
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


# ---- reading

def read_config(config: Any) -> tuple[str, dict[str, Any]]:
    """(its name for people, the mapping) of a mapping, a file, or base64. Raises UserError."""
    if isinstance(config, Mapping):
        return "config", dict(config)
    if not isinstance(config, (str, Path)):
        raise UserError(f"config {said(config)}: is a {type(config).__name__}; give a mapping or the path of a file.")
    path = Path(config)
    try:
        text = read_bytes(path, LONGEST)
    except OSError as error:
        text = _decoded(str(config))
        if not text:
            raise UserError(f"config {said(str(config))}: cannot be read ({error.strerror}); name a ds_config.json.") \
                from None
        path = Path("config")
    except ValueError as error:
        raise UserError(f"config {path}: {error}; name a ds_config.json.") from None
    try:
        return str(path), parsed(text)
    except ValueError as error:
        raise UserError(f"config {path}: is not JSON ({error}).") from None


def _decoded(text: str) -> bytes:
    """What base64 for URLs stands for, or nothing."""
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True) if len(text) > 3 else b""
    except (binascii.Error, ValueError):
        return b""


def parsed(text: bytes) -> dict[str, Any]:
    """JSON with comments and commas before a closing bracket, as hjson allows. Raises ValueError: keys that stand
    twice too."""
    try:
        plain = COMMENT.sub(lambda m: m[1] or "\n" * m[0].count("\n"), text.decode("utf-8-sig"))
    except UnicodeError:
        raise ValueError("is not UTF-8 text") from None
    value = loads(TRAILING.sub(lambda m: m[1] or "", plain))
    if not isinstance(value, dict):
        raise ValueError(f"it is {said(value)}, not a mapping")
    return value


# ---- comparing with the table

@dataclass(frozen=True)
class Judged:
    """`values` of all keys by path, defaults too; `idle`: those that were given without effect, by why."""

    values: Values
    idle: Mapping[str, list[str]]


def judge(given: Mapping[str, Any], where: str = "config") -> Judged:
    """Raises UserError with a sentence for each key that is not known, has not its form or is refused."""
    given = _spelled(given, where)
    if waiting := list(_auto(given)):
        which = f"{printable(', '.join(waiting))} {'is' if len(waiting) == 1 else 'are'}"
        raise UserError(f'{where}: {which} "auto", which only a trainer fills in; write values.')
    kinds = {block: _kind(given, block) for block in ("optimizer", "scheduler")}
    table = {key.path: key for key in TABLE if not key.of or kinds[key.path.split(".")[0]] in key.of.split("|")}
    found = dict(_leaves(given, table))
    errors = [f"{where} {printable(path, 200)}: {fault}." for path, value in found.items()
              if (fault := _fault(path, value, table))]
    errors += _missing(given, table, where)
    if len(errors) > MANY:
        errors[MANY:] = [f"{where}: {len(errors) - MANY} keys more are wrong; {PAGE}."]
    if errors:
        raise UserError(*errors)
    idle: dict[str, list[str]] = {}
    for path, value in found.items():
        if table[path].kind == IDLE and value is not None:
            idle.setdefault(table[path].what, []).append(path)
    values = {path: key.default for path, key in table.items()}
    return Judged(values | {path: _plain(value) for path, value in found.items() if value is not None}, idle)


def _spelled(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With one spelling where there are two."""
    if "bfloat16" in given and "bf16" in given:
        raise UserError(f"{where} bfloat16: is bf16, which is given too; keep one.")
    return {"bf16" if key == "bfloat16" else key: value for key, value in given.items()}


def _auto(given: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, value in given.items():
        path = f"{at}{key}"
        if isinstance(value, Mapping):
            yield from _auto(value, f"{path}.")
        elif isinstance(value, str) and value == "auto" and path not in {k.path for k in TABLE if k.default == "auto"}:
            yield path


def _kind(given: Mapping[str, Any], block: str) -> str:
    """The type of an optimizer or a scheduler as the table writes it, or nothing."""
    inner = given.get(block)
    word = str(inner.get("type", "")).lower() if isinstance(inner, Mapping) else ""
    row = next(key for key in TABLE if key.path == f"{block}.type")
    return next((kind for kind in row.form.split("|") if kind.lower() == word), "")


def _leaves(given: Mapping[str, Any], table: Mapping[str, Key], at: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that are no blocks; a block that is null is not said. A name with a dot in it is no path."""
    for key, value in given.items():
        path = f"{at}{said(key) if '.' in str(key) else key}"
        within = any(other.startswith(f"{path}.") for other in table)
        if within and isinstance(value, Mapping):
            yield from _leaves(value, table, f"{path}.")
        elif not within or value is not None:
            yield path, value


def _fault(path: str, value: Any, table: Mapping[str, Key]) -> str:
    """What is wrong with it, or nothing."""
    key = table.get(path)
    if key is None:
        return _unknown(path, value, table)
    if value is None or (key.kind == REFUSED and taken(key, value)):
        return ""
    if key.kind == REFUSED and fits(key, value):
        return f"{said(value)} {key.what}" if key.what.startswith("is ") else f"is {said(value)}: {key.what}"
    if fits(key, value):
        return ""
    return f"is {said(value)}, " + (f"which is not here; write {form_of(key)}" if path.endswith(".type") else
                                    f"not {form_of(key)}")


def _unknown(path: str, value: Any, table: Mapping[str, Key]) -> str:
    if any(other.startswith(f"{path}.") for other in table):
        return f"is {said(value)}, not a mapping"
    if path in ("optimizer.params", "scheduler.params"):        # of a type that is wrong itself
        return ""
    block = path[:path.rfind(".") + 1]
    beside = dict.fromkeys(p[len(block):].split(".")[0] for p in table if p.startswith(block))
    return f"is not a key{nearest(path[len(block):], beside) or nearest(path, table)}; {PAGE}"


def _missing(given: Mapping[str, Any], table: Mapping[str, Key], where: str) -> Iterator[str]:
    for key in table.values():
        block = key.path.split(".")[0]
        if key.default == MUST and given.get(block) is not None:
            inner: Any = given
            for part in key.path.split("."):
                inner = inner.get(part) if isinstance(inner, Mapping) else None
            if inner is None:
                yield f"{where} {key.path}: is missing; write {form_of(key)}."


def _plain(value: Any) -> Any:
    """1e9 as a whole number, as their reader takes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ---- what it means

@dataclass(frozen=True)
class Meaning:
    """What a configuration means on this number of ranks.

    batch, micro_batch, accumulation    samples of a step, of a forward pass; micro-batches of a step on a rank
    shard       ranks that share one copy of what `level` shares
    dtype       fp16 or bf16; "": that of the module
    optimizer   rule and options of groups that say none; None without an optimizer
    schedule    type and parameters; None without one
    board, tables       folders for TensorBoard, and for tables of the same curves; None without
    told        what people should know at start, a line each
    """

    where: str
    batch: int
    micro_batch: int
    accumulation: int
    level: int
    shard: int
    overlap: bool
    dtype: str
    scale: LossScale
    clip: float
    optimizer: tuple[str, Mapping[str, Any]] | None
    schedule: tuple[str, Values] | None
    print_every: float | None
    board: Path | None
    tables: Path | None
    drop_last: bool
    told: tuple[str, ...]


def meaning(given: Any, world: int, cuda: bool) -> Meaning:
    """Raises UserError."""
    where, words = read_config(given)
    judged = judge(words, where)
    v = judged.values
    errors = [f"{where} {fault}." for fault in (*_conflicts(v, world), *_homes(v, cuda))]
    try:
        batch, micro, accumulation = batch_of(v, world)
    except ValueError as error:
        errors.append(f"{where} {error}.")
    if errors:
        raise UserError(*errors)
    zero = "zero_optimization."
    shard = v[zero + "mics_shard_size"]
    return Meaning(
        where, batch, micro, accumulation, level=v[zero + "stage"], shard=world if shard == -1 else shard,
        overlap=v[zero + "overlap_comm"] is not False,
        dtype="fp16" if v["fp16.enabled"] else "bf16" if v["bf16.enabled"] else "",
        scale=_scale(v), clip=v["gradient_clipping"], optimizer=_optimizer(v), schedule=_schedule(v),
        print_every=v["steps_per_print"], board=_folder(v, "tensorboard"), tables=_folder(v, "csv_monitor"),
        drop_last=v["dataloader_drop_last"],
        told=tuple(_told(words, judged)))


def batch_of(v: Values, world: int) -> tuple[int, int, int]:
    """(samples of a step, of a micro-batch, micro-batches on a rank). Raises ValueError."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro, accumulation = (v[name] for name in names)
    if batch is None and micro is None:
        raise ValueError("train_batch_size: is missing, and train_micro_batch_size_per_gpu too; give one of the two")
    if batch is None:
        batch = micro * (accumulation or 1) * world
    if micro is None:
        micro = batch // ((accumulation or 1) * world)
    if accumulation is None:
        accumulation = batch // (micro * world) if micro else 0
    if batch != micro * accumulation * world:
        said_of = ", ".join(f"{name} {v[name]}" for name in names if v[name] is not None)
        raise ValueError(f"{said_of}: on {world} ranks a step is micro-batch x accumulation x ranks; give two of the "
                         "three that agree")
    return batch, micro, accumulation


def _conflicts(v: Values, world: int) -> Iterator[str]:
    """What is wrong between keys."""
    if v["fp16.enabled"] and v["bf16.enabled"]:
        yield "bf16.enabled: so is fp16.enabled; keep one"
    wanted = next((kind for kind in ("fp16", "bf16") if v[f"{kind}.enabled"]), "fp32")
    dtype = v["data_types.param_dtype"]
    if dtype and SHORT.get(dtype.lower(), dtype.lower()) != wanted:
        yield f"data_types.param_dtype: is {dtype}, but weights are {wanted}; leave it out, or set {dtype}.enabled"
    if v["data_parallel_size"] not in (None, world):
        yield f"data_parallel_size: is {v['data_parallel_size']}, but there are {world} ranks; leave it out"
    shard = v["zero_optimization.mics_shard_size"]
    if shard != -1 and (shard < 1 or world % shard):
        yield f"zero_optimization.mics_shard_size: is {shard}, which does not divide {world} ranks; write -1"
    if v["fp16.min_loss_scale"] == 0:
        yield "fp16.min_loss_scale: is 0; write a number greater than 0"


def _homes(v: Values, cuda: bool) -> Iterator[str]:
    for block in ("offload_param", "offload_optimizer"):
        device = v[f"zero_optimization.{block}.device"]
        if cuda and device != "none":
            yield f"zero_optimization.{block}.device: is {device}, and this rank computes on CUDA: that comes later; " \
                  'write "none"'


def _folder(v: Values, block: str) -> Path | None:
    return Path(v[f"{block}.output_path"], v[f"{block}.job_name"]) if v[f"{block}.enabled"] else None


def _scale(v: Values) -> LossScale:
    constant = not v["fp16.enabled"] or v["fp16.loss_scale"] > 0
    value = 1.0 if not v["fp16.enabled"] else v["fp16.loss_scale"] or 2.0 ** v["fp16.initial_scale_power"]
    return LossScale(float(value), float(v["fp16.min_loss_scale"]), v["fp16.loss_scale_window"], v["fp16.hysteresis"],
                     constant)


def _params(v: Values, block: str) -> dict[str, Any]:
    prefix = f"{block}.params."
    return {path.removeprefix(prefix): value for path, value in v.items() if path.startswith(prefix)}


PLAIN = {"sgd": "lr momentum weight_decay nesterov", "lion": "lr betas weight_decay",
         "adafactor": "lr beta2_decay eps d weight_decay",
         "muon": "lr muon_lr adam_lr momentum betas eps weight_decay",
         "lamb": "lr betas eps weight_decay bias_correction max_coeff min_coeff"}


def _optimizer(v: Values) -> tuple[str, dict[str, Any]] | None:
    """A rule and its options in torch's words."""
    kind, p = str(v["optimizer.type"]).lower(), _params(v, "optimizer")
    if kind in PLAIN:
        return kind, {key: tuple(p[key]) if isinstance(p[key], list) else p[key] for key in PLAIN[kind].split()}
    if kind not in ("adam", "adamw"):
        return None
    decoupled = kind == "adamw" or p["adam_w_mode"]
    decay = 0.01 if p["torch_adam"] and decoupled else 0.0
    return "adam", {"lr": p["lr"], "betas": tuple(p["betas"]), "eps": p["eps"], "decoupled_weight_decay": decoupled,
                    "weight_decay": decay if p["weight_decay"] is None else p["weight_decay"]}


def _schedule(v: Values) -> tuple[str, Values] | None:
    kinds = {kind.lower(): kind for key in TABLE if key.path == "scheduler.type" for kind in key.form.split("|")}
    kind = kinds.get(str(v["scheduler.type"]).lower())
    return None if kind is None else (kind, _params(v, "scheduler"))


def _told(given: Mapping[str, Any], judged: Judged) -> Iterator[str]:
    v = judged.values
    if given.get("gradient_clipping") is None:
        yield "gradient_clipping is 1.0, the default, as in DeepSpeed 0.19.8; 0 turns it off"
    if (lr := v.get("optimizer.params.lr")) is not None and "lr" not in (given["optimizer"].get("params") or {}):
        yield f"optimizer.params.lr is {lr:g}, the default"
    home = [block for block in ("offload_param", "offload_optimizer")
            if v[f"zero_optimization.{block}.device"] != "none"]
    if home:
        yield f"{', '.join(home)} on cpu: things are there already"
    if judged.idle:
        yield "without effect here: " + "; ".join(f"{', '.join(paths)} ({why})" for why, paths in judged.idle.items())
