"""A snapshot that replays begin from, and the first two questions: does it come back, and free?

The same spike can be asked about from several starts. What comes of the answers is for
`investigate`, which start is asked next for `backwards`.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from unclamp.analysis.counterfactual import ACTUAL
from unclamp.explain.facts import MACHINE
from unclamp.explain.game import Game, Window
from unclamp.explain.limits import Limits
from unclamp.explain.noise import Noise, placebo_noise
from unclamp.explain.ranks import ALONE, Ranks
from unclamp.explain.replay import Replay, Trace, same_losses
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Step, Training
from unclamp.names import SiteName
from unclamp.policy import unclamped
from unclamp.version import __version__


class Start:
    """A snapshot, its replays, and their answers.

    Args:
        training: Made by the build function; it is taken over, by one start at a time.
        step: The step function.
        snapshot: Of a step at or before the window's first.
        window: The spike.
        run: The run's folder; answers are kept in RUN/explain-cache.
        budget: Most replays from here.
        on_replay: Called after each replay.
        ranks: Who replays together.

    Raises:
        ReplayError: The snapshot does not fit the training.
    """

    def __init__(
        self,
        training: Training,
        step: Step,
        snapshot: Snapshot,
        *,
        window: Window,
        run: Path,
        budget: int,
        on_replay: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.snapshot = snapshot
        self.replay = Replay(training, step, snapshot, ranks=ranks)
        self.game = Game(
            self.replay,
            window,
            budget=budget,
            cache=run / "explain-cache" / f"{_digest(snapshot, window)}.json",
            on_replay=on_replay,
        )
        self.can_clamp = [k for k in self.replay.sites if unclamped(self.replay.original(k))]

    @property
    def steps(self) -> int:
        """Steps of one replay."""
        return self.game.window.last - self.snapshot.step + 1

    def plain(self) -> Trace:
        """Replay with nothing changed, and begin the game with it."""
        trace = self.replay.run({}, last=self.game.window.last)
        self.game.begin(trace)
        return trace

    def comes_back(self, plain: Trace) -> bool:
        """Whether a plain replay has the run's losses bit for bit, on each rank."""
        own = plain.own or plain.losses
        return self.replay.ranks.every(same_losses(own, self.snapshot.losses))

    def without_clamping(self) -> float:
        """Return the share of the spike that is gone with nothing clamped.

        Raises:
            BudgetSpent: It would be one replay too many.
        """
        free = self.free()
        self.game.lower_floor(free)
        return self.game.share_gone(free)

    def noise(self) -> Noise:
        """Return what placebos move.

        Raises:
            BudgetSpent: The budget does not suffice for two.
        """
        return placebo_noise(self.game)

    def free(self) -> Trace:
        """Return the replay with nothing clamped.

        Raises:
            BudgetSpent: It would be one too many.
        """
        return self.game.ask("unclamped", self.can_clamp)

    def clamped(self) -> set[SiteName]:
        """Return the sites that clamp, or would where nobody else does."""
        return {key for trace in (self.game.answers[ACTUAL], self.free()) for key in trace.sites}


def _digest(snapshot: Snapshot, window: Window) -> str:
    """Return what identifies the questions: answers of others are of no use."""
    kept = {name: snapshot.facts.get(name) for name in ("code", "sites", "recipe", *MACHINE)}
    text = json.dumps([snapshot.step, kept, repr(window)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_of(snapshot: Snapshot, window: Window, limits: Limits) -> str:
    """Return what identifies the whole question: run, spike, code and settings but the budget.

    Empty where the code may have changed (`Limits.anyway`): such a question is like no other.
    """
    if limits.anyway:
        return ""
    losses = {step: float(loss).hex() for step, loss in snapshot.losses.items()}
    settings = [limits.group, limits.leading, limits.seed, __version__]
    text = json.dumps([_digest(snapshot, window), losses, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
