"""Steer a training: each site moves on its ladder as `analysis.steering` decides.

The machine that a log was tried on decides here too, from the amaxes that ranks have agreed on. So
on several ranks each decides by itself, and all alike: sites that the same ranks share are decided
together, and nothing that one rank alone knows enters.

A decision that looks at numbers needs them on the host. On a CPU they are there at once, and what a
step's casts decide governs the next step. On a GPU nobody waits: a step's amaxes are read while the
next one is recorded, so a decision governs the step after that, one step later.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from unclamp.analysis.steering import Backtest, Decision, Machine, Rule
from unclamp.autopilot.heard import Heard
from unclamp.autopilot.permission import check_backtest, check_there_is_one
from unclamp.autopilot.steered import Steered, find_steered
from unclamp.errors import RecipeError, naming_arguments
from unclamp.names import Role, SiteName
from unclamp.nn.ledger import Ledger
from unclamp.nn.switch import switch
from unclamp.runlog import AUTOPILOT_EVENT
from unclamp.scaling import Scaling
from unclamp.telemetry import Recorder


@dataclass(frozen=True, kw_only=True)
class _Crew:
    """Sites of a ledger that the same ranks share, and the machine that decides of them."""

    ledger: Ledger
    sites: list[Steered]
    places: np.ndarray
    machine: Machine


class Autopilot:
    """Switch single sites of a model while it trains, by a rule that was tried on its logs.

    Call `step` once per optimizer step, after `Recorder.step`. Make it after the model was
    converted and wrapped for its ranks. Each decision is an event of the run, "autopilot", with its
    evidence, and each switch one of its own.

    Args:
        model: A model with converted layers. A site is steered if its scaling is a rung of the
            rule's ladder, and never goes below that rung.
        recorder: Records decisions; None: nobody does.
        rule: The rule; that of the backtest by default.
        backtest: What `unclamp.backtest` returned for logs of this model, or the file that
            `unclamp backtest --out` wrote.
        untested: Whether to go on without a backtest.
        late: Whether amaxes are read one step late; None: where the device computes by itself.

    Attributes:
        rule: The rule.
        left: Sites that are not steered, and why.
        decisions: All decisions so far.

    Raises:
        ConvertError: No layer of the model trains in FP8.
        RecipeError: The rule was not tried on a log of this model, or steers no site of it.

    Example:
        >>> pilot = unclamp.Autopilot(model, recorder, backtest="pilot.json")  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     recorder.step(loss=train_step(model, batch))
        ...     pilot.step()
    """

    @naming_arguments
    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder | None = None,
        *,
        rule: Rule | None = None,
        backtest: Backtest | str | Path | None = None,
        untested: bool = False,
        late: bool | None = None,
    ) -> None:
        tested = Backtest.load(backtest) if isinstance(backtest, str | Path) else backtest
        self.rule = rule or (Rule() if tested is None else tested.rule)
        self._model, self._recorder = model, recorder
        if not untested:
            check_there_is_one(tested)
        self._steered, self.left = find_steered(model, self.rule)
        self.decisions: list[Decision] = []
        by_ledger: dict[Ledger, list[Steered]] = {}
        for each in self._steered:
            by_ledger.setdefault(each.ledger, []).append(each)
        on_device = any(ledger.scale.device.type != "cpu" for ledger in by_ledger)
        self._is_late = on_device if late is None else late
        if tested is not None and not untested:
            sites = {each.name: each.format.name for each in self._steered}
            check_backtest(tested, self.rule, sites, late=int(self._is_late))
        self._heard = [
            Heard(own, [e.index for e in each], is_late=self._is_late)
            for own, each in by_ledger.items()
        ]
        self._crews: dict[Ledger, list[_Crew]] | None = None
        self._steps = 0
        if recorder is not None:
            recorder.event(
                AUTOPILOT_EVENT,
                rule=str(self.rule),
                tested_on=[] if tested is None else [run.run for run in tested.runs],
                steered=len(self._steered),
                left=len(self.left),
                late=int(self._is_late),
            )

    def step(
        self, step: int | None = None, *, prices: Mapping[SiteName, float] | None = None
    ) -> list[Decision]:
        """Decide by the casts of the last step, and switch; return what was decided.

        Args:
            step: The number of the last step; the recorder's, or a count of calls.
            prices: First-order prices in units of the loss, where they are known, of the casts
                that are decided by: where amaxes are late, those of the step before. For a rule
                with a `price`. They have to be the same on every rank.
        """
        if step is None:
            step = self._steps if self._recorder is None else self._recorder.next_step - 1
        self._steps = step + 1
        decisions: list[Decision] = []
        crews = self._gather()
        for heard in self._heard:
            for measured_at, amaxes in heard.take(step):
                for crew in crews[heard.ledger]:
                    known = None if prices is None else _prices_of(crew, prices)
                    made, _ = crew.machine.step(measured_at, amaxes[crew.places], prices=known)
                    decisions += made
        if decisions:
            self._carry_out(decisions)
        return decisions

    @property
    def reads(self) -> float:
        """Reads a cast, meant over the steered sites as they stand."""
        crews = [crew for each in self._gather().values() for crew in each]
        total = sum(crew.machine.reads() * len(crew.sites) for crew in crews)
        return total / len(self._steered)

    def state_dict(self) -> dict[str, Any]:
        """Return where each site stands and what is known of it, for a checkpoint."""
        crews = [crew for each in self._gather().values() for crew in each]
        return {
            "rule": str(self.rule),
            "crews": [
                {
                    "sites": [[s.name.fqn, s.name.role] for s in crew.sites],
                    **{k: torch.from_numpy(v) for k, v in crew.machine.state().items()},
                }
                for crew in crews
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: sites get the scalings that they had.

        Raises:
            RecipeError: The state is of another rule, or of other sites.
        """
        crews = [crew for each in self._gather().values() for crew in each]
        theirs = [[tuple(site) for site in crew["sites"]] for crew in state["crews"]]
        ours = [[(s.name.fqn, s.name.role) for s in crew.sites] for crew in crews]
        if state["rule"] != str(self.rule) or theirs != ours:
            raise RecipeError(
                "the state is of an autopilot with another rule or other sites: expected "
                f"{self.rule} and {len(self._steered)} sites, got {state['rule']} and "
                f"{sum(map(len, theirs))}"
            )
        wanted: list[tuple[Steered, Scaling]] = []
        for crew, known in zip(crews, state["crews"], strict=True):
            crew.machine.restore({k: v for k, v in known.items() if k != "sites"})
            rungs = crew.machine.rung.tolist()
            wanted += [(s, self.rule.ladder[r]) for s, r in zip(crew.sites, rungs, strict=True)]
        self._switch(wanted)

    def close(self) -> None:
        """Hear no more; scalings stay as they are."""
        while self._heard:
            self._heard.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- carrying out ----------------------------------------------------------------------

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        self.decisions += decisions
        if self._recorder is not None:
            self._recorder.event(AUTOPILOT_EVENT, decisions=[each.to_dict() for each in decisions])
        places = {each.name: each for each in self._steered}
        self._switch([(places[d.site], d.after) for d in decisions if d.kind != "held"])

    def _switch(self, wanted: Sequence[tuple[Steered, Scaling]]) -> None:
        """Switch sites, those of a product at once; one that has the scaling is left."""
        products: dict[str, dict[Role, Scaling]] = {}
        for site, scaling in wanted:
            products.setdefault(site.fqn, {})[site.name.role] = scaling
        for fqn, roles in products.items():
            switch(self._model, f"^{glob.escape(fqn)}", **roles)

    def _gather(self) -> dict[Ledger, list[_Crew]]:
        """Return who decides together: sites whose amaxes the same ranks share.

        Not before the first step, when wrappers are there that say who shares what.
        """
        if self._crews is not None:
            return self._crews
        self._crews = {}
        for heard in self._heard:
            ledger, own = heard.ledger, [s for s in self._steered if s.ledger is heard.ledger]
            ledger.shared.look(ledger)
            groups = {i: part.groups for part in ledger.shared.parts for i in part.sites}
            together: dict[Any, list[int]] = {}
            for place, site in enumerate(own):
                together.setdefault(groups.get(site.index, ()), []).append(place)
            self._crews[ledger] = [
                self._crew(ledger, [own[p] for p in places], places) for places in together.values()
            ]
        return self._crews

    def _crew(self, ledger: Ledger, sites: list[Steered], places: list[int]) -> _Crew:
        machine = Machine(
            self.rule,
            [s.name for s in sites],
            [s.format for s in sites],
            start=[s.rung for s in sites],
        )
        return _Crew(ledger=ledger, sites=sites, places=np.array(places), machine=machine)


def _prices_of(crew: _Crew, prices: Mapping[SiteName, float]) -> np.ndarray:
    return np.array([prices.get(site.name, np.nan) for site in crew.sites])
