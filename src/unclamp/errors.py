"""Every error a user can meet.

UnclampError
├── RecipeError        a recipe that makes no sense, or cannot be read
├── ConvertError       a model that cannot be converted or reverted as asked
├── UnsupportedError   a request this build, device or dtype cannot serve
├── RunLogError        a folder that is not the run log it should be
├── AnalysisError      a curve that cannot be read or judged as asked
├── ReplayError        steps that cannot be replayed, or a spike that cannot be explained
└── StudyError         a study whose configuration or data cannot be used

A message says what was expected, what came, and what to do about it.
"""


class UnclampError(Exception):
    """Base of all errors raised for a reason the user can mend."""


class RecipeError(UnclampError, ValueError):
    """A recipe names something unknown, or a combination that makes no sense."""


class ConvertError(UnclampError, ValueError):
    """A model cannot be converted or reverted as asked; it is left unchanged."""


class UnsupportedError(UnclampError, NotImplementedError):
    """This build, device or dtype cannot do what was asked."""


class RunLogError(UnclampError, ValueError):
    """A folder is not a run log, is another version's, or is already in use."""


class ReplayError(UnclampError, ValueError):
    """Snapshot, code or batches for a replay are missing, or do not belong together."""


class StudyError(UnclampError, ValueError):
    """A study's configuration, text or output folder cannot be used."""


class AnalysisError(UnclampError, ValueError):
    """A file holds no curve or explanation that can be read; or a definition is unknown."""


class UnclampWarning(UserWarning):
    """Something was left out or did not match; the work goes on."""
