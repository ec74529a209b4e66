"""One line that a trainer printed: its names and numbers, and whether an evaluation wrote it.

No format is asked for by name. Besides `name value` pairs, dicts and JSON, the counts are known
that tools print without a name: `[1][50/7330]`, `| 10/100 [00:01<...`, `10/1875 [====`.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from unclamp.analysis.curve_files import flat
from unclamp.analysis.records import EPOCH_NAMES, STEP_NAMES
from unclamp.analysis.selections import EVALUATION, EVALUATION_WORDS, plain_name

COLOURS = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;;[^\x1b\a]*(?:\x1b\\|\a)|\[(?:\d{1,3};)*\d{1,2}m"
)
"""Also without the escape character, which copying a terminal's text may lose."""
_WORD = r"[A-Za-z][\w/.-]{0,99}"
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_NOT_FINITE = r"nan(?:\(\w*\))?|inf(?:inity)?|1\.#\w+"
_PAIR = re.compile(
    rf"(?<![\w.])(?P<name>{_WORD}(?: {_WORD}){{0,7}}(?:(?<!epoch)(?<!iter) ?\([A-Za-z][\w -]*\))?)"
    r"[\"']?\s*(?:[:=#]{0,2}|[-=]>|→)\s*"
    rf"(?:tensor\(|[\[(]\s*)?(?P<value>[-+]?(?:{_NOT_FINITE}|{_NUMBER}))"
    r"(?P<of>\s*/\s*\d+)?(?=[\s;:|)\]}<]|,(?!\d)|\.?$|\.\s)",
    re.IGNORECASE,
)
_EVALUATES = re.compile(
    rf"(?<![\w./\\-])(?:eval\w*|valid\w*|saving dict|{'|'.join(EVALUATION_WORDS)})(?![\w/-]|\.\w)",
    re.IGNORECASE,
)
"""A word of its own, not a part of a path or of a name."""
_LEVEL_WORD = re.compile(r"^(?:(?:debug|info|warning|error)\s+)+", re.IGNORECASE)
_NO_STEP = re.compile(r"\b(?:per|time|ms|sec|s|max|total|num|warmup|every|avg|average|mean|best|"
                      r"last|save|remaining|next)\b", re.IGNORECASE)  # fmt: skip
