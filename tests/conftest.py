import gc
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("unclamp", derandomize=True, deadline=None)
settings.load_profile("unclamp")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


UNSTABLE = re.compile(r"frozenset\(|\bset\(| at 0x[0-9a-f]+")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _refuse_unstable(items)
    _keep_together(items)


def _refuse_unstable(items: list[pytest.Item]) -> None:
    """Refuse a name that may differ between two processes, which pytest-xdist cannot distribute.

    The order of a set depends on whether its module was compiled or loaded from a cached file,
    and an address is another one in each process.
    """
    unstable = [item.nodeid for item in items if UNSTABLE.search(item.nodeid)]
    if unstable:
        raise pytest.UsageError(f"give these tests stable ids: {', '.join(unstable)}")


def _keep_together(items: list[pytest.Item]) -> None:
    """Give tests that share a fixture of their module to one worker, so that it is made once."""
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        made = {} if fixtures is None else fixtures.name2fixturedefs
        if item.get_closest_marker("xdist_group"):
            continue
        if any(each[-1].scope == "module" for each in made.values()):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)
def pytest_name_groups(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the group of a test in its id, by which pytest-xdist keeps groups together.

    pytest-xdist 3.8 does so by an attribute that pytest 9.2 has no more, to no effect.
    """
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        mark, own = item.get_closest_marker("xdist_group"), getattr(item, "_id", None)
        if mark is not None and own is not None and "@" not in item.nodeid.rpartition("]")[2]:
            named = type(own).parse(f"{item.nodeid}@{mark.args[0]}")
            item._id = named  # pyright: ignore[reportAttributeAccessIssue]


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of all collections of garbage: a million objects."""
    gc.collect()
    gc.freeze()
