"""torchtitan's own Trainer, on CPUs: converted, recorded, checkpointed, resumed.

Each process imports torchtitan once and trains several times; `titan` has what that takes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import unclamp
from ranks import run_ranks

pytest.importorskip("torchtitan")

LAYERS = 31
"""Linear layers of torchtitan's llama3 debug model."""
STEPS = 5
SAVED = 3
Row = tuple[int, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, read."""

    rows: list[Row]
    status: str
    sites: int
    cast: set[int]
    attempts: int
    metadata: dict[str, Any]
    ranks: int


def read(folder: Path, rank: int = 0) -> Run:
    with unclamp.RunLog.open(folder) as log:
        rows = log.sql(
            f"SELECT step, loss, grad_norm, lr FROM steps WHERE rank = {rank} ORDER BY 1"
        )
        cast = log.sql(
            f"SELECT step, count(DISTINCT site) AS n FROM casts WHERE rank = {rank} GROUP BY 1"
        )
        return Run(
            rows=[tuple(row.values()) for row in rows.to_pylist()],
            status=log.header.status,
            sites=len(log.named_sites()),
            cast=set(cast["n"].to_pylist()),
            attempts=len(log.attempts),
            metadata=dict(log.header.metadata),
            ranks=len(log.ends()),
        )


def truth(folder: Path, **changes: Any) -> Any:
    """Train converted, unrecorded, and logged by torchtitan at each step."""
    import titan

    config = titan.llama(folder, metrics__log_freq=1, **changes)
    own = config.model_spec.parallelize_fn

    def parallelize(model: Any, **kwargs: Any) -> Any:
        unclamp.convert(model, unclamp.Recipe())
        return own(model, **kwargs)

    config.model_spec.parallelize_fn = parallelize
    return titan.train(config)


def one_process(rank: int, folder: Path) -> dict[str, Any]:
    import titan

    from unclamp.integrations.torchtitan import with_unclamp

    recipe = unclamp.Recipe()
    accumulated = {"training__global_batch_size": 4, "training__steps": STEPS}
    saved = {"checkpoint__enable": True, "checkpoint__interval": SAVED}
    config = titan.llama(folder / "whole", **accumulated, **saved)
    return {
        "truth": truth(folder / "truth", **accumulated),
        "whole": titan.train(with_unclamp(config, recipe)),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("titan")
    return folder, run_ranks(1, one_process, folder)[0]


def test_all_layers_of_the_debug_model_are_converted_and_all_sites_cast(alone: Any) -> None:
    folder, trained = alone
    run = read(folder / "whole" / "unclamp")
    assert len(trained["whole"].converted) == LAYERS
    assert (run.sites, run.cast) == (3 * LAYERS, {3 * LAYERS})
