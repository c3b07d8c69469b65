"""Text that a trainer printed: `key: value`, `key=value` or `key value`, under `Epoch N` or beside it.

A name keeps what its line says before it: `Val: loss 0.4, acc 0.9` has "val/loss" and "val/acc".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from fastema.advisor.metric_names import is_metric, known_mode_of, split_of, words_of
from fastema.advisor.readers.rows import Row, number_of, row_of

_N = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\b(?:nan|inf)\b"
_NOISE = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]"  # colours
    r"|\d{4}[-/]\d\d?[-/]\d\d?(?:[T ])?|\b\d\d/\d\d(?= \d\d:\d\d)"  # dates
    r"|\b\d{1,3}:\d\d(?::\d\d)?(?:[.,]\d+)?\b"  # times
    r"|\b(?:INFO|DEBUG|WARNING)\b"
)
_WRAPPED = re.compile(r"(?:tensor|np\.\w+|numpy\.\w+|torch\.\w+)\(\s*([^,()]*?)\s*(?:,[^()]*)?\)")
_EPOCH = re.compile(
    r"(?:\bep(?:och)?\b(?:\s*\((?P<split>\w+)\))?['\"]?\s*[#:=]?\s*[\[(]?\s*|\btrain:\s*\[?\s*(?=\d+\s*(?:\[|/\d+\]\s*\[))"
    r"|^\s*\[\s*(?=\d+/\d+\]))"
    r"(?P<epoch>\d+(?:\.\d+)?)(?![\d.]*[%A-Za-z])\s*(?:(?:/|of)\s*(?P<total>\d+))?\s*[\])]?"
    r"(?:\s*\[\s*(?P<step>\d+)\s*/\s*(?P<steps>\d+)(?:\s*\(\s*\d+%\))?\s*\])?",
    re.I,
)
_STEP = re.compile(
    r"\b(?:iter(?:ation)?s?|(?:global[_ ])?step|num_updates|updates?)\b(?:\s*\((?P<split>\w+)\))?['\"]?\s*[#:=]?\s*"
    r"[\[(]?\s*(?P<step>\d+(?:,\d{3})*)(?![\d.]*[%A-Za-z])\s*(?:/\s*(?P<total>\d+))?\s*[\])]?",
    re.I,
)
# Whose numbers follow on the line: "Val:", "[EVAL]", "Test set:", "valid |", "Test (EMA):".
_HEADED = re.compile(
    r"(?<![\w/])(?P<word>train(?:ing)?|val(?:id(?:ation)?)?|eval(?:uation)?|test(?:ing)?|dev|ema|base|raw)"
    r"(?:\s+(?:set|results?|metrics?|stats|model|weights))?\s*(?P<ema>\(ema\))?\s*(?P<mark>[:\])|])?(?!\w|\s*\w+\s*=?\s*\[)",
    re.I,
)
_PAIR = re.compile(
    rf"(?P<name>[A-Za-z_](?:[\w@/.+\-]|[ ](?=[\w@.])|\((?:ema|base)\))*?)['\"]?\s*(?P<sep>[:=]|(?:\bis\b)|\s)\s*['\"]?"
    rf"(?P<number>{_N})['\"]?(?P<percent>\s?%)?(?!\w|\.\d|\s*/\s*\d|\s*[:=]\s*[-+.\d])"
    rf"(?:\s*\(\s*(?P<mean>\d[\d.]*(?:[eE][-+]?\d+)?)\s*%?\s*\))?",
    re.I,
)
_LIST = re.compile(r"(?P<name>[A-Za-z_][\w@/.\- ]*?)\s*[:=]?\s*\[(?P<cells>\s*[-+.\dnan, eE]+)\]")
_COCO = re.compile(r"Average Precision\s.*IoU=0\.50:0\.95\s*\|\s*area=\s*all.*\]\s*=\s*(?P<number>[-.\d]+)")
# Detectron2's log.txt: a line with the task, one with the names, one with the numbers.
_COPYPASTE = re.compile(r"\bcopypaste:\s*(?:Task:\s*(?P<task>\S+)|(?P<cells>.*))")
_METER = re.compile(r"\[\s*\d+/\d+")
_PROGRESS = re.compile(r"\bit/s\b|\bs/it\b|\d%\||\b(?:test|val\w*|eval\w*)(?: \(ema\))?:\s*\[\s*\d+/\d+\]", re.I)
_NO_NAME = re.compile(
    r"\b(?:from|to|than|best|max|min|lowest|highest|saved|saving|improved"
    r"|not|did|new|at|in|after|with|target|was|took)\b"
)
# Metrics' names that prose has before a number as well.
_COMMON = re.compile(r"\b(?:top|rank|return|returns|exact|success|hit|hits|reward|measure|ar|error|errors|distance)\b")
_SETTINGS = re.compile(r"^wandb:|\bNamespace\(|^\s*[\w.]*(?:args|config|cfg)\b", re.I)
# What a line says of the epochs before it.
_FELL_FROM = re.compile(rf"\(\D*?\bfrom\s+(?P<before>{_N})\)", re.I)
_STUCK_FOR = re.compile(r"\((?:stuck|unchanged|flat|no improvement)\D*(?P<epochs>\d+) epochs\)", re.I)
_BETWEEN = re.compile(
    rf"(?P<name>[A-Za-z][\w@/ ]*?)\s+(?:oscillates|swings|fluctuates|jumps|varies)\s+between\s+(?P<low>{_N})\s*"
    rf"(?:-|\u2013|to|and)\s*(?P<high>{_N})",
    re.I,
)


def read_text(text: str) -> tuple[list[Row], dict[str, float]]:
    """Return the rows and the planned length ("steps", "epochs") of a printed log; no rows if it holds no metric."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    lines = [line for line in lines if not _SETTINGS.search(line)]
    # Progress within an epoch has numbers of one batch, under the names of the epoch's: only if there is nothing else.
    for kept in ([line for line in lines if not _PROGRESS.search(line)], lines):
        rows = _Rows()
        for line in kept:
            rows.add(line)
        names = {name for row in rows.rows for name in row if is_metric(name) and known_mode_of(name)}
        if any(split_of(name) != "train" for name in names) or (names and kept is lines):
            return rows.rows, rows.totals
    return [], {}


