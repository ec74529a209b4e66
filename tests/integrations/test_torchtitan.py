"""torchtitan's own Trainer, on CPUs: converted, recorded, checkpointed, resumed.

Each process loads torchtitan once and trains several times; `titan` has what that takes. The truth
is what torchtitan logs at each step of a training that nothing records.
"""

import math
import re
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trained import STATE_FILE, Row, Trained

import unclamp
from ranks import run_ranks

pytest.importorskip("torchtitan")

LAYERS = 31
"""Linear layers of torchtitan's llama3 debug model."""
SMALL = 2
"""Blocks of the smaller model."""
STEPS = 5
SAVED = 3
ACCUMULATED: dict[str, Any] = {"training__global_batch_size": 4, "training__steps": STEPS}
SAVES: dict[str, Any] = {"checkpoint__enable": True, "checkpoint__interval": SAVED}
RANKED: dict[str, Any] = {"parallelism__spmd_backend": "partial_dtensor"}
"""What torch 2.13 can do on several ranks: it refuses torchtitan 0.3's default, `spmd_types`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, read."""

    rows: list[Row]
    status: str
    sites: int
    cast: set[int]
    attempts: int
    metadata: dict[str, Any]
    evaluations: list[tuple[int, str]]


def read(folder: Path, rank: int = 0) -> Run:
    columns = "step, loss, grad_norm, lr"
    with unclamp.RunLog.open(folder / "unclamp") as log:
        rows = log.sql(f"SELECT {columns} FROM steps WHERE rank = {rank} ORDER BY step")
        cast = log.sql(
            f"SELECT count(DISTINCT site) AS sites FROM casts WHERE rank = {rank} GROUP BY step"
        )
        events = log.events().to_pylist()
        return Run(
            rows=[
                (row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows.to_pylist()
            ],
            status=log.header.status,
            sites=len(log.named_sites()),
            cast=set(cast["sites"].to_pylist()),
            attempts=len(log.attempts),
            metadata=dict(log.header.metadata),
            evaluations=[(e["step"], e["data"]) for e in events if e["kind"] == "evaluation"],
        )


def states(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / STATE_FILE.format(rank=rank), weights_only=True)


def differing(one: Path, other: Path, rank: int = 0) -> list[str]:
    """Return the names of tensors that differ in a bit between two trainings' ends."""
    first, second = states(one, rank), states(other, rank)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def interrupted(whole: Path, folder: Path) -> Path:
    """Copy a training as it was after its first checkpoint."""
    shutil.copytree(whole, folder)
    for step in range(SAVED + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoint" / f"step-{step}", ignore_errors=True)
    return folder


# ---- what runs in processes of its own ---------------------------------------------------------


def truth(config: Any) -> Trained:
    """Train converted, not recorded, and logged by torchtitan at each step."""
    import titan

    own = config.model_spec.parallelize_fn

    def parallelize(model: Any, **kwargs: Any) -> Any:
        unclamp.convert(model, unclamp.Recipe())
        return own(model, **kwargs)

    config.model_spec.parallelize_fn = parallelize
    config.metrics.log_freq = 1
    return titan.train(config)


def one_process(rank: int, folder: Path) -> dict[str, Trained]:
    import titan
    from torchtitan.components.validate import Validator
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    from unclamp.integrations.torchtitan import with_unclamp

    recipe = unclamp.Recipe()

    def small(name: str, **changes: Any) -> Any:
        return titan.llama(folder / name, layers=SMALL, **changes)

    made = {
        "truth": truth(titan.llama(folder / "truth", **ACCUMULATED)),
        "whole": titan.train(
            with_unclamp(titan.llama(folder / "whole", **ACCUMULATED, **SAVES), recipe)
        ),
        "anew": titan.train(with_unclamp(titan.llama(folder / "whole"), recipe), keeps=False),
        "small": truth(small("small")),
    }
    for name, how in {"selective": SelectiveAC.Config(), "full": FullAC.Config()}.items():
        config = small(name, activation_checkpoint=how)
        made[name] = titan.train(with_unclamp(config, recipe))
    (folder / "recipe.toml").write_text(recipe.to_toml())
    own = "unclamp.integrations.torchtitan."
    overrides = [(own + "fp8", {"recipe": str(folder / "recipe.toml")}), own + "record"]
    made["override"] = titan.train(small("override", override__imports=overrides))
    poisoned = with_unclamp(small("poisoned", metrics__log_freq=1), recipe)
    made["poisoned"] = titan.train(poisoned, poisoned_step=2)
    exported = {
        "checkpoint__enable": True,
        "checkpoint__last_save_model_only": True,
        "checkpoint__last_save_in_hf": True,
    }
    made["plain"] = titan.train(small("plain", **exported))
    config = small("exported", **exported)
    config.validator = Validator.Config(
        enable=True, freq=2, steps=1, dataloader=titan.Batches.Config()
    )
    made["exported"] = titan.train(with_unclamp(config, recipe, skip=["lm_head"]))
    made["moe"] = titan.train(with_unclamp(titan.moe(folder / "moe"), recipe))
    made["eager"] = truth(titan.llama(folder / "eager", layers=1))
    compiled = {"enable": True, "components": ["model"], "backend": "aot_eager"}
    config = titan.llama(
        folder / "compiled", layers=1, **{f"compile__{key}": v for key, v in compiled.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what dynamo says of the functions that it traces
        made["compiled"] = titan.train(with_unclamp(config, recipe))
    return made


def documented(rank: int, folder: Path, block: str, commands: list[list[str]]) -> list[list[str]]:
    """Return the names of classes that the page's commands make a model and checkpoints of."""
    import titan  # noqa: F401
    from torchtitan.config import ConfigManager
    from torchtitan.config.override import apply_overrides

    (folder / "my_configs.py").write_text(block)
    sys.path.insert(0, str(folder))
    found = []
    for arguments in commands:
        config: Any = ConfigManager().parse_args(arguments)
        apply_overrides(config.override, config)
        kinds = (type(config.checkpoint), type(config.model_spec.model))
        converts = config.model_spec.parallelize_fn.__module__
        found.append([*(kind.__module__ for kind in kinds), converts])
    return found


def resumed(rank: int, folder: Path) -> dict[str, Trained]:
    import titan

    from unclamp.integrations.torchtitan import with_unclamp

    def again(name: str, **changes: Any) -> Any:
        return with_unclamp(
            titan.llama(folder / name, **ACCUMULATED, **SAVES, **changes), unclamp.Recipe()
        )

    made = {
        "resumed": titan.train(again("resumed")),
        "without": titan.train(again("without", checkpoint__exclude_from_loading=["unclamp"])),
    }
    plain = {"layers": 1, **SAVES}
    titan.train(titan.llama(folder / "plain", **plain, training__steps=SAVED))
    config = titan.llama(folder / "plain", **plain, training__steps=STEPS)
    with pytest.warns(unclamp.UnclampWarning, match="checkpoint has no scaling state"):
        made["plain"] = titan.train(with_unclamp(config, unclamp.Recipe()))
    return made


def two_ranks(rank: int, folder: Path) -> dict[str, Trained]:
    import titan

    from unclamp.integrations.torchtitan import with_unclamp

    recipe = unclamp.Recipe()
    accumulated = {**RANKED, "training__global_batch_size": 8, "training__steps": STEPS}

    def small(name: str, **changes: Any) -> Any:
        return titan.llama(folder / name, layers=1, **changes)

    made = {
        "truth": truth(small("truth", **accumulated)),
        "whole": titan.train(with_unclamp(small("whole", **accumulated, **SAVES), recipe)),
    }
    if rank == 0:
        interrupted(folder / "whole", folder / "resumed")
    dist.barrier()
    made["resumed"] = titan.train(with_unclamp(small("resumed", **accumulated, **SAVES), recipe))
    tensor = small("tensor", **RANKED, parallelism__tensor_parallel_degree=2)
    made["tensor"] = titan.train(with_unclamp(tensor, recipe))
    expert = titan.moe(folder / "expert", **RANKED, parallelism__expert_parallel_degree=2)
    made["expert"] = titan.train(with_unclamp(expert, recipe))
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    folder = tmp_path_factory.mktemp("titan")
    return folder, run_ranks(1, one_process, folder)[0]


@pytest.fixture(scope="module")
def again(
    alone: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Trained]]:
    folder = tmp_path_factory.mktemp("titan_again")
    for name in ("resumed", "without"):
        interrupted(alone[0] / "whole", folder / name)
    return folder, run_ranks(1, resumed, folder)[0]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Trained]]]:
    folder = tmp_path_factory.mktemp("titan_two")
    return folder, run_ranks(2, two_ranks, folder)


