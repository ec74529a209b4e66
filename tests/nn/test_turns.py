"""Several optimizers on one container: each updates the products whose parameters it holds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import Delayed, Recipe, Recorder, RunLog
from unclamp.nn import Ledger, find_ledgers
from unclamp.numerics import Stat

OVERFLOWS = 464
"""Above it, rounding to E4M3 lands above its largest value, 448."""
INPUT, WEIGHT, GRAD_OUTPUT = 0, 1, 2


class Truth:
    """What a delayed scale with a history of one update would clamp, by definition.

    It keeps the inputs of a module's trained forwards, and at each step of the module's own
    optimizer counts those above the scale that the last step's largest input gave.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.clamped = self.elements = 0
        self.since: list[Tensor] = []
        self._amax = 0.0
        module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.since.append(inputs[0].detach().clone()))

    def step(self) -> None:
        for x in self.since:
            self.elements += x.numel()
            if self._amax > 0:  # before the first update a cast takes its own tensor's scale
                scale = torch.tensor(448 / self._amax, dtype=torch.float32)
                self.clamped += int(((x * scale).abs() > OVERFLOWS).sum())
        if self.since:
            self._amax = max(float(x.abs().max()) for x in self.since)
        self.since = []


class Gan:
    """A generator and a discriminator in one container, converted as one model."""

    def __init__(self, *, apart: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {
                "generator": nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
                "critic": nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)),
            }
        )
        self.generator, self.critic = self.model["generator"], self.model["critic"]
        for part in self.model.values() if apart else [self.model]:
            unclamp.convert(part, Recipe.uniform(Delayed(history_len=1)))
        self.ledgers = find_ledgers(self.model)
        self.optimizers = {
            "generator": torch.optim.SGD(self.generator.parameters(), lr=0.01),
            "critic": torch.optim.SGD(self.critic.parameters(), lr=0.01),
        }
        self.truths = {
            fqn: Truth(module)
            for fqn, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def step(self, half: str) -> None:
        self.optimizers[half].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        for fqn, truth in self.truths.items():
            if fqn.startswith(half):
                truth.step()

    def train_critic(self) -> None:
        real = 10 * torch.randn(32, 8)
        fake = self.generator(torch.randn(32, 8)).detach()
        (self.critic(real).mean() - self.critic(fake).mean()).backward()
        self.step("critic")

    def train_generator(self) -> None:
        # Its inputs are a hundredth of the real ones: what a scale that follows them would clamp.
        self.critic(0.1 * self.generator(torch.randn(32, 8))).mean().backward()
        self.step("generator")


def clamped_of(ledger: Ledger) -> Callable[[], dict[str, tuple[int, int]]]:
    """Add up what updates tell; return what gives clamped and counted elements of each input."""
    total = torch.zeros(len(ledger.sites), 2, dtype=torch.float64)

    def hear(update: unclamp.nn.update.Update) -> None:
        total.add_(update.stats[:, [Stat.SATURATED, Stat.ELEMENTS]])

    ledger.subscribe(hear)
    return lambda: {
        site.fqn: (int(total[i, 0]), int(total[i, 1]))
        for i, site in enumerate(ledger.sites)
        if site.role == "input"
    }


@pytest.mark.parametrize("generator_first", [False, True])
@pytest.mark.parametrize("critic_steps", [1, 3])
def test_each_half_of_a_gan_clamps_what_its_own_scales_say(
    critic_steps: int, generator_first: bool
) -> None:
    gan = Gan()
    (ledger,) = gan.ledgers
    counted = clamped_of(ledger)
    for _ in range(10):
        if generator_first:
            gan.train_generator()
        for _ in range(critic_steps):
            gan.train_critic()
        if not generator_first:
            gan.train_generator()
    truth = {fqn: (t.clamped, t.elements) for fqn, t in gan.truths.items()}
    assert counted() == truth
    # What scales that follow both optimizers clamp is thousands in the same iterations.
    assert 0 < sum(clamped for clamped, _ in truth.values()) < 100
    assert ledger.updates == 10 * critic_steps


def test_what_a_half_saw_in_the_others_step_waits_for_its_own() -> None:
    gan = Gan()
    (ledger,) = gan.ledgers
    gan.train_critic()
    scale = ledger.scale.clone()
    gan.train_generator()
    critic = [i for i, site in enumerate(ledger.sites) if site.fqn.startswith("critic")]
    assert torch.equal(ledger.scale[critic], scale[critic])
    assert ledger.pending[critic, Stat.CASTS].tolist() == [1] * 6
    assert ledger.has_pending
    gan.train_critic()
    assert ledger.pending[critic, Stat.CASTS].tolist() == [0] * 6


def test_a_half_that_is_frozen_in_the_others_step_waits_too() -> None:
    gan = Gan()
    (ledger,) = gan.ledgers
    counted = clamped_of(ledger)
    for _ in range(6):
        gan.train_critic()
        gan.critic.requires_grad_(False)
        gan.train_generator()
        gan.critic.requires_grad_(True)
    assert counted() == {fqn: (t.clamped, t.elements) for fqn, t in gan.truths.items()}


def test_a_recorder_step_of_a_gan_holds_the_updates_of_both_halves(tmp_path: Path) -> None:
    gan = Gan()
    with Recorder(gan.model, tmp_path / "run") as recorder:
        for _ in range(6):
            gan.train_critic()
            gan.train_generator()
            recorder.step(loss=1.0)
    with RunLog.open(tmp_path / "run") as log:
        rows = log.sql(
            "SELECT fqn, sum(saturated)::BIGINT AS clamped, sum(elements)::BIGINT AS elements, "
            "list(microsteps ORDER BY step) AS microsteps "
            "FROM casts JOIN sites USING (site) WHERE role = 'input' GROUP BY fqn"
        ).to_pylist()
    assert {row["fqn"]: (row["clamped"], row["elements"]) for row in rows} == {
        fqn: (truth.clamped, truth.elements) for fqn, truth in gan.truths.items()
    }
    # A critic's row: real, fake, and from the second on the generator's step before it.
    assert {row["fqn"]: row["microsteps"] for row in rows} == {
        "generator.0": [1] * 6,
        "generator.2": [1] * 6,
        "critic.0": [2, 3, 3, 3, 3, 3],
        "critic.2": [2, 3, 3, 3, 3, 3],
    }


@pytest.mark.parametrize("apart", [False, True])
def test_a_gan_is_recorded_without_a_warning_of_the_order(tmp_path: Path, apart: bool) -> None:
    gan = Gan(apart=apart)
    assert len(gan.ledgers) == 1 + apart
    with Recorder(gan.model, tmp_path / "run") as recorder:  # warnings are errors
        for _ in range(4):
            gan.train_critic()
            gan.train_generator()
            recorder.step(loss=1.0)


def test_a_wrong_order_is_warned_of_with_parts_converted_apart(tmp_path: Path) -> None:
    gan = Gan(apart=True)
    with Recorder(gan.model, tmp_path / "run") as recorder:
        gan.train_critic()
        gan.critic(0.1 * gan.generator(torch.randn(32, 8))).mean().backward()
        with pytest.warns(unclamp.UnclampWarning, match="between backward and optimizer"):
            recorder.step(loss=1.0)


def test_a_wrong_order_is_warned_of_in_one_container(tmp_path: Path) -> None:
    gan = Gan()
    with Recorder(gan.model, tmp_path / "run") as recorder:
        gan.train_critic()
        gan.critic(0.1 * gan.generator(torch.randn(32, 8))).mean().backward()
        with pytest.warns(unclamp.UnclampWarning, match="between backward and optimizer"):
            recorder.step(loss=1.0)


# ---- whose a product is --------------------------------------------------------------------


def chain(count: int = 3) -> tuple[nn.Sequential, Ledger]:
    """Return layers that pass on what they get, so that each input has the amax of the first.

    A margin of 2**4 keeps growing inputs from being clamped on the way.
    """
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    with torch.no_grad():
        for layer in model:
            layer.get_parameter("weight").copy_(torch.eye(4))
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=4, margin=4)))
    return model, find_ledgers(model)[0]


