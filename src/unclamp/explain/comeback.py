"""Why the losses of a plain replay are not the run's: where they differ, and what may be why."""

import math
from collections.abc import Mapping

from unclamp.explain.facts import differing
from unclamp.explain.replay import Replay, Trace, same_losses

_NOT_DETERMINISTIC = (
    "Two replays differ from each other: the step function is not deterministic; use "
    "torch.use_deterministic_algorithms(True), and draw random numbers only from the "
    "generators of Python, NumPy and torch."
)


def differences(replay: Replay, plain: Trace, again: Trace) -> list[str]:
    """Return what is known of losses that did not come back, a sentence each.

    Args:
        replay: Made the replays.
        plain: The first, with nothing changed.
        again: The second.
    """
    snapshot, ranks = replay.snapshot, replay.ranks
    own, own_again = plain.own or plain.losses, again.own or again.losses
    is_same = same_losses(own, snapshot.losses)
    here = "" if is_same else _first_difference(snapshot.losses, own)
    # The number of threads is the run's: a replay sets it.
    machine = differing(snapshot.facts, replay.training.model, but=("threads",))
    everyone = ranks.gathered((here, tuple(machine)))
    rank = next(rank for rank, (difference, _) in enumerate(everyone) if difference)
    told, machine = everyone[rank]
    said = [f"On rank {rank}: {told}" if ranks.are_several else told]
    if not ranks.every(same_losses(own, own_again)):
        said.append(_NOT_DETERMINISTIC)
    else:
        said.append("Two replays agree with each other, so something differs from the run.")
    if machine:
        said.append(f"What differs: {'; '.join(machine)}.")
    return said


def _first_difference(run: Mapping[int, float], replayed: Mapping[int, float]) -> str:
    for n in sorted(set(run) & set(replayed)):
        one, other = run[n], replayed[n]
        if one != other and not (math.isnan(one) and math.isnan(other)):
            change = abs(other - one)
            size = f" ({change / abs(one):.2g} of it)" if one and math.isfinite(change) else ""
            return (
                f"The loss of step {n} was {one!r} in the run and is {other!r} in the replay, "
                f"{change:.3g} off{size}."
            )
    return "No step of the replay is in the run."