Alone = tuple[Path, dict[str, Trained]]
Again = tuple[Path, dict[str, Trained]]
Both = tuple[Path, list[dict[str, Trained]]]


# ---- one process -------------------------------------------------------------------------------


def test_all_layers_of_the_debug_model_are_converted_and_all_their_sites_cast(alone: Alone) -> None:
    folder, trained = alone
    run = read(folder / "whole")
    assert len(trained["whole"].converted) == LAYERS
    assert (run.sites, run.cast) == (3 * LAYERS, {3 * LAYERS})


@pytest.mark.cell("torchtitan", "updates once a step")
def test_each_optimizer_step_is_one_update(alone: Alone) -> None:
    folder, trained = alone
    assert trained["whole"].updates == [STEPS]
    histories = {k: v for k, v in states(folder / "whole").items() if k.endswith("amax_history")}
    assert len(histories) == 3 * LAYERS
    assert {int((history > 0).sum()) for history in histories.values()} == {STEPS}


@pytest.mark.cell("torchtitan", "loss as its own log")
@pytest.mark.cell("torchtitan", "accumulation")
def test_rows_are_what_torchtitan_logs_at_each_step(alone: Alone) -> None:
    folder, trained = alone
    run = read(folder / "whole")
    assert run.rows == trained["truth"].logged
    assert [row[0] for row in run.rows] == list(range(1, STEPS + 1))
    assert [row[0] for row in trained["whole"].logged] == [1]  # log_freq=10 stays what it was
    assert (run.status, run.metadata["framework"]) == ("finished", "torchtitan")
    assert run.metadata["accumulation"] == 2


