"""Policies as a user writes them: `delayed(history_len=1024, margin=1)`, and grids of them."""

import re
from collections.abc import Sequence
from dataclasses import fields

from unclamp.errors import RecipeError
from unclamp.formats import unknown_name
from unclamp.scaling import (
    SCALINGS,
    Delayed,
    Dynamic,
    Guarded,
    Scaling,
    scaling_from_dict,
)

_POLICY = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_SETTING = re.compile(r"\s*(?:(\w+)\s*=\s*)?([^,=]+?)\s*(?:,|$)")
FIRST = {"delayed": "history_len", "guarded": "history_len", "static": "scale",
         "dynamic": "granularity"}  # fmt: skip
"""The setting that a value without a name is of, as in `Delayed(16)`."""
GRID_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
GRID_MARGINS = (0, 1, 2, 3)


def parse_policy(text: str) -> Scaling:
    """Return the scaling that a text names: "dynamic", "delayed(1024)", "guarded(margin=2)".

    Raises:
        RecipeError: No such kind or setting, or a setting that makes no sense.

    Example:
        >>> parse_policy("delayed(history_len=4, margin=1)")
        Delayed(history_len=4, reduce='max', margin=1, power_of_two=False, granularity=PerTensor())
    """
    match = _POLICY.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"expected a policy such as delayed(history_len=1024), guarded or dynamic, got {text!r}"
        )
    kind, inside = match[1], match[2] or ""
    if kind not in SCALINGS:
        raise unknown_name("policy", kind, list(SCALINGS))
    settings: dict[str, object] = {}
    rest = inside.strip()
    while rest:
        setting = _SETTING.match(rest)
        if setting is None:
            raise RecipeError(
                f"expected settings such as history_len=16, margin=1 in the policy {text!r}, "
                f"got {rest!r}"
            )
        name = setting[1] or (FIRST.get(kind) if not settings else None)
        if name is None:
            raise RecipeError(f"which setting of {kind} is {setting[2]!r}? Write name=value")
        if name in settings:
            raise RecipeError(f"{name} is given twice in the policy {text!r}")
        settings[name] = _value(setting[2])
        rest = rest[setting.end() :]
    return scaling_from_dict({"scaling": kind, **settings})


def policy_text(scaling: Scaling) -> str:
    """Return a scaling as `parse_policy` reads it: "delayed(16, margin=1)".

    Settings that are their kind's defaults are left out; the length of a history never is. A
    reduce function is named, and cannot be read back.
    """
    settings = {f.name: getattr(scaling, f.name) for f in fields(scaling) if f.init}
    usual = {f.name: f.default for f in fields(scaling)}
    texts = []
    for name, value in settings.items():
        if name == FIRST.get(scaling.kind) and (name != "granularity" or value != usual[name]):
            texts.append(_shown(value))
        elif value != usual[name]:
            texts.append(f"{name}={_shown(value)}")
    return f"{scaling.kind}({', '.join(texts)})" if texts else scaling.kind


def grid() -> list[Scaling]:
    """Return about two hundred policies: kinds, lengths of history, margins, powers of two."""
    policies: list[Scaling] = [Dynamic(), Dynamic(power_of_two=True)]
    for power in (False, True):
        for margin in GRID_MARGINS:
            for length in GRID_LENGTHS:
                policies += [
                    Delayed(history_len=length, margin=margin, power_of_two=power),
                    Guarded(history_len=length, margin=margin, power_of_two=power),
                ]
    return policies


def check_policies(policies: Sequence[Scaling]) -> None:
    """Raise a RecipeError for a policy of which a log's amaxes cannot tell anything."""
    for policy in policies:
        if policy.remembers and not policy.granularity.is_whole:
            raise RecipeError(
                f"{policy_text(policy)}: a log has one amax a cast, and no history of each "
                f"{policy.granularity}; ask of a policy with a scale for the whole tensor"
            )


def _value(text: str) -> object:
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _shown(value: object) -> str:
    if callable(value):
        return str(getattr(value, "__name__", value))
    return str(value).lower() if isinstance(value, bool) else str(value)
