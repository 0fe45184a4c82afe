"""What several keys of a config.json say together, in both directions: rotary positions, kinds of layers, multipliers.
Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

from megazero.base import Form, faults, said
from megazero.plan.architecture import Architecture
from megazero.plan.family import Errors, Facet, Field, Values, word
from megazero.plan.rope import SCALINGS, Dynamic, Rotary
from megazero.plan.words import SIZE, alike, local_base, scaling_from, stretches, usual_scale

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
    scalings    those that it knows
    """

    theta: str = "rope_theta"
    base: float = 10000.0
    part: str = ""
    turns: float = 1.0
    local: str = ""
    local_base: float = 0.0
    nested: bool = False
    scalings: tuple[str, ...] = tuple(SCALINGS)

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
        if kind not in ("default", *self.scalings):
            wrong.append(f"rope_parameters: rope_type {word(kind)} is not known here; there are "
                         f"{', '.join(('default', *self.scalings))}")
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
        old, new, near = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}, dict[str, Any]()
        if nested := new.keys() & set(NESTED):
            wrong += [f"rope_parameters: has {word(key)}, which is not known here"
                      for key in (new.keys() - nested if self.nested else sorted(nested))]
            new, near = (new.get(name) or {} for name in NESTED)
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
        scaling = {} if rotary.scaling is None or rotary.scaling.rope_type not in self.scalings else {
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

LAYER_TYPES = dict(zip(NESTED, ("full", "local"), strict=True))


def window_of(config: Values, default: int | None, errors: Errors) -> int:
    """Tokens that each sees; 0 for all."""
    window = config.get("sliding_window", default)
    wrong = list(faults(window, (None, SIZE), "sliding_window"))
    errors += wrong
    return 0 if wrong or window is None else window


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
    """Of an architecture, in their words: full where local layers are as all others."""
    full, local = NESTED
    return [local if kind.startswith("local") and (a.window or a.local_base) else full
            for kind in a.kinds or ("local",) * a.layers]


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
            "max_window_layers": len(list(takewhile("full_attention".__eq__, types)))}


UPPER = Facet(_upper_read, _upper_write)                    # the upper layers see a window


def _still_read(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
    each, turning = config.get("no_rope_layer_interval", 4), config.get("no_rope_layers")
    errors += faults(each, SIZE, "no_rope_layer_interval")
    errors += faults(turning, (None, [range(2)]), "no_rope_layers")
    layers, window = values["layers"], window_of(config, None, errors)
    if turning is not None and not (isinstance(turning, list) and len(turning) >= layers):
        errors.append(f"no_rope_layers: is {said(turning)}, not a list of 0 and 1 for each of {layers} layers")
    if errors:
        return {"window": 0, "kinds": ()}
    turns = [bool(turning[i] if turning is not None else (i + 1) % each) for i in range(layers)]
    window = window if config.get("use_sliding_window", False) else 0
    types = layer_types(config, layers, lambda i: not turns[i], errors) if window else ["local"] * layers
    return {"window": window, "kinds": alike([kind + ("" if turn else "-nope")
                                              for kind, turn in zip(types, turns, strict=True)])}


def _still_write(a: Architecture) -> dict[str, Any]:
    kinds = a.kinds or ("local",) * a.layers
    return {"no_rope_layers": [int(not kind.endswith("nope")) for kind in kinds], "sliding_window": a.window or None,
            "use_sliding_window": bool(a.window), "layer_types": types_of(a)}


STILL = Facet(_still_read, _still_write)                    # some layers turn nothing


def _same_width(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
    width = config.get("word_embed_proj_dim", values["hidden"])
    errors += [] if width == values["hidden"] else [
        f"word_embed_proj_dim is {said(width)}, this decoder has hidden_size {values['hidden']}; such a model cannot "
        "be imported"]
    return {}


SAME_WIDTH = Facet(_same_width, lambda a: {"word_embed_proj_dim": a.hidden})        # embeddings as wide as layers


# ---- what is multiplied

def _scalar_read(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
    scalar = config.get("query_pre_attn_scalar", 256)
    wrong = list(faults(scalar, float, "query_pre_attn_scalar")) or (
        [] if scalar > 0 else [f"query_pre_attn_scalar: is {said(scalar)}, not above 0"])
    errors += wrong
    return {"attention_multiplier": 0.0 if wrong else usual_scale(scalar**-0.5, values["head_dim"])}


def _multiplier_read(config: Values, values: Values, errors: Errors) -> dict[str, Any]:
    (found,) = Field("attention_multiplier", "attention_multiplier", 1.0).read(config, values, errors).values()
    return {"attention_multiplier": usual_scale(float(found), values["head_dim"])}


# scores x multiplier
MULTIPLIER = Facet(_multiplier_read, lambda a: {"attention_multiplier": a.attention_multiplier or a.head_dim**-0.5})


def _scalar_write(a: Architecture) -> dict[str, Any]:
    scalar = 1 / a.attention_multiplier / a.attention_multiplier if a.attention_multiplier else a.head_dim
    return {"query_pre_attn_scalar": round(scalar) if scalar < 2**31 else scalar}


SCALAR = Facet(_scalar_read, _scalar_write)                 # scores / sqrt(scalar)
