"""Kernels write to addresses: whoever calls them may let go of memory only when all have ended."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from unclamp.numerics.compiled import run


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_when_a_call_raises_no_other_one_is_still_at_work():
    begun, ended = threading.Event(), threading.Event()

    def fail() -> None:
        assert begun.wait(30)
        raise KeyboardInterrupt

    def work() -> None:
        begun.set()
        time.sleep(0.3)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run([(fail,), (work,)])
    assert ended.is_set()


def test_results_come_in_the_order_of_the_calls():
    assert run([(time.sleep, 0.05), (abs, -2), (max, 3, 4)]) == [None, 2, 4]