def test_recording_changes_no_bit_of_a_training(alone: Alone) -> None:
    folder, _ = alone
    assert differing(folder / "whole", folder / "truth") == []


def test_a_training_that_begins_anew_does_not_touch_a_run(alone: Alone) -> None:
    folder, trained = alone
    assert "already holds a run" in trained["anew"].error
    assert len(read(folder / "whole").rows) == STEPS


@pytest.mark.parametrize("how", ["selective", "full", "override"])
def test_checkpointing_and_the_other_door_change_no_number(alone: Alone, how: str) -> None:
    folder, trained = alone
    run = read(folder / how)
    assert run.rows == trained["small"].logged
    assert run.cast == {3 * (5 * SMALL + 1)}


@pytest.mark.cell("torchtitan", "exception")
def test_a_loss_that_is_not_finite_is_recorded_and_the_run_has_failed(alone: Alone) -> None:
    folder, trained = alone
    assert "Loss is not finite" in trained["poisoned"].error  # torchtitan's own words
    run = read(folder / "poisoned")
    assert run.rows[0] == trained["small"].logged[0]
    assert (run.rows[1][0], math.isnan(run.rows[1][1])) == (2, True)
    assert (len(run.rows), run.status) == (2, "failed")


@pytest.mark.cell("torchtitan", "save format clean")
def test_a_model_for_hugging_face_has_a_plain_models_keys(alone: Alone) -> None:
    safetensors = pytest.importorskip("safetensors")
    folder, trained = alone
    keys = []
    for name in ("plain", "exported"):
        (file,) = (folder / name / "checkpoint" / "step-3").glob("*.safetensors")
        with safetensors.safe_open(file, "pt") as held:
            names = held.keys()
            keys.append({name: held.get_slice(name).get_shape() for name in names})
    assert keys[0] == keys[1]
    assert len(trained["exported"].converted) == 5 * SMALL  # lm_head is skipped


def test_validation_is_an_event(alone: Alone) -> None:
    folder, trained = alone
    events = [(step, loss) for step, loss in trained["exported"].validated]
    assert len(events) == 2
    expected = [(step, f'{{"metrics": {{"loss": {loss}}}}}') for step, loss in events]
    assert read(folder / "exported").evaluations == expected


