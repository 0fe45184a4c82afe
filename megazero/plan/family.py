"""A model family of Hugging Face as values that are read in both directions.

    Field   a key of config.json              <->  a field of Architecture
    Facet   several keys that belong together <->  several fields: rotary positions, kinds of layers
    Row     one tensor of theirs              <->  one or several of ours, stacked along dimension 0,
                                                   then transposed if it says so

Whether a family can express an architecture is not written down but tried: Architecture -> config.json -> Architecture
must give the same, and the rows must cover the weights. Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from megazero.base import Form, UserError, faults, said
from megazero.plan.architecture import FREE, Architecture, units
from megazero.plan.rope import SCALINGS, Dynamic, Rotary
from megazero.plan.words import ARCHITECTURE, FIELDS, SIZE, alike, impossible, local_base, scaling_from, stretches

REQUIRED = object()                     # a key that config.json must have
Values = Mapping[str, Any]
Errors = list[str]


class Field(NamedTuple):
    """`default` stands where the key is absent (of other fields, if a function), `null` where it is null: by default
    the same; `words` are theirs -> ours, if they differ."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    words: Mapping[Any, Any] | None = None
    null: Any = REQUIRED

    def read(self, config: Values, values: Values, errors: Errors) -> dict[str, Any]:
        """Of ours, checked; appends what is wrong with it."""
        value = config.get(self.theirs)
        if value is None:
            value = self.default if self.null is REQUIRED or self.theirs not in config else self.null
            value = value(values) if callable(value) else value
        if value is REQUIRED:
            errors.append(f"{self.theirs} is missing")
            return {self.ours: 1}
        if self.words is not None:
            if not isinstance(value, str) or value not in self.words:
                errors.append(f"{self.theirs} {word(value)} is not known here; there are {', '.join(self.words)}")
                return {self.ours: value}
            return {self.ours: self.words[value]}
        wrong = list(faults(value, FIELDS[self.ours], self.theirs))
        errors += wrong
        return {self.ours: 1 if wrong else float(value) if FIELDS[self.ours] is float else value}

    def write(self, a: Architecture) -> dict[str, Any]:
        """Of theirs; nothing where they have no word for it."""
        value = getattr(a, self.ours)
        if self.words is not None:
            return next(({self.theirs: theirs} for theirs, ours in self.words.items() if ours == value), {})
        return {self.theirs: None if self.null is not REQUIRED and value == self.null else value}


class Facet(NamedTuple):
    """Several keys of theirs that say several fields of ours. `read` takes config.json and the fields that were read
    before, and appends what is wrong; `write` gives theirs."""

    read: Callable[[Values, Values, Errors], dict[str, Any]]
    write: Callable[[Architecture], dict[str, Any]]


def follows(ours: str, of: Callable[[Values], Any]) -> Facet:
    """A field of ours that they have no key for: it follows from those before it."""
    return Facet(lambda config, values, errors: {ours: of(values)}, lambda a: {})


