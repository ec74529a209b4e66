"""What a study is made of, read from TOML and checked; and the header of a study's folder.

Torch-free, so that a report can be made of a study's folder without torch.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from unclamp.errors import StudyError, did_you_mean
from unclamp.files import write_json
from unclamp.study.arm import ArmConfig, arm_from_dict, arm_to_dict
from unclamp.study.given import check_keys, expect, number, unknown
from unclamp.study.scenarios import SCENARIOS
from unclamp.version import __version__
from unclamp.written import counted

ARCHITECTURES = {"llama": "Llama", "moe": "MoE Llama (Mixtral)"}
"""Which small models there are, and what they are called."""
ARM_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""What an arm may be called: its name is a folder of the study, and on its page."""
STUDY_FILE = "study.json"
STUDY_KIND = "unclamp-study"
STUDY_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and the shape of a batch."""

    text: tuple[str, ...] = ()
    batch_size: int = 8
    seq_len: int = 128


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A small model from these sizes, or the causal LM that `hf_model` names.

    `architecture` is "llama" or "moe". In the latter each layer has so many `experts`, of which a
    token takes `experts_per_token`; these share `intermediate_size`.
    `skip` are globs of layers left in high precision; with `strict` a glob or an override that
    matches nothing is an error.
    """

    architecture: str = "llama"
    hf_model: str = ""
    hidden_size: int = 128
    intermediate_size: int = 344
    layers: int = 2
    heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    skip: tuple[str, ...] = ("lm_head",)
    strict: bool = False

    @property
    def title(self) -> str:
        """Return what the model is, for people."""
        if self.hf_model:
            return self.hf_model
        title = f"{ARCHITECTURES[self.architecture]}, {counted(self.layers, 'layer')} of "
        title += str(self.hidden_size)
        if self.architecture == "moe":
            title += f" with {self.experts} experts, {self.experts_per_token} a token"
        return f"{title}, bytes as tokens"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and gradient clipping."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 10
    grad_clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OutlierConfig:
    """When the planted tokens of scenario `outlier` come, and how many."""

    first_step: int = 40
    every: int = 20
    share: float = 0.1

    def planted_steps(self, steps: int) -> list[int]:
        """Return the planted steps of a run of so many steps."""
        return list(range(self.first_step, steps, self.every))


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """When the batches with few labels of scenario `labels` come, and what their labels are.

    With a `question` they are answers, which no other batch teaches; without, the text's own bytes.
    """

    every: int = 20
    labels: int = 8
    question: str = ""

    def few_label_steps(self, steps: int) -> list[int]:
        """Return the steps with few labels of a run of so many steps; step 0 is none."""
        return list(range(self.every, steps, self.every))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study."""

    scenarios: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    outlier: OutlierConfig = field(default_factory=OutlierConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    arms: Mapping[str, ArmConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scenario in self.scenarios:
            if scenario not in SCENARIOS:
                raise unknown("scenario", scenario, list(SCENARIOS))
        self._check_model()
        for name, arm in self.arms.items():
            if not ARM_NAME.fullmatch(name):
                raise StudyError(
                    f"expected an arm's name of letters, digits, '_', '-' and '.', not beginning "
                    f"with '.', as it names a folder; got {name!r}"
                )
            if arm.from_arm is not None and not self._has_recipe(arm.from_arm):
                raise StudyError(
                    f"arm {name!r} starts from {arm.from_arm!r}, which must be an arm with a recipe"
                    f"{did_you_mean(arm.from_arm, [n for n, a in self.arms.items() if a.recipe])}"
                )
        for what, count in (("scenarios", self.scenarios), ("seeds", self.seeds)):
            if not count:
                raise StudyError(f"expected at least one of {what}, got none")
            if len(set(count)) < len(count):
                raise StudyError(f"expected distinct {what}, got {list(count)}")
        if not self.arms:
            raise StudyError("expected at least one arm, got none")

    def _check_model(self) -> None:
        model = self.model
        if model.architecture not in ARCHITECTURES:
            raise unknown("model.architecture", model.architecture, list(ARCHITECTURES))
        if model.hf_model and model.architecture != "llama":
            raise StudyError(
                f"model.hf_model {model.hf_model!r} has an architecture of its own: leave out "
                f"architecture {model.architecture!r}"
            )
        if model.experts_per_token > model.experts:
            raise StudyError(
                f"expected model.experts_per_token to be at most the {model.experts} experts, got "
                f"{model.experts_per_token}"
            )

    def marked_steps(self, scenario: str) -> list[int]:
        """Return the steps of a scenario whose batches differ from the others."""
        if scenario == "outlier":
            return self.outlier.planted_steps(self.steps)
        if scenario == "labels":
            return self.labels.few_label_steps(self.steps)
        return []

    def check_marks(self) -> None:
        """Refuse a scenario whose batches are all alike; a study that was run before may be one.

        Raises:
            StudyError: The run ends before the first planted step of scenario `outlier`, or before
                the first step with few labels of scenario `labels`; or those are not few.
        """
        if "outlier" in self.scenarios and not self.marked_steps("outlier"):
            first = self.outlier.first_step
            raise StudyError(
                f"scenario 'outlier' plants nothing in {counted(self.steps, 'step')}, as its first "
                f"planted step is step {first}: use --steps {first + 1} or more, a smaller "
                "outlier.first_step, or --scenario text"
            )
        if "labels" in self.scenarios:
            self._check_labels()

    def _check_labels(self) -> None:
        every, labels = self.labels.every, self.labels.labels
        if not self.marked_steps("labels"):
            raise StudyError(
                f"scenario 'labels' has no step with few labels in {counted(self.steps, 'step')}, "
                f"as the first one is step {every}: use --steps {every + 1} or more, a smaller "
                "labels.every, or --scenario text"
            )
        if every == 1:
            raise StudyError(
                "scenario 'labels' has few labels at every step but the first with labels.every = "
                "1, so that no step is left to compare with: expected 2 or more"
            )
        most = self.data.batch_size * (self.data.seq_len - 1)
        if labels >= most:
            raise StudyError(
                f"expected labels.labels to be fewer than the {most} targets of an ordinary batch "
                f"({counted(self.data.batch_size, 'sequence')} of {self.data.seq_len}, whose first "
                f"token is no target), got {labels}"
            )
        self._check_question()

    def _check_question(self) -> None:
        asked, rows = self.labels.question, self.data.batch_size
        if not asked:
            return
        if self.model.hf_model:
            raise StudyError(
                "the question of scenario 'labels' is in bytes, which are not the tokens of "
                f"{self.model.hf_model!r}: set labels.question to ''"
            )
        room = self.data.seq_len - len(asked) - math.ceil(self.labels.labels / rows)
        if not asked.isascii() or room < 1:
            raise StudyError(
                "expected labels.question in ASCII, and to leave room for a text before it and "
                f"its answer in sequences of {self.data.seq_len}, got {asked!r}"
            )

    def _has_recipe(self, arm: str) -> bool:
        return arm in self.arms and self.arms[arm].recipe is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives an equal study back."""
        data = asdict(self)
        data["arms"] = {name: arm_to_dict(arm) for name, arm in self.arms.items()}
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StudyConfig":
        """Return the study that plain data describes.

        Raises:
            StudyError: An unknown key or name, or a value of the wrong type or range.
        """
        check_keys("study", data, [f.name for f in fields(cls)])
        missing = [key for key in ("scenarios", "seeds", "steps", "arms") if key not in data]
        if missing:
            raise StudyError(f"the study lacks {', '.join(missing)}")
        sections: dict[str, type[Any]] = {
            "data": DataConfig,
            "model": ModelConfig,
            "optimizer": OptimizerConfig,
            "outlier": OutlierConfig,
            "labels": LabelsConfig,
        }
        arms = expect(data["arms"], dict, "arms")
        return cls(
            scenarios=tuple(expect(data["scenarios"], list, "scenarios")),
            seeds=tuple(
                number(seed, int, "a seed", low=0) for seed in expect(data["seeds"], list, "seeds")
            ),
            steps=number(data["steps"], int, "steps", low=1),
            arms={name: arm_from_dict(name, arm) for name, arm in arms.items()},
            **{key: _section(key, kind, data.get(key, {})) for key, kind in sections.items()},
        )

    @classmethod
    def from_toml(cls, text: str) -> "StudyConfig":
        """Return the study that a TOML text describes; raises as `from_dict`."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"the study is not valid TOML: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> "StudyConfig":
        """Read a study from a TOML file; raises as `from_dict`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(f"cannot read the study {str(path)!r}: {error}") from error
        return cls.from_toml(text)


