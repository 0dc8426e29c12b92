"""Heads by name, as the shell and saved models write them: "foreground,distance"."""

from typing import Any

from selfadapt import Binary, Categorical, Classification, Head, OutputError, OutputSpec, Scalar


def parse_heads(names: str, *, activated: bool = False) -> OutputSpec:
    """The spec of names in the order of the network's channels.

    `foreground` and `boundary` are one yes / no channel each, `distance` is one value, and
    `classes:3` is a softmax over three. `activated` networks give probabilities, not logits.

    >>> list(parse_heads("foreground, distance"))
    ['foreground', 'distance']
    """
    if not isinstance(names, str):  # a folder may say anything
        raise OutputError(f"heads={names!r} is not allowed: give names, as 'foreground,distance'.")
    heads: dict[str, Head] = {}
    for name in names.split(","):
        kind, _, count = name.strip().partition(":")
        if kind in heads:
            raise OutputError(f"head {kind!r} is named twice in {names!r}.")
        heads[kind] = _head(kind, count, logits=not activated)
    return OutputSpec(**heads)


def _head(kind: str, count: str, *, logits: bool) -> Head:
    if kind == "classes" and count.isdigit() and int(count) > 1:
        return Categorical(int(count), logits=logits)
    if kind == "distance" and not count:
        return Scalar()
    if kind in ("foreground", "boundary") and not count:
        return Binary(logits=logits)
    raise OutputError(
        f"head {f'{kind}:{count}' if count else kind!r} is not known: "
        "foreground, boundary, distance and classes:N are."
    )


def head_names(spec: OutputSpec) -> dict[str, Any] | None:
    """The options `heads` and `activated` that give this spec back; None if none do."""
    names = ",".join(
        f"{name}:{head.channels}" if name == "classes" else name for name, head in spec.items()
    )
    activated = any(isinstance(head, Classification) and not head.logits for head in spec.values())
    try:
        again = parse_heads(names, activated=activated)
    except OutputError:
        return None
    same = repr(again) == repr(spec)
    return {"heads": names, "activated": activated} if same else None