class Row(NamedTuple):
    """`{}` is the number of the layer. A row is there if Architecture has what `when` names, or always."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    when: str = ""

    def of(self, layer: int) -> "Row":
        return self._replace(theirs=self.theirs.format(layer), ours=tuple(n.format(layer) for n in self.ours))


@dataclass(frozen=True)
class Family:
    """
    fields      what config.json says; each may look at those before it
    fixed       fields of ours that it has no key for
    only        keys of theirs that must have this value where they are given
    always      keys that an export writes as they are here
    """

    model_type: str
    class_name: str
    base: str                           # prefix that checkpoints of the bare model, without a head, leave out
    fields: tuple[Field | Facet, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any]
    rows: tuple[Row, ...]
    buffers: str                        # pattern of tensors that are no weights: older files hold some
    always: Mapping[str, Any]


def word(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 40 else said(value)


# ---- rotary positions

ROPE: Form = {"rope_theta?": float, "rope_type?": str, "type?": str}
NESTED = ("full_attention", "sliding_attention")            # where layers turn in two ways


@dataclass(frozen=True)
class Rope:
    """How a family says its rotary positions. transformers reads `rope_parameters` from version 5 on, `theta` and
    rope_scaling before; both are written, and what is read in both must be the same.

    base        where the key is absent
    part        key of the part of each head that turns, and that part where it is absent; "": heads turn as a whole
    local       key of the base of local layers, and that base where it is absent (0: that of the others); they are
                never scaled. "" with `nested`: they have no key of their own
    nested      has rope_parameters an entry for each kind of layer?
    """

    theta: str = "rope_theta"
    base: float = 10000.0
    part: str = ""
    turns: float = 1.0
    local: str = ""
    local_base: float = 0.0
    nested: bool = False

    def read(self, config: Values, values: Values, errors: Errors) -> dict[str, Any]:
        width = values["head_dim"]
        told, near, wrong = self._told(config)
        base = told.get("rope_theta", self.base)
        wrong = wrong or list(faults(base, float, self.theta))
        kind, scaling = told.get("rope_type", told.get("type", "default")), None
        part = told.get("partial_rotary_factor", config.get(self.part or "partial_rotary_factor"))
        part = self.turns if part is None else part
        if not isinstance(part, int | float) or not 0 < part <= 1 or (part != 1 and not self.part):
            wrong.append(f"partial_rotary_factor: is {said(part)}, this decoder has 1.0; "
                         "such a model cannot be imported")
        if kind != "default" and kind not in SCALINGS:
            wrong.append(f"rope_parameters: rope_type {word(kind)} is not known here; there are default, "
                         f"{', '.join(SCALINGS)}")
        elif kind != "default" and not wrong:
            scaling = self._scaling(kind, told, config, values, wrong)
        errors += wrong
        if wrong:
            return {"rotary": Rotary(1.0, width)}
        rotary = Rotary(float(base), int(width * part), scaling)
        return {"rotary": rotary, "local_base": self._near(near, told, rotary, config, errors) if self.nested else 0.0}

    def _told(self, config: Values) -> tuple[dict[str, Any], dict[str, Any], Errors]:
        """What both forms say of layers, of local ones where they differ, and what is wrong."""
        forms = (None, dict.fromkeys(map("{}?".format, NESTED), (None, ROPE)) if self.nested else ROPE)
        wrong = list(faults(config, {"rope_scaling?": (None, ROPE), "rope_parameters?": forms,
                                     f"{self.theta}?": (None, float)}))
        if wrong:
            return {}, {}, wrong
        old, new, near = config.get("rope_scaling") or {}, dict(config.get("rope_parameters") or {}), dict[str, Any]()
        if self.nested:
            wrong += [f"rope_parameters: has {word(key)} beside {', '.join(NESTED)}"
                      for key in new if new.keys() & set(NESTED) and key not in NESTED]
            near = new.get(NESTED[1]) or {}
            new = (new.get(NESTED[0]) or {}) if new.keys() & set(NESTED) else new
        theta = {"rope_theta": config[self.theta]} if config.get(self.theta) is not None else {}
        old = {"rope_type": old.get("type", "default"), **old, **theta} if old else theta
        wrong += [f"rope_parameters: {key} is {said(new[key])}, elsewhere {said(old[key])}; let both say the same"
                  for key in new.keys() & old.keys() - {"type"} if old[key] != new[key]]
        return {**old, **new}, near, wrong

    def _scaling(self, kind: str, told: Values, config: Values, values: Values, wrong: Errors) -> Any:
        """As transformers reads it: the original length is that of the model where it is not said."""
        here = SCALINGS[kind]
        length = config.get("original_max_position_embeddings", values["seq_length"])
        told = {"original_max_position_embeddings": length, **told, "rope_type": kind}
        if here is Dynamic and told["original_max_position_embeddings"] != values["seq_length"]:
            wrong.append(f"rope_parameters: original_max_position_embeddings is "
                         f"{said(told['original_max_position_embeddings'])}, but a dynamic rope counts from "
                         f"max_position_embeddings {values['seq_length']}")
        given = {f.name: told[f.name] for f in fields(here) if told.get(f.name) is not None}
        try:
            scaling = scaling_from(given, "rope_parameters")
        except ValueError as error:
            wrong.append(str(error))
            return None
        if not stretches(scaling):
            wrong.append(f"rope_parameters: the numbers of {kind} must be above 0, the higher one above the lower")
        return replace(scaling, factor=float(scaling.factor))

    def _near(self, near: Values, told: Values, rotary: Rotary, config: Values, errors: Errors) -> float:
        """The base of local layers, 0 where they turn as the others."""
        fallback = config.get(self.local) if self.local else None
        base = near.get("rope_theta", self.local_base or rotary.base if fallback is None else fallback)
        if wrong := list(faults(base, float, self.local or "rope_parameters.sliding_attention.rope_theta")):
            errors += wrong
            return 0.0
        if near.get("rope_type", "default") != "default":
            if near != {key: told.get(key) for key in near}:
                errors.append("rope_parameters: sliding_attention is stretched, and not as full_attention is")
            return 0.0
        return local_base(float(base), rotary)

    def write(self, a: Architecture) -> dict[str, Any]:
        rotary = a.rotary or Rotary(self.base, a.head_dim)
        part = {"partial_rotary_factor": rotary.channels / a.head_dim} if self.part else {}
        scaling = {} if rotary.scaling is None else {
            f.name: getattr(rotary.scaling, f.name) for f in fields(rotary.scaling)
            if f.name == "rope_type" or getattr(rotary.scaling, f.name) != f.default}
        length = {"max_position_embeddings": rotary.scaling.original_max_position_embeddings} if isinstance(
            rotary.scaling, Dynamic) else {}
        turned = {"rope_theta": rotary.base, **(scaling or {"rope_type": "default"}), **part}
        near = {"rope_theta": a.local_base, "rope_type": "default", **part} if a.local_base else turned
        return {self.theta: rotary.base, "rope_scaling": scaling or None, **length,
                **({self.part: part["partial_rotary_factor"]} if self.part else {}),
                **({self.local: near["rope_theta"]} if self.local else {}),
                "rope_parameters": dict(zip(NESTED, (turned, near), strict=True)) if self.nested else turned}

    @property
    def facet(self) -> Facet:
        return Facet(self.read, self.write)


# ---- kinds of layers

LAYER_TYPES = {"full_attention": "full", "sliding_attention": "local"}


def window_of(config: Values, default: int | None, errors: Errors) -> int:
    """Tokens that each sees; 0 for all."""
    window = config.get("sliding_window", default)
    errors += faults(window, (None, SIZE), "sliding_window")
    return window or 0


def layer_types(config: Values, layers: int, plain: Callable[[int], bool], errors: Errors) -> list[str]:
    """A word of KINDS for each layer; `plain`: has a layer a window where nothing is said?"""
    told = config.get("layer_types")
    if told is None:
        return ["local" if plain(i) else "full" for i in range(layers)]
    wrong = list(faults(told, [str], "layer_types"))
    strange = [] if wrong else [name for name in told if name not in LAYER_TYPES]
    if strange:
        wrong = [f"layer_types: {word(strange[0])} is not known here; there are {', '.join(LAYER_TYPES)}"]
    elif not wrong and len(told) != layers:
        wrong = [f"layer_types: names {len(told)} layers of {layers}"]
    errors += wrong
    return ["local"] * layers if wrong else [LAYER_TYPES[name] for name in told]


def types_of(a: Architecture) -> list[str]:
    """Of an architecture, in their words."""
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return [names[(a.kinds[i] if a.kinds else "local").removesuffix("-nope")] for i in range(a.layers)]


def alternating(period: int, default: int) -> Facet:
    """Of each `period` layers the last sees all, where layer_types does not say it; windows of `default` where nothing
    does."""

    def read(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
        window, each = window_of(config, default, errors), config.get("sliding_window_pattern", period)
        errors += faults(each, SIZE, "sliding_window_pattern")
        each = each if isinstance(each, int) and each > 0 else period
        kinds = layer_types(config, values["layers"], lambda i: (i + 1) % each != 0, errors)
        return {"window": window, "kinds": alike(kinds if window or values.get("local_base") else [])}

    return Facet(read, lambda a: {"sliding_window": a.window or None, "layer_types": types_of(a)})


def _upper_read(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
    window, first = window_of(config, 4096, errors), config.get("max_window_layers", 28)
    errors += faults(first, range(2**31), "max_window_layers")
    if not config.get("use_sliding_window", False) or not window:
        return {"window": 0, "kinds": ()}
    kinds = layer_types(config, values["layers"], lambda i: not isinstance(first, int) or i >= first, errors)
    return {"window": window if "local" in kinds else 0, "kinds": alike(kinds if "local" in kinds else [])}


def _upper_write(a: Architecture) -> dict[str, Any]:
    if not a.window:
        return {"use_sliding_window": False, "sliding_window": None}
    types = types_of(a)
    return {"use_sliding_window": True, "sliding_window": a.window, "layer_types": types,
            "max_window_layers": next(i for i, name in enumerate([*types, "sliding_attention"]) if name != types[0]
                                      or name == "sliding_attention")}


UPPER = Facet(_upper_read, _upper_write)                    # the upper layers see a window


# ---- config.json

def to_config(a: Architecture, family: Family) -> dict[str, Any]:
    """The config.json of an architecture. A value that the family has no word for is left out: `obstacles` finds it.
    A bias that stands for several is there if one of them is."""
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    for field in family.fields:
        config |= {k: config.get(k) or v if isinstance(v, bool) else v for k, v in field.write(a).items()}
    return {**config, **family.always}


def expressed(config: Values, family: Family) -> Architecture:
    """The architecture that a config.json of this family describes, of numbers that may not go together. Raises
    UserError."""
    errors = [f"{key} is {said(config[key])}, this decoder has {'none' if v is None else v}; such a model cannot be "
              "imported" for key, v in family.only.items() if config.get(key, v) not in (v, None)]
    values: dict[str, Any] = {"pad_rows": 128, **family.fixed}
    for field in family.fields:
        for ours, value in field.read(config, values, errors).items():
            if values.setdefault(ours, value) != value:
                errors.append(f"{getattr(field, 'theirs', ours)} is {value} where another key that means the same here "
                              f"says {values[ours]}; make them equal")
    if errors:
        raise UserError(*(f"config.json: {error}." for error in errors))
    return Architecture(**values)


def possible(a: Architecture) -> Architecture:
    """An architecture that was read, if its numbers go together. Raises UserError."""
    plain = {**asdict(a), "rotary": None, "kinds": list(a.kinds)}
    if wrong := [*faults(plain, ARCHITECTURE), *impossible(a)]:
        raise UserError(f"config.json: is a model that cannot be: {'; '.join(wrong)}.")
    return a


# ---- which rows, and do they cover the weights

def rows(a: Architecture, family: Family) -> list[Row]:
    """The family's rows for this architecture, with the biases that config.json says: those without a layer, then layer
    by layer."""
    there = expressed(to_config(a, family), family)
    mine = [r for r in family.rows if not r.when or (not there.tied if r.when == "untied" else getattr(there, r.when))]
    single, layered = [r for r in mine if "{}" not in r.theirs], [r for r in mine if "{}" in r.theirs]
    return [*single, *(r.of(i) for i in range(a.layers) for r in layered)]


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """name -> shape of every weight."""
    return {p.name: p.shape for u in units(a) for p in u.parameters}


def zeros(name: str, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a bias that the family has and the model has not: it is zero there. None: no such bias."""
    return ours[name.replace(".bias", ".weight")][:1] if name.endswith(".bias") and name not in ours else None