def default_toml() -> str:
    """Return the default study as it ships, comments included."""
    return files("unclamp.study").joinpath("default.toml").read_text(encoding="utf-8")


def write_study(out: Path, config: StudyConfig, **facts: Any) -> None:
    """Write a study's header, atomically; `facts` are plain data such as the status."""
    data = {
        "kind": STUDY_KIND,
        "schema_version": STUDY_SCHEMA_VERSION,
        "unclamp_version": __version__,
        "config": config.to_dict(),
        **facts,
    }
    write_json(out / STUDY_FILE, data)


def read_study(path: Path) -> dict[str, Any]:
    """Return a study's header.

    Raises:
        StudyError: No study, or one that another version wrote.
    """
    try:
        data = json.loads((path / STUDY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{str(path)!r} holds no readable {STUDY_FILE}: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != STUDY_KIND:
        raise StudyError(f"{str(path / STUDY_FILE)!r} is no study of unclamp")
    if data.get("schema_version") != STUDY_SCHEMA_VERSION:
        raise StudyError(
            f"{str(path)!r} was written by unclamp {data.get('unclamp_version')} with schema "
            f"version {data.get('schema_version')}, and this unclamp reads version "
            f"{STUDY_SCHEMA_VERSION}; install that unclamp to read it"
        )
    return data


def is_study(path: Path) -> bool:
    """Whether the folder holds a study's header, of whatever version."""
    return (path / STUDY_FILE).is_file()


def _section(name: str, kind: type[Any], data: object) -> Any:
    """Return a section's dataclass; its defaults say the type of each value."""
    table = expect(data, dict, name)
    check_keys(f"section [{name}]", table, [f.name for f in fields(kind)])
    default = kind()
    values: dict[str, Any] = {}
    for key, value in table.items():
        usual = getattr(default, key)
        what = f"{name}.{key}"
        if isinstance(usual, tuple):
            values[key] = tuple(expect(value, list, what))
        elif isinstance(usual, str | bool):
            values[key] = expect(value, type(usual), what)
        else:
            low = 0 if isinstance(usual, float) or key in ("warmup_steps", "first_step") else 1
            values[key] = number(value, type(usual), what, low=low)
    return kind(**values)
