"""Read NVIDIA machine code as `nvdisasm -gi -c` prints it: what the loops of a kernel load, store, and wait for.

Only what the tests on the CUDA kernels ask: the listing's own order stands for the order of issue, which holds for
code without taken branches, such as the loops of interest here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

SPACES = {"LDG": "global", "STG": "global", "LD": "generic", "ST": "generic", "LDL": "local", "STL": "local"}
_INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+ )?\s*(?P<opcode>[A-Z]\S*)(?P<rest>.*);"
)
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'//## File "[^"]*", line (\d+)( inlined at)?')
_MEMORY = re.compile(r"\[(?:(?P<base>U?R\d+|U?RZ)(?:\.\w+)*)?(?:\+?(?P<offset>-?0x[0-9a-f]+))?")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    lines: tuple[int, ...]  # of the source: its own, then those of the calls that it was inlined through

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def access(self) -> Access | None:
        """What it moves, if it is a load or a store."""
        if self.name not in SPACES:
            return None
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", self.opcode)
        found = _MEMORY.search(re.sub(r"desc\[\w+\]", "", self.operands))
        assert found is not None, self
        return Access(
            is_load=self.name.startswith("LD"),
            bytes=int(bits[1]) // 8 if bits else 4,
            space=SPACES[self.name],
            base=found["base"] or "",
            offset=int(found["offset"] or "0", 16),
        )

    @property
    def target(self) -> str | None:
        """The label that it branches to."""
        found = re.search(r"\((\.L_\w+)\)", self.operands)
        return found[1] if found and self.name == "BRA" else None

    @cached_property
    def written(self) -> set[int]:
        first = re.match(r"\s*R(\d+)", self.operands)
        if first is None or (self.access and not self.access.is_load):
            return set()
        return set(range(int(first[1]), int(first[1]) + (max(self.access.bytes // 4, 1) if self.access else 1)))

    @cached_property
    def read(self) -> set[int]:
        operands = self.operands.split(",", 1)[1] if self.written and "," in self.operands else self.operands
        registers = {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}
        if self.access and not self.access.is_load:
            value = re.search(r"\bR(\d+)\s*$", operands)
            registers |= set(range(int(value[1]), int(value[1]) + self.access.bytes // 4)) if value else set()
        return registers


@dataclass(frozen=True)
class Access:
    is_load: bool
    bytes: int  # of one thread
    space: str  # global, generic or local
    base: str
    offset: int


@dataclass
class Loop:
    instructions: list[Instruction]

    @property
    def accesses(self) -> list[Access]:
        return [instruction.access for instruction in self.instructions if instruction.access]

    @property
    def spaces(self) -> set[str]:
        return {access.space for access in self.accesses}

    def widths(self, is_load: bool) -> Counter[int]:
        """Bytes of an access -> how many there are."""
        return Counter(access.bytes for access in self.accesses if access.is_load == is_load)

    @property
    def loads_before_first_use(self) -> Counter[int]:
        """The loads that are issued before anything waits for one of them, by their bytes."""
        loads: Counter[int] = Counter()
        loaded: set[int] = set()
        for instruction in self.instructions:
            if loaded & instruction.read:
                break
            if instruction.access and instruction.access.is_load:
                loads[instruction.access.bytes] += 1
                loaded |= instruction.written
        return loads

    @property
    def store_stride(self) -> int:
        """Bytes between what neighbouring threads store, as a multiple of an access.

        A thread that stores right behind its own last store takes the place of its neighbour: its accesses are strided,
        and each fills a part of a sector only.
        """
        stores = [access for access in self.accesses if not access.is_load]
        widest = 0
        for base in {access.base for access in stores}:
            offsets = sorted({access.offset for access in stores if access.base == base})
            width = max(access.bytes for access in stores if access.base == base)
            run = longest = 1
            for before, after in pairwise(offsets):
                run = run + 1 if after - before == width else 1
                longest = max(longest, run)
            widest = max(widest, longest * width)
        return widest


@dataclass
class Kernel:
    name: str  # mangled
    rare: frozenset[int] = frozenset()  # lines of the source that hardly ever run: left out of the loops
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the instruction behind it

    @property
    def loops(self) -> list[Loop]:
        """The innermost loops that access memory, without what is rare in them."""
        spans = []
        for end, instruction in enumerate(self.instructions):
            begin = self.labels.get(instruction.target or "")
            if begin is None or self.rare & set(instruction.lines):
                continue
            if begin < end:  # a jump to itself pads the end of the kernel
                spans.append((begin, end + 1))
        innermost = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        loops = [
            Loop([each for each in self.instructions[begin:end] if not self.rare & set(each.lines)])
            for begin, end in innermost
        ]
        return [loop for loop in loops if loop.accesses]


def kernels(listing: str, rare: Iterable[int] = ()) -> Iterator[Kernel]:
    """Each kernel of the listing; `rare`: see `Kernel`."""
    lines_left_out = frozenset(rare)
    for section in re.split(r"\.section\s+\.text\.", listing)[1:]:
        kernel = Kernel(re.split(r"[,\s]", section, maxsplit=1)[0], lines_left_out)
        lines: list[int] = []
        chain_ends = True
        for line in section.splitlines():
            if label := _LABEL.match(line):
                kernel.labels[label[1]] = len(kernel.instructions)
            elif comment := _LINE.search(line):
                lines = [int(comment[1])] if chain_ends else [*lines, int(comment[1])]
                chain_ends = comment[2] is None
            elif found := _INSTRUCTION.match(line):
                kernel.instructions.append(
                    Instruction(int(found["address"], 16), found["opcode"], found["rest"].strip(), tuple(lines))
                )
        yield kernel
