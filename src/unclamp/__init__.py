"""FP8 training for PyTorch in which clamping is measured, explained and prevented.

Names that need torch are loaded at first use, so that a run's log can be opened, analysed and
rendered on a machine without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unclamp.covered import CoverageReport
from unclamp.errors import (
    AnalysisError,
    ConvertError,
    RecipeError,
    ReplayError,
    RunLogError,
    StudyError,
    UnclampError,
    UnclampWarning,
    UnsupportedError,
)
from unclamp.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, Format
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.scaling import (
    MX,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Scaling,
    Static,
)
from unclamp.version import __version__

if TYPE_CHECKING:
    from unclamp.analysis.explanation import Explanation
    from unclamp.analysis.steering import Backtest, Rule, backtest
    from unclamp.autopilot import Autopilot
    from unclamp.explain import Snapshots, Training, explain_spike
    from unclamp.integrations.transformer_engine import record_transformer_engine
    from unclamp.nn import (
        Attention,
        ConvertReport,
        EvaluationCounts,
        Fp8Linear,
        Observation,
        RevertReport,
        ScalingState,
        SwitchReport,
        attention,
        convert,
        coverage,
        evaluation_counts,
        first_and_last,
        grouped_mm,
        observe,
        refresh,
        revert,
        step,
        switch,
        weights_only,
    )
    from unclamp.numerics import Quantized, cast, dequantize, quantize, scale_from_amax
    from unclamp.parallel import GatherReport, gather_codes
    from unclamp.runlog import RunLog
    from unclamp.telemetry import Every, MLflow, Recorder, TensorBoard, WandB

_LAZY = {
    "Attention": "unclamp.nn",
    "attention": "unclamp.nn",
    "ConvertReport": "unclamp.nn",
    "EvaluationCounts": "unclamp.nn",
    "Fp8Linear": "unclamp.nn",
    "evaluation_counts": "unclamp.nn",
    "refresh": "unclamp.nn",
    "RevertReport": "unclamp.nn",
    "ScalingState": "unclamp.nn",
    "convert": "unclamp.nn",
    "coverage": "unclamp.nn",
    "revert": "unclamp.nn",
    "Observation": "unclamp.nn",
    "observe": "unclamp.nn",
    "SwitchReport": "unclamp.nn",
    "switch": "unclamp.nn",
    "step": "unclamp.nn",
    "first_and_last": "unclamp.nn",
    "grouped_mm": "unclamp.nn",
    "weights_only": "unclamp.nn",
    "GatherReport": "unclamp.parallel",
    "gather_codes": "unclamp.parallel",
    "Quantized": "unclamp.numerics",
    "cast": "unclamp.numerics",
    "dequantize": "unclamp.numerics",
    "quantize": "unclamp.numerics",
    "scale_from_amax": "unclamp.numerics",
    "RunLog": "unclamp.runlog",
    "Autopilot": "unclamp.autopilot",
    "Backtest": "unclamp.analysis.steering",
    "Rule": "unclamp.analysis.steering",
    "backtest": "unclamp.analysis.steering",
    "Explanation": "unclamp.analysis.explanation",
    "Snapshots": "unclamp.explain",
    "Training": "unclamp.explain",
    "explain_spike": "unclamp.explain",
    "record_transformer_engine": "unclamp.integrations.transformer_engine",
    "Every": "unclamp.telemetry",
    "MLflow": "unclamp.telemetry",
    "Recorder": "unclamp.telemetry",
    "TensorBoard": "unclamp.telemetry",
    "WandB": "unclamp.telemetry",
}

__all__ = [
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FORMATS",
    "MX",
    "AnalysisError",
    "Attention",
    "Autopilot",
    "Backtest",
    "ConvertError",
    "ConvertReport",
    "CoverageReport",
    "Delayed",
    "Dynamic",
    "EvaluationCounts",
    "Every",
    "Explanation",
    "Format",
    "Fp8Linear",
    "GatherReport",
    "Guarded",
    "HighPrecision",
    "MLflow",
    "Observation",
    "PerBlock",
    "PerRow",
    "PerTensor",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Recorder",
    "ReplayError",
    "RevertReport",
    "Rule",
    "RunLog",
    "RunLogError",
    "Scaling",
    "ScalingState",
    "SiteName",
    "Snapshots",
    "Static",
    "StudyError",
    "SwitchReport",
    "TensorBoard",
    "Training",
    "UnclampError",
    "UnclampWarning",
    "UnsupportedError",
    "WandB",
    "__version__",
    "attention",
    "backtest",
    "cast",
    "convert",
    "coverage",
    "dequantize",
    "evaluation_counts",
    "explain_spike",
    "first_and_last",
    "gather_codes",
    "grouped_mm",
    "observe",
    "quantize",
    "record_transformer_engine",
    "refresh",
    "revert",
    "scale_from_amax",
    "step",
    "switch",
    "weights_only",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        hint = import_module("unclamp.errors").did_you_mean(name, __all__)
        raise AttributeError(f"module 'unclamp' has no attribute {name!r}{hint}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