class _Rows:
    """Rows so far; a row ends where the epoch or the step changes, or a name comes again."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.totals: dict[str, float] = {}
        self._clock: Row = {}
        self._names: dict[tuple[str, ...], str] = {}
        self._task = ""
        self._pasted: list[str] = []

    def add(self, line: str) -> None:
        line = _WRAPPED.sub(r"\1", _NOISE.sub(" ", line))
        if (cells := _object_in(line)) is not None:
            self._new_clock({})
            self._put(row_of(cells), overwrite=False)
            return
        if match := _COCO.search(line):
            self._put({"val/AP": float(match["number"])}, overwrite=False)
            return
        if match := _COPYPASTE.search(line):
            self._paste(match)
            return
        line, clock, split = self._clock_of(line)
        self._new_clock(clock)
        if match := _BETWEEN.search(line):
            self.rows += [{match["name"]: float(match[end])} for end in ("low", "high") * 4]
            return
        found = dict(_pairs(line, split))
        # An evaluation that shows its progress: the last line has the whole.
        self._put(
            found, overwrite=bool(_METER.search(line)) and any(split_of(name) in ("val", "test") for name in found)
        )
        self._remember(line, found)

    def _paste(self, match: re.Match[str]) -> None:
        if match["task"]:
            self._task = match["task"]
            return
        cells = match["cells"].split(",")
        numbers = [number_of(cell) for cell in cells]
        if None in numbers:
            self._pasted = cells
        elif len(cells) == len(self._pasted):
            names = (f"{self._task}/{name}" for name in self._pasted)
            self._put(row_of(dict(zip(names, cells, strict=True))), overwrite=False)

    def _clock_of(self, line: str) -> tuple[str, Row, str | None]:
        """Return the line without its epoch and step, these, and whose numbers the line has."""
        clock: Row = {}
        split = None
        if match := _EPOCH.search(line):
            clock["epoch"] = float(match["epoch"])
            # An epoch with its iteration is a line of the training: "Epoch: [3][ 50/100]".
            of_training = match[0].lower().startswith("train") or (match["step"] and not _HEADED.search(line))
            split = match["split"] or ("train" if of_training else None)
            if match["total"]:
                self.totals["epochs"] = float(match["total"])
            if match["step"] and split_of(split or "") not in ("val", "test"):
                clock["iter"] = float(match["step"])
            line = f"{line[: match.start()]} | {line[match.end() :]}"
        if match := _STEP.search(line):
            split = match["split"] or split
            if split_of(split or "") not in ("val", "test"):
                clock["step"] = float(match["step"].replace(",", ""))
                if match["total"]:
                    self.totals["steps"] = float(match["total"])
            line = f"{line[: match.start()]} | {line[match.end() :]}"
        return line, clock, split

    def _new_clock(self, clock: Row) -> None:
        if any(self._clock.get(name) != value for name, value in clock.items()):
            kept = {} if "epoch" in clock else {name: self._clock[name] for name in ("epoch",) if name in self._clock}
            self._clock = {**kept, **clock}
            self.rows.append(dict(self._clock))

    def _put(self, found: Row, overwrite: bool) -> None:
        found = {self._names.setdefault(words_of(name), name): value for name, value in found.items()}
        if not found:
            return
        if not self.rows:
            self.rows.append({})
        row = self.rows[-1]
        if not overwrite and any(row.get(name, value) != value for name, value in found.items()):
            row = dict(self._clock)
            self.rows.append(row)
        row.update(found)

    def _remember(self, line: str, found: Row) -> None:
        """Add the rows that a remark tells of, where no row before has the metric."""
        name = next((name for name in found if is_metric(name)), None)
        if name is None or any(name in row for row in self.rows[:-1]):
            return
        if match := _FELL_FROM.search(line):
            self.rows.insert(-1, {name: float(match["before"])})
        elif match := _STUCK_FOR.search(line):
            epoch, count = self._clock.get("epoch"), int(match["epochs"])
            for back in range(count - 1, 0, -1):
                self.rows.insert(-1, {name: found[name], **({} if epoch is None else {"epoch": epoch - back})})


def _object_in(line: str) -> Mapping[str, object] | None:
    """Return a JSON object that ends a line."""
    start = line.find('{"')
    if start < 0:
        return None
    try:
        found = json.loads(line[start:])
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _pairs(line: str, split: str | None) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of a line without its clock."""
    heads = list(_HEADED.finditer(line))
    one_split = len({split_of(head["word"]) for head in heads} - {None}) == 1
    for match in _LIST.finditer(line):
        if (number := number_of(f"[{match['cells']}]")) is not None and _is_name(match["name"], certain=False):
            yield _named(match["name"], line, match.start(), heads, one_split, split), number
    meter = bool(_METER.search(line))
    for match in _PAIR.finditer(_LIST.sub(lambda found: " " * len(found[0]), line)):
        if not _is_name(match["name"], certain=match["sep"] in ":="):
            continue
        number = number_of(match["mean"] if meter and match["mean"] else match["number"])
        if number is not None:
            yield _named(match["name"], line, match.start(), heads, one_split, split), number


