"""Records: one per implementation and case, and the JSON file that holds those of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Cache = Literal["warm", "cold"]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call. `host_us`: until the call returned, on a GPU, which works on after that."""

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    samples: int
    host_us: float | None = None
    mean_us: float | None = None
    p95_us: float | None = None


@dataclass(frozen=True)
class Record:
    """One implementation on one case. None where a field does not apply or was not measured.

    Args:
        bench: the benchmark, e.g. "update", "swap", "memory: validation".
        impl: name of the implementation, as in the table; `backend`: whose kernels it runs.
        tensors, params: of the model; shadows: number of averages.
        median_us, p10_us, p90_us, min_us, host_us, mean_us, p95_us: see `Timing`.
        bytes_floor: least bytes to read and write; gbps: that over the median, in 1e9 bytes a second.
        copy_share: gbps over that of a plain copy timed in the same rounds.
        launches: kernels and copies on a GPU.
        extra_bytes: peak of memory beyond the model and its shadow.
    """

    bench: str
    case: str
    impl: str
    backend: str
    device: str
    dtype_shadow: str
    dtype_live: str
    tensors: int
    params: int
    shadows: int
    median_us: float | None
    p10_us: float | None
    p90_us: float | None
    host_us: float | None
    bytes_floor: int | None
    gbps: float | None
    copy_share: float | None
    launches: int | None
    extra_bytes: int | None
    versions: dict[str, str]
    min_us: float | None
    samples: int
    cache: Cache
    mean_us: float | None = None
    p95_us: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.impl.startswith("fastema")

    @property
    def time(self) -> float:
        """Return the median of a record that was timed."""
        assert self.median_us is not None
        return self.median_us

    @property
    def key(self) -> tuple[object, ...]:
        """Return what is equal in two runs where they measured the same."""
        return (
            *(self.bench, self.case, self.impl, self.backend, self.device),
            *(self.dtype_shadow, self.dtype_live, self.shadows, self.cache),
        )


@dataclass(frozen=True)
class InstructionCount:
    """Instructions that one call executes on the host, counted by valgrind."""

    case: str
    impl: str
    backend: str
    instructions: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Missing:
    """A case or an implementation that could not be measured, and the reason."""

    bench: str
    case: str
    impl: str
    reason: str


@dataclass
class Run:
    """The records of one run, or of several on one machine.

    Args:
        environment: see `machine.environment`.
        seconds: time of each benchmark.
    """

    environment: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    instructions: list[InstructionCount] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tables(self) -> frozenset[tuple[str, str, Cache]]:
        """Return benchmark, case and cache of every table."""
        return frozenset((one.bench, one.case, one.cache) for one in self.records)

    def find(self, bench: str, case: str, impl: str, cache: Cache = "cold", shadows: int = 1) -> Record | None:
        """Return the record; None where there is none."""
        wanted = (bench, case, impl, cache, shadows)
        for record in self.records:
            if (record.bench, record.case, record.impl, record.cache, record.shadows) == wanted:
                return record
        return None

    def median(self, bench: str, case: str, impl: str, cache: Cache = "cold", shadows: int = 1) -> float | None:
        """Return the median in microseconds of the record that `find` returns."""
        record = self.find(bench, case, impl, cache, shadows)
        return None if record is None else record.median_us


def save(run: Run, path: Path) -> None:
    """Write a JSON object, one record a line, so that diffs show single figures."""
    parts = [f'"environment": {json.dumps(run.environment)}', f'"seconds": {json.dumps(run.seconds)}']
    lists: dict[str, Sequence[Any]] = {
        "records": run.records,
        "instructions": run.instructions,
        "missing": run.missing,
    }
    for name, items in lists.items():
        lines = ",\n".join(f"  {json.dumps(_rounded(asdict(item)), allow_nan=False)}" for item in items)
        parts.append(f'"{name}": [\n{lines}\n ]' if lines else f'"{name}": []')
    scratch = path.with_suffix(".tmp")
    scratch.write_text("{\n " + ",\n ".join(parts) + "\n}\n")
    scratch.replace(path)  # as a whole: an interrupt leaves the old file or the new one


def _rounded(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in plain.items()}


def load(paths: Iterable[Path]) -> Run:
    """Read one run, or join several of one machine; where two measured the same, the later file counts.

    Raises:
        ValueError: a file was not written by a benchmark, or is of another machine than the first.
    """
    joined: Run | None = None
    for path in paths:
        run = _load(path)
        if joined is None:
            joined = run
            continue
        here, there = joined.environment.get("device"), run.environment.get("device")
        if here != there:
            raise ValueError(f"{path} is of {there}, the files before it are of {here}: one machine at a time")
        again = {record.key for record in run.records}
        joined.records = [record for record in joined.records if record.key not in again] + run.records
        joined.instructions += run.instructions
        joined.missing += run.missing
        joined.seconds |= run.seconds
    if joined is None:
        raise ValueError("no file of records was given")
    return joined


def _load(path: Path) -> Run:
    try:
        whole = json.loads(path.read_text())
        known = {one.name for one in fields(Record)}
        records = [
            Record(**{name: value for name, value in record.items() if name in known}) for record in whole["records"]
        ]
        return Run(
            environment=whole["environment"],
            records=records,
            instructions=[InstructionCount(**one) for one in whole.get("instructions", [])],
            missing=[Missing(**one) for one in whole.get("missing", [])],
            seconds=whole.get("seconds", {}),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file that a benchmark wrote with --json ({error})") from None