def obstacles(a: Architecture, family: Family) -> list[str]:
    """What keeps this family from expressing this architecture exactly;
    biases it has beyond the model's are no obstacle."""
    back, told = expressed(to_config(a, family), family), vars(a)
    different = [f"{k.replace('_', ' ')} is {_shown(told[k])}, {family.model_type} has {_shown(v)}"
                 for k, v in vars(back).items() if k not in FREE and told[k] != v and not (k.endswith("bias") and v)]
    if different:
        return different
    ours = shapes(one := single(a))
    theirs = [name for row in rows(one, family) for name in row.ours]
    homeless = [f"{family.model_type} has no place for {n}" for n in ours if n not in theirs]
    missing = [f"{family.model_type} needs {n}" for n in theirs if n not in ours and zeros(n, ours) is None]
    return [*homeless[:1], *missing[:1]]


def single(a: Architecture) -> Architecture:
    """Its first layer alone: the weights of one are called like those of the others."""
    return replace(a, layers=1, kinds=a.kinds[:1])


def beyond(a: Architecture, family: Family) -> int:
    """How many biases the family has beyond the model's, in a layer."""
    ours = shapes(single(a))
    return sum(n not in ours for row in rows(single(a), family) for n in row.ours)


def _shown(value: Any) -> str:
    if isinstance(value, Rotary):
        stretched = f", {value.scaling.rope_type} by {value.scaling.factor:g}" if value.scaling else ""
        return f"{value.channels} channels on base {value.base:g}{stretched}"
    return " ".join(value) or "local" if isinstance(value, tuple) else str(value)
