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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a name that may differ between two processes, which pytest-xdist cannot distribute.

    The order of a set depends on whether its module was compiled or loaded from a cached file,
    and an address is another one in each process.
    """
    unstable = [item.nodeid for item in items if UNSTABLE.search(item.nodeid)]
    if unstable:
        raise pytest.UsageError(f"give these tests stable ids: {', '.join(unstable)}")
