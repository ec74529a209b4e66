"""No search of an explanation goes on for ever."""

import signal
from collections.abc import Iterator

import pytest

from patience import PATIENCE_S


@pytest.fixture(autouse=True)
def time_out() -> Iterator[None]:
    """End a search that goes on and on."""

    def end(*_: object) -> None:
        raise TimeoutError(f"expected an answer within {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(PATIENCE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
