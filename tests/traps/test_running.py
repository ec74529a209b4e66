"""What is otherwise is said, what raises or hangs is an answer, and no process is left."""

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from unclamp.traps import Between, Documented, Trap, find, run
from unclamp.traps import catalogue as catalogue_module
from unclamp.traps.apart import Apart
from unclamp.traps.running import AS_DOCUMENTED, FAILED, OTHERWISE, SKIPPED, UNDOCUMENTED

SCALER = find("grad-scaler")[0]
PLANTED = Trap(
    name="planted",
    belief="One is two.",
    truth="It is not.",
    experiment=lambda device: {"one": 1, "share": 0.25, "word": "nan"},
    documented=(
        Documented(expected={"one": 1, "share": Between(low=0.2, high=0.3), "word": "nan"}),
    ),
    cost="Much.",
    remedy="Nothing.",
    see="docs/scaling.md",
)


def verdict(**changes) -> str:
    (outcome,) = run([replace(PLANTED, **changes)], devices=["cpu"])
    return outcome.verdict


def documented(**expected) -> tuple[Documented, ...]:
    return (Documented(expected=expected),)


def test_planted_outcomes_are_judged() -> None:
    assert verdict() == AS_DOCUMENTED
    assert verdict(documented=documented(one=2)) == OTHERWISE
    assert verdict(documented=documented(share=Between(low=0.26, high=1))) == OTHERWISE
    assert verdict(documented=documented(word=1.0)) == OTHERWISE
    assert verdict(documented=documented(other=1)) == OTHERWISE
    assert verdict(documented=()) == UNDOCUMENTED
    assert verdict(needs=lambda device: "needs a moon") == SKIPPED
    assert verdict(devices=("cuda",)) == SKIPPED


def test_what_differs_is_said_with_both_figures() -> None:
    trap = replace(PLANTED, documented=documented(one=2, share=Between(low=0.5, high=1)))
    (outcome,) = run([trap], devices=["cpu"])
    assert outcome.differences == ("one: 1, documented 2", "share: 0.25, documented 0.5 to 1")
    assert outcome.is_bad


def test_what_raises_is_an_answer() -> None:
    def stops(device):
        raise RuntimeError("first line\nsecond line")

    (outcome,) = run([replace(PLANTED, experiment=stops)], devices=["cpu"])
    assert (outcome.verdict, outcome.reason) == (FAILED, "RuntimeError: first line")
    assert outcome.is_bad


def test_inf_and_nan_are_words() -> None:
    trap = replace(
        PLANTED,
        experiment=lambda device: {"a": float("nan"), "b": float("-inf")},
        documented=documented(a="nan", b="-inf"),
    )
    (outcome,) = run([trap], devices=["cpu"])
    assert outcome.verdict == AS_DOCUMENTED
    assert outcome.facts == {"a": "nan", "b": "-inf"}


@pytest.mark.parametrize(
    ("since", "before", "version", "holds"),
    [
        (None, None, (2, 11), True),
        (None, (2, 13), (2, 12), True),
        (None, (2, 13), (2, 13), False),
        ((2, 13), None, (2, 12), False),
        ((2, 13), None, (3, 0), True),
        ((2, 9), None, (2, 13), True),
    ],
)
def test_versions_are_compared_as_numbers(since, before, version, holds) -> None:
    said = Documented(expected={}, since=since, before=before)
    assert said.holds_for(version, ("cpu",)) is holds
    assert not said.holds_for(version, ("cuda", "sm_90"))


def test_an_architecture_is_a_device_too() -> None:
    hopper = Documented(expected={}, device="sm_90")
    assert hopper.holds_for((2, 13), ("cuda", "sm_90"))
    assert not hopper.holds_for((2, 13), ("cuda", "sm_100"))


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_processes_that_do_not_answer_in_time_are_ended() -> None:
    (trap,) = find("all-reduce-max")
    start = time.monotonic()
    with Apart([(trap, "cpu")], patience_s=0) as apart:
        pids = [each.process.pid for each in apart._started[trap.name, "cpu"]]
        answer = apart.answer(trap, "cpu")
    assert answer.error == "rank 0: no answer within 0 s"
    assert len(pids) == 2
    assert running(pids) == []
    assert time.monotonic() - start < 60


def test_a_process_that_dies_is_an_answer() -> None:
    """Its traps are looked up by name in a process that does not know this one."""
    trap = replace(PLANTED, apart=True)
    (outcome,) = run([trap], devices=["cpu"])
    assert outcome.verdict == FAILED
    assert outcome.reason is not None
    assert "its process ended with 1" in outcome.reason
    assert "no trap is called 'planted'" in outcome.reason


def test_processes_are_ended_when_the_run_is_interrupted() -> None:
    pids: list[int] = []
    (trap,) = find("all-reduce-max")

    def interrupted() -> None:
        with Apart([(trap, "cpu")], patience_s=300) as apart:
            pids.extend(each.process.pid for each in apart._started[trap.name, "cpu"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    assert running(pids) == []


def test_ranks_do_not_touch_the_groups_of_this_process() -> None:
    assert not dist.is_initialized()
    (outcome,) = run(find("all-reduce-max"), devices=["cpu"])
    assert outcome.verdict == AS_DOCUMENTED
    assert not dist.is_initialized()


def test_names_are_unique_and_found_by_glob() -> None:
    names = [trap.name for trap in catalogue_module.TRAPS]
    assert len(set(names)) == len(names) >= 24
    assert [trap.name for trap in find("scale-*")] == ["scale-or-inverse"]
    assert {trap.name for trap in find("*-cast")} == {"plain-cast", "gradient-cast"}


def test_outcomes_come_in_the_order_asked_for() -> None:
    traps = [*find("micro-batches"), *find("plain-cast"), *find("tensor-core-*")]
    assert [outcome.name for outcome in run(traps, devices=["cpu"])] == [t.name for t in traps]


def test_a_device_that_no_test_has_is_judged_by_its_own_rows() -> None:
    """Nothing is documented of a CUDA device for a plain cast; of Hopper's GEMMs something is."""
    (lax,) = find("scaled-mm-on-a-cpu")
    hopper = lax.documented_for((2, 13), ("cuda", "sm_90"))
    assert hopper is not None
    assert hopper.expected["e5m2 x e5m2"] == "rejected"
    assert find("plain-cast")[0].documented_for((2, 13), ("cuda", "sm_90")) is None
    assert not torch.cuda.is_available()