def backward(model: nn.Module, amax: float) -> None:
    model(torch.full((2, 4), amax)).sum().backward()


def histories(ledger: Ledger) -> list[list[float]]:
    """Return each input's history, newest first, without what is empty."""
    inputs = range(INPUT, len(ledger.sites), 3)
    return [[value for value in ledger.history_of(i).tolist() if value > 0] for i in inputs]


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.0)


def test_parameter_groups_are_one_optimizer() -> None:
    model, ledger = chain()
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for amax in (1.0, 2.0):
        backward(model, amax)
        optimizer.step()
    assert histories(ledger) == [[2, 1]] * 3


def test_a_frozen_product_that_nobody_holds_goes_with_every_optimizer() -> None:
    model, ledger = chain()
    model[1].requires_grad_(False)
    first, last = sgd(model[0]), sgd(model[2])
    for optimizer, amax in ((first, 1.0), (last, 2.0), (first, 4.0)):
        backward(model, amax)
        optimizer.step()
    # Of the second pass and the third, whose casts waited for the first one's optimizer, the larger
    # amax enters; what the last product saw in the third still waits.
    assert histories(ledger) == [[4, 1], [4, 2, 1], [2]]


def test_a_product_that_wants_gradients_and_that_nobody_holds_is_passed_over_once() -> None:
    model, ledger = chain(2)
    optimizer = sgd(model[0])
    for amax in (1.0, 2.0, 4.0):
        backward(model, amax)
        optimizer.step()
    assert histories(ledger) == [[4, 2, 1], [4, 2]]


