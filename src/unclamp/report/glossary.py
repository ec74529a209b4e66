"""What the report's words mean: one list for page, headings and terminal. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Term:
    """A word of the report.

    Attributes:
        word: As it stands in headings and sentences.
        short: Its meaning in a line of a terminal, without full stop.
        meaning: The whole of it, as sentences.
        where: The pages that use it: "study", "run" or "both".
    """

    word: str
    short: str
    meaning: str
    where: str = "both"

    @property
    def anchor(self) -> str:
        """The id of its entry on a page."""
        return "term-" + self.word.replace(" ", "-").lower()

    def is_on(self, page: str) -> bool:
        """Return whether a page of this kind, "study" or "run", uses the word."""
        return self.where in (page, "both")


GLOSSARY = (
    Term(
        word="arm",
        short="one way of scaling, trained on the same weights and batches as the others",
        meaning="One way of scaling in a study. All arms of a seed begin with the same weights "
        "and see the same batches.",
        where="study",
    ),
    Term(
        word="hp",
        short="high precision: the training without FP8",
        meaning="High precision: the same training without FP8. What hp does too is not the "
        "doing of FP8.",
        where="study",
    ),
    Term(
        word="baseline",
        short="the arm that others are compared with: dynamic",
        meaning="The arm that the others are compared with, seed by seed: dynamic, which takes "
        "each scale from the tensor itself and so clamps nothing.",
        where="study",
    ),
    Term(
        word="site",
        short="one operand (input, weight or grad_output) of one matrix product",
        meaning="One operand of one matrix product: the input, the weight or the gradient of the "
        "output (grad_output) of a layer.",
    ),
    Term(
        word="cast",
        short="the conversion of one tensor to FP8",
        meaning="The conversion of one tensor to FP8: it is scaled, rounded and, where it does "
        "not fit, clamped. Of one operand's casts in a step the log keeps one merged record: with "
        "microbatches, or where a module is called several times a step, it stands for several "
        "casts (column microsteps), with the largest amax and the smallest scale of them. "
        "'clamped casts' and means over casts count such a record once; elements are of all.",
    ),
    Term(
        word="clamped",
        short="set to the format's largest value, because it did not fit (log column: saturated)",
        meaning="An element is clamped if it is finite and its rounded value would exceed the "
        "format's largest one, to which it is then set; a cast is clamped if any of its elements "
        "is. The run log's column is called saturated.",
    ),
    Term(
        word="clamp error",
        short="share of a tensor's squares that clamping removed, mean over clamped casts",
        meaning="Sum of squares that clamping removed over the sum of squares of the tensor, "
        "mean over the casts in which anything was clamped. Worst sites are those whose clamp "
        "errors add up to most.",
    ),
    Term(
        word="gradient error",
        short="how much clamping changed a weight's gradient, relative to its size without it",
        meaning="Of a grad_output: the norm of what its clamping changed in the gradient of the "
        "weight, over the norm of that gradient without clamping, over the casts that clamped "
        "and were measured; other weights and steps are not in it. Clamping turns a gradient and "
        "takes of its size. '-' where it was not measured, as between inspected steps on a GPU or "
        "where more than an eighth of the tokens clamped, and for other roles. The run log's "
        "column is called grad_error.",
    ),
    Term(
        word="price of clamping",
        short="how much clamping raised the loss, to first order, in units of the loss",
        meaning="Of an input or weight: the gradient of the loss times what clamping changed, "
        "added up over the clamped elements of a step. Above 0 clamping raised the loss of the "
        "step, below 0 it lowered it. The table has the step in which it was largest. It ranks "
        "sites, and is no measurement: outliers are large, and where gradients clamped in the "
        "same step it is too small. '-' where nothing was clamped or it was not measured, and for "
        "gradients. The run log's column is called price_clamp.",
    ),
    Term(
        word="overshoot",
        short="largest element over the largest value that fits; only where anything was clamped",
        meaning="The largest element over the largest value that its scale can represent, shown "
        "only where anything was clamped. Elements up to half a rounding step above that value "
        "(1.036x for e4m3fn, 1.07x for e5m2) round to it and are not clamped, so an overshoot "
        "begins there.",
    ),
    Term(
        word="underflow",
        short="share of elements that were not zero and became zero",
        meaning="Share of elements that were not zero and became zero.",
    ),
    Term(
        word="re-cast",
        short="casts that guarded scaling repeated with the tensor's own scale",
        meaning="A cast that guarded scaling repeated with the tensor's own scale, because the "
        "predicted one would have clamped.",
    ),
    Term(
        word="spike",
        short="steps far above the level before them (unclamp spikes)",
        meaning="Steps far above the level before them, by the robust definition of unclamp "
        "spikes. Marked with a triangle.",
    ),
    Term(
        word="planted",
        short="steps with a batch that was made to be an outlier",
        meaning="Steps whose batch the study made an outlier on purpose. They are compared apart "
        "and left out of the final loss.",
    ),
    Term(
        word="kind of batch",
        short="steps with one group, the name that recorder.step(group=...) was given",
        meaning="Steps whose batch was given one name by recorder.step(group=...); those without "
        "a name are a kind too. A loss is judged among those of its own kind.",
    ),
    Term(
        word="few-label",
        short="steps with a batch of which only a few bytes are labels",
        meaning="Steps whose batch has only a few labels, over which the loss is the mean. Nothing "
        "is planted. They are compared apart and left out of the final loss.",
    ),
    Term(
        word="final loss",
        short="mean over the last tenth of the steps of finished runs, planted ones left out",
        meaning="Mean over the last tenth of the steps of finished runs, planted steps and those "
        "with few labels left out; then mean over seeds.",
    ),
    Term(
        word="difference",
        short="final loss minus the baseline's on the same seeds, and its 95 % interval",
        meaning="Mean over seeds of an arm's final loss minus the baseline's on the same seed, "
        "with a paired Student t-interval of 95 %. Only an interval that leaves out 0 shows a "
        "difference; half its width is the smallest mean that so many seeds can tell from 0.",
        where="study",
    ),
    Term(
        word="SQNR",
        short="signal to quantisation noise, decibel, of inspected casts only",
        meaning="Sum of squares of the tensor over that of the cast's errors, in decibel: "
        "rounding, underflow and clamping together. One huge element decides it: a tensor with "
        "one may have 60 dB while the rest of it underflows. 'SQNR dB, rows' does not mislead so: "
        "each row (a token; of a weight an output feature) has its own ratio, and it is the "
        "median over rows. Only casts of inspected steps have either, and exponents; '-' where "
        "there was none.",
        where="run",
    ),
)  # fmt: skip

_OF_HEADING = {
    "arm": "arm",
    "final loss": "final loss",
    "difference from dynamic": "difference",
    "loss at planted steps vs dynamic": "planted",
    "spikes, all seeds: planted + other": "spike",
    "kind of batch": "kind of batch",
    "loss at few-label steps vs dynamic": "few-label",
    "spikes, all seeds: few-label + other": "spike",
    "clamped elements": "clamped",
    "clamped casts": "clamped",
    "clamped": "clamped",
    "re-cast": "re-cast",
    "largest overshoot": "overshoot",
    "overshoot": "overshoot",
    "underflow": "underflow",
    "site": "site",
    "clamp error": "clamp error",
    "gradient error": "gradient error",
    "price of clamping": "price of clamping",
    "SQNR dB, min": "SQNR",
    "SQNR dB, mean": "SQNR",
    "SQNR dB, rows": "SQNR",
}
_BY_WORD = {term.word: term for term in GLOSSARY}


def term_of(heading: str) -> Term | None:
    """Return the term that a table's heading is about; None where it needs none."""
    word = _OF_HEADING.get(" ".join(heading.split()))
    return None if word is None else _BY_WORD[word]


def terms_of(headings: Iterable[str], *, also: Iterable[str] = ()) -> list[Term]:
    """Return the terms that tables use, each once, in the glossary's order."""
    used = {term.word for term in map(term_of, headings) if term is not None} | set(also)
    return [term for term in GLOSSARY if term.word in used]
