"""Scalars from TensorBoard's event files, through the optional package tensorboard."""

import warnings
from pathlib import Path

from unclamp.analysis.records import Recorded
from unclamp.errors import AnalysisError


def read_event_files(path: Path) -> Recorded:
    """Return the scalars of an event file, or of the event files in one folder.

    Each tag is a column with steps of its own, in the order of writing.

    Raises:
        AnalysisError: tensorboard is not installed, or there is no scalar.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        try:
            from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
                EventAccumulator,
            )
            from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415
        except ImportError as error:
            raise AnalysisError(
                "reading TensorBoard events needs the package tensorboard; "
                "install it with: pip install 'unclamp[tensorboard]'"
            ) from error
        events = EventAccumulator(
            str(path), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False
        ).Reload()
        columns = {}
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            columns[tag] = ([p.step for p in points], [p.value for p in points])
        for tag in events.Tags()["tensors"]:  # as TensorFlow 2 writes scalars
            points = events.Tensors(tag)
            arrays = [make_ndarray(p.tensor_proto) for p in points]
            if all(array.size == 1 and array.dtype.kind in "fiu" for array in arrays):
                columns[tag] = ([p.step for p in points], [float(a.item()) for a in arrays])
    if not columns:
        raise AnalysisError(f"{path} holds no scalars; is it an event file of TensorBoard?")
    return Recorded(columns=columns, source=f"TensorBoard events {path.name}")