def test_a_parameter_of_two_optimizers_updates_once_a_backward() -> None:
    model, ledger = chain(1)
    both = sgd(model), sgd(model)
    for amax in (1.0, 2.0):
        backward(model, amax)
        for optimizer in both:
            optimizer.step()
    assert histories(ledger) == [[2, 1]]
    assert ledger.updates == 2


def test_tied_weights_update_every_product_that_has_them() -> None:
    model, ledger = chain()
    model[2].weight = model[0].weight
    tied, other = sgd(model[0]), sgd(model[1])
    backward(model, 1.0)
    tied.step()
    assert histories(ledger) == [[1], [], [1]]
    other.step()
    assert histories(ledger) == [[1], [1], [1]]
    assert ledger.updates == 1


def test_an_optimizer_of_parts_within_another_makes_one_step() -> None:
    """As ZeRO does: the outer optimizer steps an inner one that holds a share of the parameters."""
    model, ledger = chain()
    inner, outer = sgd(model[1]), sgd(model)
    for amax in (1.0, 2.0):
        backward(model, amax)
        inner.step()
        outer.step()
    assert histories(ledger) == [[2, 1]] * 3
    assert ledger.updates == 2


def test_optimizers_in_backward_make_one_step_and_one_update_of_each_product() -> None:
    model, ledger = chain()
    for layer in model:
        optimizer = sgd(layer)
        weight = layer.get_parameter("weight")
        weight.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    for amax in (1.0, 2.0, 4.0):
        backward(model, amax)
    assert histories(ledger) == [[4, 2, 1]] * 3
    assert ledger.updates == 3


def test_an_optimizer_of_the_rest_of_the_model_updates_no_product_that_another_holds() -> None:
    model, ledger = chain(2)
    model.append(nn.Linear(4, 4))  # not converted
    matrices, rest = sgd(model[0], model[1]), sgd(model[2])
    for amax in (1.0, 2.0):
        backward(model, amax)
        rest.step()
        assert histories(ledger)[0] == [value for value in (1.0,) if amax == 2.0]
        matrices.step()
    assert histories(ledger) == [[2, 1]] * 2
    assert ledger.updates == 2


def test_a_switch_keeps_what_a_partial_update_left_and_a_copy_starts_without() -> None:
    model, ledger = chain(2)
    first, second = sgd(model[0]), sgd(model[1])
    backward(model, 2.0)
    first.step()
    assert histories(copy.deepcopy(ledger)) == [[2], []]
    twin = copy.deepcopy(model)
    sgd(twin).step()
    assert histories(find_ledgers(twin)[0]) == [[2], []]  # it is the source's, as gradients are
    unclamp.switch(model, scaling=Delayed(history_len=8))
    second.step()
    assert histories(ledger) == [[2], [2]]


@pytest.mark.parametrize("length", [1, 16])
def test_partial_updates_of_rows_and_closer_looks_equal_those_of_ledgers_apart(
    length: int,
) -> None:
    recipe = Recipe(weight=Delayed(history_len=length, granularity=unclamp.PerRow()))
    told: list[list[Tensor]] = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        for part in model if apart else [model]:
            unclamp.convert(part, recipe)
        ledgers, heard = find_ledgers(model), []
        for ledger in ledgers:
            ledger.inspect("always")
            ledger.subscribe(lambda u, heard=heard: heard.append((u.stats, u.details)))
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
        for step in range(6):
            model(torch.randn(5, 6) * (1 + step)).square().sum().backward()
            optimizers[step % 2].step()
            optimizers[step % 2].zero_grad()
        scales = torch.cat([ledger.scale for ledger in ledgers])
        amaxes = torch.cat([ledger.block_amax for ledger in ledgers])
        rows = 3 if apart else 6
        looks = torch.stack([d.sum(0) for _, d in heard if d is not None])
        casts = torch.stack([s[s[:, Stat.CASTS] > 0].sum(0) for s, _ in heard])
        assert len(heard) == 6
        assert all(len(s) == rows for s, _ in heard)
        told.append([scales, amaxes, looks, casts])
    for one, two in zip(*told, strict=True):
        assert torch.equal(one, two)
