"""A model family of Hugging Face as values that are read in both directions.

    Field   a key of config.json              <->  a field of Architecture
    Facet   several keys that belong together <->  several fields: rotary positions, kinds of layers
    Row     one tensor of theirs              <->  one or several of ours, stacked along dimension 0, as wholes
                                                   or head by head, then transposed if it says so

Whether a family can express an architecture is not written down but tried: Architecture -> config.json -> Architecture
must give the same, and the rows must cover the weights. Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from megazero.base import UserError, faults, said
from megazero.plan.architecture import FREE, Architecture, units
from megazero.plan.words import ARCHITECTURE, FIELDS, impossible, told_apart

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
    """`{}` is the number of the layer. A row is there if Architecture has what `when` names, or always. `dealt`: a size
    of Architecture; ours are cut into so many parts, and the first parts of all come before the second ones."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    when: str = ""
    dealt: str = ""

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
    try:
        back = expressed(to_config(a, family), family)
    except UserError as error:                                  # a number that config.json cannot say
        return [sentence.removeprefix("config.json: ").rstrip(".") for sentence in error.sentences]
    back = replace(back, **{k: getattr(a, k) for k, v in vars(back).items() if k.endswith("bias") and v})
    if different := told_apart(a, back):
        return [f"{mine}, {family.model_type} has {theirs}" for mine, theirs in different]
    assert replace(back, **{k: getattr(a, k) for k in FREE}) == a, "flags tell the two apart, or they are one"
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
