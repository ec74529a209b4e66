"""A step as the run log's columns: from the ledger's tensors, on the writer's thread."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from unclamp.formats import Format
from unclamp.nn.layout import Site
from unclamp.nn.update import Update
from unclamp.numerics.inspection import (
    CHANGE_PRODUCT,
    CHANGE_SQUARE,
    CLAMP_PRICE,
    ERROR_SQUARE,
    EXPONENTS,
    GRADIENT_SQUARE,
    GRADIENTS,
    INSPECTED,
    INSPECTED_SQUARE,
    LOWEST_EXPONENT,
    LOWEST_QUARTER_EXPONENT,
    MAGNITUDES,
    PRICES,
    QUARTER_BITS,
    QUARTERS,
    REST_BITS,
    RESTS,
    ROUNDING_PRICE,
    ROUNDINGS,
    ROW_SQNR,
    range_used,
    row_median_db,
)
from unclamp.numerics.stats import Stat, merge_stats
from unclamp.runlog import Columns
from unclamp.runlog.looks import QUARTERED_OCTAVES
from unclamp.totals import GradientChange, clamp_error, headroom_bits, scaled_amax

Number = float | int | Tensor

INSPECTED_COLUMNS = (
    "sqnr_db",
    "sqnr_row_median_db",
    "range_used",
    "headroom_bits",
    "scale_age",
    "exponents",
    "quarters",
)
GRADIENT_COLUMNS = ("grad_error", "grad_cosine", "grad_ratio", "weight_grad_norm")
PRICE_COLUMNS = ("price_clamp", "price_rounding")
UNNUMBERED = -1
"""Stands for the id of a site that the log does not hold, since its module left the model."""
COUNTS = (Stat.ELEMENTS, Stat.SATURATED, Stat.UNDERFLOWED, Stat.NONFINITE, Stat.RECAST)


def step_columns(
    step: int, values: Mapping[str, Number], timing: Columns, group: str | None = None
) -> dict[str, Any]:
    """Return the row of a step; this is where a loss on a device is waited for."""
    numbers = {name: float(value) for name, value in values.items()}
    known = {name: [numbers.pop(name, None)] for name in ("loss", "grad_norm", "lr")}
    return {"step": [step], **known, **timing, "scalars": [list(numbers.items())],
            "group": [group]}  # fmt: skip


def site_columns(
    sites: Sequence[Site],
    ids: Sequence[int],
    *,
    repeated: Collection[int] = (),
    only_counted: Collection[int] = (),
) -> dict[str, Any]:
    """Return the rows of sites.

    Args:
        sites: The sites.
        ids: Of each.
        repeated: Ids of those whose tensor a lower rank casts as well.
        only_counted: Ids of those from whose casts nothing is computed.
    """
    scalings = [site.operand.scaling for site in sites]
    return {
        "site": list(ids),
        "fqn": [site.fqn for site in sites],
        "role": [site.role for site in sites],
        "format": [site.operand.format.name for site in sites],
        "scaling": [scaling.kind for scaling in scalings],
        "history_len": [s.history_len for s in scalings],
        "granularity": [str(s.granularity) for s in scalings],
        "format_max": [site.operand.format.max for site in sites],
        "replicated": [number in repeated for number in ids],
        "only_counted": [number in only_counted for number in ids],
    }


def merged_update(so_far: Update | None, update: Update) -> Update:
    """Return an update with a later one of the same step merged in, in its own tensors."""
    if so_far is None or len(so_far.stats) != len(update.stats):  # another layout starts anew
        return update
    merge_stats(so_far.stats, update.stats)
    if so_far.details is None:
        return update._replace(stats=so_far.stats)
    if update.details is not None:
        so_far.details.add_(update.details)
    return so_far


def cast_columns(
    step: int,
    updates: list[tuple[list[int], Update]],
    formats: Mapping[int, Format],
    *,
    loss_scale: float = 1.0,
) -> dict[str, Any]:
    """Return the rows of one step: a row a site that has an id and cast anything.

    Args:
        step: Its number.
        updates: Of each ledger, with the ids of its sites, or `UNNUMBERED`.
        formats: The format of each site.
        loss_scale: What the loss was multiplied by before its backward.
    """
    parts = [_part(ids, update, formats, loss_scale) for ids, update in updates]
    columns: dict[str, Any] = {"step": np.full(sum(len(p["site"]) for p in parts), step)}
    for name in parts[0]:
        values = [part[name] for part in parts]
        is_array = isinstance(values[0], np.ndarray)
        columns[name] = np.concatenate(values) if is_array else list(itertools.chain(*values))
    return columns


def _part(
    ids: list[int], update: Update, formats: Mapping[int, Format], loss_scale: float
) -> dict[str, Any]:
    """Return the rows of one ledger."""
    table = update.stats.cpu().numpy()
    numbers = np.asarray(ids, np.int32)
    rows = np.flatnonzero((table[:, Stat.CASTS] > 0) & (numbers != UNNUMBERED))
    table, sites = table[rows], numbers[rows]
    columns = {
        "site": sites,
        "amax": np.maximum(table[:, Stat.AMAX], 0).astype(np.float32),
        "scale": (1 / table[:, Stat.SCALE_INV]).astype(np.float32),
        **{field.name.lower(): table[:, field].astype(np.int64) for field in COUNTS},
        "saturated_error": clamp_error(table[:, Stat.SATURATED_SQUARE], table[:, Stat.SQUARE]),
        "microsteps": table[:, Stat.CASTS].astype(np.int32),
    }
    columns["clamped"] = columns["saturated"] > 0
    looks: list[dict[str, Any]] = [{}] * len(rows)
    if update.details is not None and update.scale_age is not None:
        details, ages = update.details.cpu().numpy()[rows], update.scale_age.cpu().numpy()[rows]
        # The tensor's own scale, taken by a guarded cast, is as new as can be.
        ages = np.where(columns["recast"] > 0, 0, ages)
        looks = [
            (
                _look(details[i], int(ages[i]), formats[int(sites[i])], columns, i)
                if details[i, INSPECTED]
                else {}
            )
            | _gradient(details[i])
            | _price(details[i], loss_scale)
            for i in range(len(rows))
        ]
    names = (*INSPECTED_COLUMNS, *GRADIENT_COLUMNS, *PRICE_COLUMNS)
    return columns | {name: [look.get(name) for look in looks] for name in names}


def _look(
    details: np.ndarray, age: int, fmt: Format, columns: Mapping[str, np.ndarray], row: int
) -> dict[str, Any]:
    """Return the columns of an inspected row that have a value."""
    counts = details[EXPONENTS]
    present = np.flatnonzero(counts)
    look: dict[str, Any] = {
        "range_used": float(range_used(details[MAGNITUDES], fmt)),
        "exponents": [(int(i) + LOWEST_EXPONENT, int(counts[i])) for i in present],
    }
    if len(present):
        look["quarters"] = _quarters(details, int(present[-1]) + LOWEST_EXPONENT)
    if details[INSPECTED_SQUARE] > 0:
        look["sqnr_row_median_db"] = row_median_db(details[ROW_SQNR])
        look["sqnr_db"] = _decibel(details[INSPECTED_SQUARE], details[ERROR_SQUARE])
    scaled = scaled_amax(float(columns["amax"][row]), float(columns["scale"][row]))
    if scaled > 0:
        look["headroom_bits"] = headroom_bits(scaled, fmt.max)
    if age >= 0:
        look["scale_age"] = age
    return look


def _quarters(details: np.ndarray, highest: int) -> list[tuple[int, tuple[int, float]]] | None:
    """Return the quarters of the highest octaves: key to elements and their mean."""
    first = (highest - QUARTERED_OCTAVES + 1 - LOWEST_QUARTER_EXPONENT) << QUARTER_BITS
    last = first + (QUARTERED_OCTAVES << QUARTER_BITS)
    counts, rests = details[QUARTERS], details[RESTS]
    if first < 0 or last > len(counts):
        return None
    bins = first + np.flatnonzero(counts[first:last])
    keys = bins + (LOWEST_QUARTER_EXPONENT << QUARTER_BITS)
    octave, quarter = keys >> QUARTER_BITS, keys & ((1 << QUARTER_BITS) - 1)
    within = quarter + rests[bins] / counts[bins] / (1 << REST_BITS)
    means = np.ldexp(1 + within / (1 << QUARTER_BITS), octave)
    pairs = zip(counts[bins].astype(int).tolist(), means.tolist(), strict=True)
    return list(zip(keys.tolist(), pairs, strict=True))


def _gradient(details: np.ndarray) -> dict[str, float]:
    """Return the columns that tell what clamping did to a weight's gradient, where it is known."""
    if not details[GRADIENTS]:
        return {}
    change = GradientChange.of(
        computed=float(details[GRADIENT_SQUARE]),
        change=float(details[CHANGE_SQUARE]),
        product=float(details[CHANGE_PRODUCT]),
    )
    if not change.is_known:
        return {}
    look = {
        "grad_error": change.error,
        "grad_cosine": change.cosine,
        "grad_ratio": change.ratio,
    }
    return look if change.is_nothing else look | {"weight_grad_norm": change.norm}


def _price(details: np.ndarray, loss_scale: float) -> dict[str, float]:
    """Return the columns that tell what casts changed of the loss, where it is known."""
    if not details[PRICES] or not loss_scale > 0:
        return {}
    found = {"price_clamp": float(details[CLAMP_PRICE]) / loss_scale}
    if details[ROUNDINGS] == details[PRICES]:
        found["price_rounding"] = float(details[ROUNDING_PRICE]) / loss_scale
    return {name: price for name, price in found.items() if math.isfinite(price)}


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
