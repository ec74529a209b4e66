"""The scenarios of a study, and what each of them is in words. Torch-free."""

SCENARIOS = {
    "text": "real text, nothing planted",
    "outlier": "real text; at the marked steps planted rare tokens drive two SwiGLU channels",
    "labels": "real text, nothing planted; at the marked steps only a few bytes are labels, and "
    "the loss is the mean over them",
}
STARVED = (
    "real text; at the marked steps planted rare tokens reach one expert of the last layer, which "
    "no other token chooses, each time with a larger activation"
)
"""Scenario `outlier` in a mixture of experts."""


def described(scenario: str, *, architecture: object) -> str:
    """Return what a scenario is in a model of some architecture; "" for one that nobody knows."""
    if scenario == "outlier" and architecture == "moe":
        return STARVED
    return SCENARIOS.get(scenario, "")
