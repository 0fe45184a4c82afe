"""How many layers each stage of a pipeline has: as even as can be, as written, or by Megatron's rule. Pure."""

import re


def shares(layers: int, stages: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers of each stage: what `first` and `last` leave is shared as evenly as can be."""
    fixed = {0: first, stages - 1: last} if stages > 1 else {}
    free = [s for s in range(stages) if fixed.get(s) is None]
    rest = layers - sum(n for n in fixed.values() if n is not None)
    even = {s: rest * (i + 1) // len(free) - rest * i // len(free) for i, s in enumerate(free)}
    return tuple(even[s] if s in even else int(fixed[s] or 0) for s in range(stages))


def from_layout(text: str) -> tuple[int, ...]:
    """Layers of each stage of a layout in Megatron's words: E embedding, t layer, L loss, | between stages, *n repeats
    a letter or what is in brackets. Raises ValueError with what is wrong."""
    plain = re.sub(r"[\s,]", "", text)
    while plain != (once := re.sub(r"(\w)\*(\d+)|\(([^()]*)\)\*(\d+)",
                                   lambda m: (m[1] or m[3]) * int(m[2] or m[4]), plain)):
        plain = once
    stages = plain.split("|")
    if re.search(r"[^EtL|]", plain):
        raise ValueError("holds something else than E, t, L, |, * and brackets")
    if not (plain.startswith("E") and plain.endswith("L") and plain.count("E") == plain.count("L") == 1):
        raise ValueError("must begin with the one E and end with the one L")
    if not all(stages):
        raise ValueError("has a stage with nothing in it")
    return tuple(stage.count("t") for stage in stages)


def ends_as_layers(layers: int, stages: int, embedding: int, loss: int) -> tuple[int, ...]:
    """Megatron's rule: embedding and loss count as so many layers (0 or 1) of the first and the last stage, and every
    stage has as many. Raises ValueError with what is wrong."""
    each, over = divmod(layers + embedding + loss, stages)
    if over:
        counted = " and ".join([f"{layers} layers", *["the embedding"] * embedding, *["the loss"] * loss])
        raise ValueError(f"{counted} are {layers + embedding + loss} in all, which {stages} stages cannot share evenly")
    return tuple(each - embedding * (s == 0) - loss * (s == stages - 1) for s in range(stages))