def _is_name(name: str, certain: bool) -> bool:
    words = words_of(name)
    joined = " ".join(words)
    if not words or len(words) > 6 or _NO_NAME.search(joined) or name.lower() in ("train", "val", "test", "valid"):
        return False
    return (
        certain or "lr" in words or (len(words) <= 5 and known_mode_of(name) is not None and not _COMMON.search(joined))
    )


def _named(name: str, line: str, at: int, heads: list[re.Match[str]], one_split: bool, split: str | None) -> str:
    """Return the name with whose numbers it is of, as far as the line says so before it."""
    name = name.strip()
    for i, head in enumerate(heads):
        if head.start() >= at:
            break
        word = head["word"].lower()
        if word in ("ema", "base", "raw"):
            # "EMA: acc 0.9", "EMA Val loss 0.4, acc 0.9"
            before_split = i + 1 < len(heads) and not line[head.end() : heads[i + 1].start()].strip()
            if head["mark"] or before_split:
                split = "/".join(filter(None, [split_of(split or ""), word if word == "ema" else None]))
        elif head["mark"] or one_split:
            split = f"{word}/ema" if head["ema"] or split == "ema" else word
    if not split or (split_of(name) is not None and "ema" not in split):
        return name
    own = split_of(split)
    return f"{split}/{name}" if own is None or split_of(name) is None else f"ema/{name}"
