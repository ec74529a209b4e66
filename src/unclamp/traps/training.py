"""What hides a bad step: clipping, loss scaling, and a logger that filters."""

import importlib.util
import tempfile

import torch

from unclamp.traps.trap import Documented, Trap


def clip_one_nan(device):
    """Clip three gradients of ones, one element of which is NaN or Inf."""
    facts = {}
    for bad in ("nan", "inf"):
        weights = [torch.zeros(100, device=device) for _ in range(3)]
        for weight in weights:
            weight.grad = torch.ones(100, device=device)
        weights[0].grad[0] = float(bad)  # pyright: ignore
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        clipped = torch.cat([weight.grad for weight in weights])  # pyright: ignore
        facts[f"one {bad}: elements NaN"] = int(clipped.isnan().sum())
        facts[f"one {bad}: elements 0"] = int((clipped == 0).sum())
    return facts


def scaler_behind_a_cast(device):
    """Let an Inf gradient pass a cast to e4m3 on its way to GradScaler."""
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(device)
    y = weight.to(torch.float8_e4m3fn).float()
    scaler.scale(y[0] * 1e38 + y[1]).backward()  # 1e38 * 65536 is Inf
    gradient = float(weight.grad[0])  # pyright: ignore
    scaler.step(optimizer)
    scaler.update()
    return {
        "gradient that was Inf": gradient,
        "weight moved": str(float(weight.detach()[0]) != 1),
        "scale after it": scaler.get_scale(),
    }


class OneWeight(torch.nn.Module):
    """A model whose loss is its weight times the input."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        """Return what Trainer wants."""
        return {"loss": (self.weight * x).mean()}


def trainer_logs(device):
    """Train four steps on NaN with transformers' Trainer, and read its log."""
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415

    facts = {}
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    for name, is_on in {"on": True, "off": False}.items():
        settings |= {"logging_nan_inf_filter": is_on}
        with tempfile.TemporaryDirectory() as folder:
            settings |= {"output_dir": folder}
            data = [{"x": torch.tensor(float("nan"))}] * 4
            arguments = TrainingArguments(**settings)  # pyright: ignore
            trainer = Trainer(OneWeight(), arguments, train_dataset=data)  # pyright: ignore
            trainer.train()
        log = trainer.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        facts[f"losses logged with the filter {name}"] = str(losses)
    return facts


def needs_transformers(device: str) -> str | None:
    """Say that transformers is not installed, where it is not."""
    missing = [m for m in ("transformers", "accelerate") if not importlib.util.find_spec(m)]
    return f"needs {missing[0]}: pip install 'unclamp[hf]'" if missing else None


TRAPS = (
    Trap(
        name="clip-grad-norm",
        belief="`clip_grad_norm_` keeps one bad element from doing harm.",
        truth="It spreads it: one NaN makes every gradient of the model NaN; one Inf makes all "
        "others 0 and itself NaN. No error is raised unless asked for.",
        experiment=clip_one_nan,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "one nan: elements NaN": 300,
                    "one nan: elements 0": 0,
                    "one inf: elements NaN": 1,
                    "one inf: elements 0": 299,
                }
            ),
        ),
        cost="One element of one layer ends the run, and every layer looks guilty.",
        remedy="Inf and NaN are counted for each site before clipping, so the first one is named.",
        see="docs/telemetry.md",
    ),
    Trap(
        name="grad-scaler",
        belief="GradScaler sees every overflow of a gradient.",
        truth="Since torch 2.13 a cast to e4m3 turns Inf into 448 on its way: the step is taken "
        "with a made-up gradient. Before, it became NaN, and the step was skipped.",
        experiment=scaler_behind_a_cast,
        documented=(
            Documented(
                before=(2, 13),
                expected={
                    "gradient that was Inf": "nan",
                    "weight moved": "False",
                    "scale after it": 32768.0,
                },
            ),
            Documented(
                since=(2, 13),
                expected={
                    "gradient that was Inf": 448.0,
                    "weight moved": "True",
                    "scale after it": 65536.0,
                },
            ),
        ),
        cost="The loss scale never backs off, and every step's gradients are cut at 448.",
        remedy="A gradient with an Inf stays visible: the gradients that a product makes of it are "
        "NaN, for GradScaler and clipping to see.",
        see="docs/scaling.md",
    ),
    Trap(
        name="trainer-nan-filter",
        belief="Trainer's log shows the losses.",
        truth="`logging_nan_inf_filter` is on unless switched off: a NaN loss is logged as 0, "
        "the mean of what was logged before.",
        experiment=trainer_logs,
        apart=True,
        needs=needs_transformers,
        documented=(
            Documented(
                expected={
                    "losses logged with the filter on": "[0.0, 0.0, 0.0, 0.0]",
                    "losses logged with the filter off": "[nan, nan, nan, nan]",
                },
                source="transformers 4.56 and later",
            ),
        ),
        cost="A dead run looks perfect; only grad_norm says NaN.",
        remedy="The integration records the losses themselves, NaN and Inf as they are.",
        see="docs/trainers.md",
        telling="losses logged with the filter on",
    ),
)