def test_experts_are_products_and_the_router_is_left_out(alone: Alone) -> None:
    folder, trained = alone
    names = trained["moe"].converted
    bank = "layers.0.moe.routed_experts.inner_experts."
    own = {name for name in names if not name.startswith(bank)}
    assert own == {"layers.0.attention.qkv_linear.wqkv", "layers.0.attention.wo", "lm_head"}
    assert {name.removeprefix(bank) for name in names} - own == {
        f"{weight}.{expert}" for weight in ("w1_EFD", "w2_EDF", "w3_EFD") for expert in range(4)
    }
    rows = read(folder / "moe").rows
    assert len(rows) == 3
    assert all(math.isfinite(number) for row in rows for number in row)


@pytest.mark.cell("torchtitan", "compile")
def test_compiled_blocks_record_what_eager_ones_do(alone: Alone) -> None:
    folder, trained = alone
    assert trained["compiled"].error == ""
    run = read(folder / "compiled")
    assert run.rows == trained["eager"].logged
    assert run.cast == {3 * 6}


def test_the_commands_of_the_page_are_torchtitans(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    section = page.partition("\n## torchtitan\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    shown = re.findall(r"^    torchrun [^\\\n]*(?:\\\n[^\\\n]*)*", section, re.MULTILINE)
    commands = [shlex.split(text.replace("\\\n", " ")) for text in shown]
    arguments = [words[words.index("torchtitan.train") + 1 :] for words in commands]
    ours = "unclamp.integrations.torchtitan"
    theirs = "torchtitan.models.llama3."
    by_function, by_overrides = run_ranks(1, documented, tmp_path, block, arguments)[0]
    assert by_function == [ours, theirs + "model", theirs + "parallelize"]
    assert by_overrides == [ours, ours, theirs + "parallelize"]


# ---- resumed -----------------------------------------------------------------------------------


@pytest.mark.cell("torchtitan", "resume bit for bit")
def test_a_resumed_training_ends_bit_for_bit_where_the_whole_one_did(
    again: Again, alone: Alone
) -> None:
    folder, trained = again
    assert (trained["resumed"].error, trained["resumed"].updates) == ("", [STEPS])
    assert differing(alone[0] / "whole", folder / "resumed") == []
    run = read(folder / "resumed")
    assert (run.rows, run.status, run.attempts) == (alone[1]["truth"].logged, "finished", 2)


def test_without_scaling_state_a_resume_differs_and_is_warned_of(
    again: Again, alone: Alone
) -> None:
    folder, trained = again
    assert trained["without"].error == trained["plain"].error == ""
    assert len(differing(alone[0] / "whole", folder / "without")) > LAYERS
    assert trained["plain"].updates == [STEPS - SAVED]


# ---- two ranks ---------------------------------------------------------------------------------


def test_rows_of_two_ranks_are_what_torchtitan_logs(both: Both) -> None:
    folder, trained = both
    for rank in range(2):
        run = read(folder / "whole", rank)
        assert run.rows == trained[0]["truth"].logged
        assert run.cast == {3 * 6}
        assert run.metadata["world_size"] == 2


def test_two_ranks_under_fsdp2_resume_bit_for_bit(both: Both) -> None:
    folder, trained = both
    for rank in range(2):
        assert differing(folder / "whole", folder / "resumed", rank) == []
        assert read(folder / "resumed", rank).rows == trained[0]["truth"].logged
    assert read(folder / "resumed").attempts == 2


def test_under_tensor_parallelism_scales_are_the_same_on_all_ranks(both: Both) -> None:
    folder, trained = both
    assert trained[0]["tensor"].error == trained[1]["tensor"].error == ""
    first, second = (states(folder / "tensor", rank) for rank in range(2))
    scales = [name for name in first if name.endswith("_scale")]
    assert len(scales) == 3 * 6
    assert [name for name in scales if not torch.equal(first[name], second[name])] == []
    assert read(folder / "tensor", 0).rows == read(folder / "tensor", 1).rows


def test_under_expert_parallelism_each_rank_casts_its_own_experts(both: Both) -> None:
    folder, trained = both
    assert trained[0]["expert"].error == trained[1]["expert"].error == ""
    with unclamp.RunLog.open(folder / "expert" / "unclamp") as log:
        cast = log.sql(
            "SELECT DISTINCT casts.rank, fqn FROM casts JOIN sites USING (site) "
            "WHERE fqn LIKE '%w1_EFD.%'"
        ).to_pylist()
    names = {rank: {r["fqn"][-1] for r in cast if r["rank"] == rank} for rank in range(2)}
    assert names == {0: {"0", "1"}, 1: {"2", "3"}}