"""Words before "step" that make it something else's unit or bound."""
_DICT = re.compile(r"\{\s*['\"].*\}")
_BARE_NUMBER = re.compile(r"([:\[,]\s*)(-?(?:nan|inf))(?=\s*[,}\]])")
_COUNT = re.compile(r"(?<![\d/.:\w-])(\d+)\s*/\s*(\d+)(?![\d/.\w]|\s+\d\d:\d\d:\d\d)")
"""`10/100`, and no date: that has a year, or a time behind it."""
_PAIR_OF_COUNTS = re.compile(r"\[\s*(?P<epoch>\d+)\s*,\s*(?P<step>\d+)\s*\]")
_TWO_COUNTS = re.compile(r"\[\s*(?P<epoch>\d+)\s*/\s*\d+\s*\]\s*\[\s*(?P<step>\d+)\s*/\s*\d+\s*\]")
_TIMM = re.compile(
    r"^\W*(?:train|test|val\w*|eval\w*):\s*(?P<epoch>\d+)\s*\[\s*(?P<step>\d+)\s*/\s*\d+",
    re.IGNORECASE,
)
_EPOCH_THEN_COUNT = re.compile(
    r"epoch(?:\(\w+\))?\s*[:=]?\s*[\[(]?\s*(?P<epoch>\d+)(?:\s*/\s*\d+)?\s*[\])]?\s*[:|,]?\s*"
    r"\[\s*(?P<step>\d+)\s*(?:/\s*\d+|\])",
    re.IGNORECASE,
)
"""`Epoch [1][50/7330]`, `Epoch(train) [1][10/25]`, `Epoch: [0]  [ 10/1251]`,
`Train Epoch: 1 [640/60000 (1%)]`."""
_LOSS_AT = re.compile(
    r"(?P<name>(?:[A-Za-z]+ ){0,3}loss) (?:at|after|for|in) (?:\w+ )?"
    r"(?P<at>step|iteration|iter|epoch|batch)\s*[:#]?\s*(?P<value>\d+)\s*[:=|,-]\s*(?=[-+\dni])",
    re.IGNORECASE,
)
"""`Average loss at step 100: 2.31`, in which the number behind the loss is the step."""
_BRACKETED_RANK = re.compile(r"\[(?:rank|default|trainer|gpu)\s*[:=]?(\d+)\]", re.IGNORECASE)
_LABEL = re.compile(r"\s*[\[(<]([A-Za-z][\w.-]*)[\])>]\s")
"""What may tell the runs apart that print on one console: `[bf16] step 5 loss 2.3`."""
_LEVEL = re.compile(r"rank\d*|default\d*|debug|info|warn\w*|error|train\w*", re.IGNORECASE)
_SRUN_LABEL = re.compile(r"^\s*(\d+):\s")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is on a line.

    Attributes:
        row: Values by name, as text or number; the first of several of one name.
        words: The text without names and values, as far as the first loss: what it says of them.
    """

    row: dict[str, object] = field(default_factory=dict)
    words: str = ""

    @property
    def losses(self) -> list[str]:
        """The plain names with "loss" in them."""
        return [plain for name in self.row if "loss" in (plain := plain_name(name))]

    @property
    def says_evaluation(self) -> bool:
        """Whether a word before the loss says that the line is of an evaluation."""
        return _EVALUATES.search(self.words) is not None

    @property
    def step(self) -> object | None:
        """The value that is called a step; None without one."""
        return next((v for n, v in self.row.items() if plain_name(n) in STEP_NAMES), None)


def read_line(text: str) -> Line:
    """Return the names and values on a line."""
    text = COLOURS.sub("", text)
    row: dict[str, object] = {}
    if (found := _DICT.search(text)) is not None:
        record = _record(found.group())
        if record is not None:
            row = flat(record)
            return Line(row=row | _rank(text[: found.start()], row), words=text[: found.start()])
    text = _LOSS_AT.sub(r"\g<at> \g<value> \g<name>: ", text)
    words, at = [], 0
    past_loss = False
    for name, value, begin, end in _pairs(text):
        row.setdefault(name, value)
        if not past_loss:
            words.append(text[at:begin])
        past_loss |= "loss" in name.lower()
        at = end
    row |= _unnamed_counts(text, row)
    if (label := _LABEL.match(text)) is not None and not _LEVEL.fullmatch(label[1]):
        row.setdefault("label", label[1])
    return Line(row=row | _rank(text, row), words=" ".join(words))


def _record(text: str) -> dict[str, object] | None:
    """Return a dict as Python or JSON wrote it, with a bare nan or inf; None if it is none."""
    for parse in (ast.literal_eval, json.loads):
        try:
            record = parse(_BARE_NUMBER.sub(r"\1'\2'", text) if parse is ast.literal_eval else text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(record, dict):
            return {str(name): value for name, value in record.items()}
    return None


def _pairs(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, value, and where the pair begins and ends.

    "train step 5": what stands before a step's or an epoch's name says nothing of the number, but
    something of the line, and so does not belong to the pair. Of a loss it does.
    """
    for pair in _PAIR.finditer(text):
        begin = pair.start("name")
        name = _LEVEL_WORD.sub("", pair["name"])
        begin += len(pair["name"]) - len(name)
        last = name.split()[-1] if name else ""
        before = name[: len(name) - len(last)]
        counts = plain_name(last) in (*STEP_NAMES, *EPOCH_NAMES, "rank")
        of_loss = "loss" in plain_name(name) and EVALUATION.search(plain_name(name))
        if _EVALUATES.fullmatch(name) and pair["value"].isdigit():
            begin += len(pair["name"])  # "Validation: 10/30": a word of the line, and a count
        if counts and not of_loss and not _NO_STEP.search(before):
            begin += len(before)
            name = last
        yield name, pair["value"].replace(",", ""), begin, pair.end()


def _unnamed_counts(text: str, row: dict[str, object]) -> dict[str, object]:
    """Return step and epoch that a line counts without naming them, where it names none."""
    plain = {plain_name(name) for name in row}
    if plain & set(STEP_NAMES):
        return {}
    for shape in (_TWO_COUNTS, _TIMM, _PAIR_OF_COUNTS, _EPOCH_THEN_COUNT):
        if (found := shape.search(text)) is not None:
            counts: dict[str, object] = {"step": found["step"]}
            return counts if plain & set(EPOCH_NAMES) else {"epoch": found["epoch"]} | counts
    named = [(m.start("name"), m.end()) for m in _PAIR.finditer(text)]
    for count in _COUNT.finditer(text):
        inside = any(begin <= count.start() < end for begin, end in named)
        if not inside and int(count[1]) <= int(count[2]):
            return {"step": count[1]}
    return {}


def _rank(text: str, row: dict[str, object]) -> dict[str, object]:
    """Return the rank that a launcher puts before each line; `0: ` is one where a step is named."""
    if any(plain_name(name) == "rank" for name in row):
        return {}
    if (found := _BRACKETED_RANK.search(text)) is not None:
        return {"rank": found[1]}
    has_step = any(plain_name(name) in STEP_NAMES for name in row)
    label = _SRUN_LABEL.match(text) if has_step else None
    return {"rank": label[1]} if label is not None else {}
