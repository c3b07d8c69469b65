"""The Triton backend: the plan's chunk table and the launches; the kernels are in triton_kernels/.

For a GPU where `fastema._C` has no code for it. The table of addresses goes to the device once, when the plan is built;
an update is one launch with a handful of numbers. The first of each kind compiles, so it must come before a CUDA graph
is captured. On CPU tensors it runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastema.memory.streams import Streams

NAME = "triton"

_kernels: Any = None  # fastema.triton_kernels.kernels; imported at the first use, since Triton is optional
_import_error: str | None = None

_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in csrc/chunks.h
_PLANES = 4
_CONVERT, _COPY_BYTES = 32, 64
_GPUS = ("cuda", "xpu")  # xpu: Intel's; not run on one
_MAX_TILES = 8  # of a chunk
_BLOCKS_PER_MULTIPROCESSOR = 5
_CHUNKS_PER_BLOCK = 8  # at least, so that few mid-size tensors still fill the chip
# The kernels call fma themselves, so the compiler is to fuse nothing.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # 256 threads in warps of 32


def _load_kernels() -> Any:
    """Return the kernels; None, with the reason noted, where they cannot be imported."""
    global _kernels, _import_error
    if _kernels is None and _import_error is None:
        try:
            _kernels = importlib.import_module("fastema.triton_kernels.kernels")
        except Exception as error:  # a broken Triton fails in many ways
            _import_error = f"{type(error).__name__}: {error}"
    return _kernels


def why_unusable(device_type: str) -> str | None:
    """Return why the backend cannot run on this kind of device, or None."""
    if device_type not in ("cpu", *_GPUS):
        return f"there are no kernels for {device_type}"
    if device_type in _GPUS and not torch.get_device_module(device_type).is_available():
        return f"torch sees no {device_type.upper()} device"
    kernels = _load_kernels()
    if kernels is None:
        return f"Triton cannot be imported ({_import_error})"
    if device_type == "cpu" and not kernels.INTERPRETED:
        return "on CPU tensors it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
    if device_type in _GPUS and kernels.INTERPRETED:
        return "TRITON_INTERPRET is set, and the interpreter cannot follow addresses into a GPU's memory"
    return None


@cache
def probe(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device, or None. A launch needs a C compiler and Python's headers."""
    if device.type not in _GPUS:
        return None
    try:
        live, shadow = torch.ones(2, 16, device=device)
        Plan([[shadow]], [live], [False], []).update([0.5], skip_nonfinite=True)
        torch.get_device_module(device).synchronize(device)
    except Exception as error:  # a broken Triton fails in many ways
        lines = str(error).strip().splitlines() or [""]
        return f"a launch of its kernels fails ({type(error).__name__}: {lines[0]})"
    return None


def describe(device_type: str) -> str:
    """Describe what runs on this kind of device."""
    version = importlib.import_module("triton").__version__
    if device_type in _GPUS:
        return f"Triton {version} kernels, swap by pointer"
    return f"Triton {version}'s interpreter, for tests: very slow"


class Plan:
    """shadow <- shadow + weight * (live - shadow) for every segment; see `contract.Plan`.

    Up to kernels.MAX_SHADOWS shadows are averaged in one launch, and so in one read of the live weights; more take
    several.
    """

    def __init__(
        self,
        shadows: Sequence[Sequence[Tensor]],
        lives: Sequence[Tensor],
        copies: Sequence[bool],
        views: Sequence[Tensor],
        lows: Sequence[Sequence[Tensor | None]] = (),
    ) -> None:
        self._kernels = _load_kernels()
        if self._kernels is None:
            raise RuntimeError(f"Triton cannot be imported ({_import_error})")
        if not shadows:
            raise ValueError("a plan needs at least one shadow")
        self._device = lives[0].device if len(lives) else torch.device("cpu")
        every_low = [list(low) for low in lows] or [[None] * len(lives) for _ in shadows]
        kinds = _checked_kinds(shadows, every_low, lives, copies, self._device)
        self._count = len(shadows)
        planes = [low for low in chain(*every_low) if low is not None]
        self._held = [list(lives), *map(list, shadows), planes]  # so that the addresses in the table stay valid
        self._same_dtypes = all(shadow.dtype == live.dtype for shadow, live in zip(shadows[0], lives, strict=True))
        self._views = list(views)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=self._device)
        most = self._kernels.MAX_SHADOWS
        self._launches = [
            _Launch(
                self._kernels,
                shadows[first : first + most],
                every_low[first : first + most],
                lives,
                kinds,
                self._device,
                first,
            )
            for first in range(0, len(shadows), most)
        ]
        self._pack = struct.Struct(f"{len(shadows)}d")
        self._unpack = struct.Struct(f"{len(shadows)}q")
        self._streams = Streams(
            self._device, [self._nonfinite, *(launch.table for launch in self._launches), *chain(*self._held)]
        )
        # Triton launches on the current device and its current stream. Device -1 leaves the current one as it is.
        gpu = torch.get_device_module(self._device) if self._device.type in _GPUS else torch.cuda
        self._current = gpu.device(self._device.index if self._device.type in _GPUS else -1)

    def update(
        self,
        weights: Sequence[float],
        skip_nonfinite: bool,
        skip: Tensor | None = None,
        device_weights: Tensor | None = None,
    ) -> None:
        if len(weights) != self._count:
            raise ValueError(f"got {len(weights)} weights for {self._count} shadows")
        _check_scalars(skip, torch.float32, 1, self._device, "skip")
        _check_scalars(device_weights, torch.float64, self._count, self._device, "weights")
        bits = self._unpack.unpack(self._pack.pack(*weights))
        self._streams.note_current()
        with self._current:
            for launch in self._launches:
                launch.update(bits, skip_nonfinite, self._nonfinite, skip, device_weights)
        torch.autograd.graph.increment_version(self._views)

    def exchange(self, which: int) -> None:
        """Swap the contents of live and of one shadow."""
        if not 0 <= which < self._count:
            raise ValueError("no such shadow")
        if not self._same_dtypes:
            raise ValueError("contents of different dtypes cannot be exchanged exactly")
        launch, column = divmod(which, self._kernels.MAX_SHADOWS)
        self._streams.note_current()
        with self._current:
            self._launches[launch].exchange(column)

    def nonfinite_count(self) -> int:
        return int(self._nonfinite)


class _Launch:
    """The chunk table of up to MAX_SHADOWS shadows, of which the first is the plan's shadow `first`."""

    def __init__(
        self,
        kernels: Any,
        shadows: Sequence[Sequence[Tensor]],
        lows: Sequence[Sequence[Tensor | None]],
        lives: Sequence[Tensor],
        kinds: Sequence[int],
        device: torch.device,
        first: int,
    ) -> None:
        rows = _chunk_rows(shadows, lows, lives, kinds, kernels.tile_elements, _workers(device))
        self._kernels = kernels
        self._options = {**_OPTIONS, "num_warps": kernels.THREADS // _warp_size(device)}
        self._chunks = len(rows)
        self._shadows = len(shadows)
        self._first = first
        self.table = torch.tensor(rows, dtype=torch.int64).to(device)
        # The kernel is compiled for these alone: others would cost registers and time to compile.
        self._variants = tuple(sorted({row[2] for row in rows}))
        self._tiles = tuple(kernels.tile_elements(variant) for variant in self._variants)

    def update(
        self,
        bits: Sequence[int],
        skip_nonfinite: bool,
        nonfinite: Tensor,
        skip: Tensor | None,
        device_weights: Tensor | None,
    ) -> None:
        if self._chunks == 0:
            return
        mine = [*bits[self._first : self._first + self._shadows], 0, 0, 0][: self._kernels.MAX_SHADOWS]
        if device_weights is not None and self._first:
            device_weights = device_weights[self._first :]  # a view: nothing is allocated on the device
        self._kernels.update[(self._chunks,)](
            self.table,
            nonfinite,
            skip,
            device_weights,
            *mine,
            VARIANTS=self._variants,
            TILES=self._tiles,
            K=self._shadows,
            SKIP_NONFINITE=skip_nonfinite,
            COUNT_LIVE=self._first == 0,
            **self._options,
        )

    def exchange(self, column: int) -> None:
        if self._chunks:
            self._kernels.exchange[(self._chunks,)](self.table, column, K=self._shadows, **self._options)


# ---- the chunk table ----


def _checked_kinds(
    shadows: Sequence[Sequence[Tensor]],
    lows: Sequence[Sequence[Tensor | None]],
    lives: Sequence[Tensor],
    copies: Sequence[bool],
    device: torch.device,
) -> list[int]:
    """Return the kind of each segment, numbered as in csrc/chunks.h."""
    if len(copies) != len(lives) or any(len(part) != len(lives) for part in (*shadows, *lows)):
        raise ValueError("every shadow, lives and copies must have equal lengths")
    kinds = []
    for i, (live, copy) in enumerate(zip(lives, copies, strict=True)):
        for shadow in (segments[i] for segments in shadows):
            if live.dim() != 1 or shadow.shape != live.shape or not (live.is_contiguous() and shadow.is_contiguous()):
                raise ValueError("a segment must be two contiguous 1-D tensors of equal length")
            if shadow.device != device or live.device != device:
                raise ValueError("all segments of a plan must lie on one device")
            if shadow.dtype != shadows[0][i].dtype:
                raise ValueError("all shadows of a segment must have one dtype")
        dtype = shadows[0][i].dtype
        planes = [segments[i] for segments in lows]
        if any(low is not None for low in planes):
            if any(
                low is None or low.dtype != torch.int16 or low.shape != live.shape or not low.is_contiguous()
                for low in planes
            ) or (dtype, live.dtype) != (torch.bfloat16, torch.bfloat16):
                raise ValueError("a float32 in two planes is a bfloat16 and an int16 beside a bfloat16 tensor")
            kinds.append((_CONVERT if copy else 0) + 4 * _PLANES + _FORMATS[live.dtype])
        elif copy and dtype == live.dtype:
            kinds.append(_COPY_BYTES)
        elif dtype in _FORMATS and live.dtype in _FORMATS:
            kinds.append((_CONVERT if copy else 0) + 4 * _FORMATS[dtype] + _FORMATS[live.dtype])
        else:
            raise ValueError(f"no kernel for a {dtype} shadow of a {live.dtype} tensor")
    return kinds


def _chunk_rows(
    shadows: Sequence[Sequence[Tensor]],
    lows: Sequence[Sequence[Tensor | None]],
    lives: Sequence[Tensor],
    kinds: Sequence[int],
    tile_elements: Callable[[int], int],
    workers: int,
) -> list[list[int]]:
    """Cut every segment into chunks of whole tiles; every element is in exactly one.

    Live and shadow of a segment mostly become aligned after the same few elements: these get a chunk of their own, and
    the rest is marked as aligned. If they never do, the whole segment is not marked.
    """
    segments = []
    tiles = 0
    for i, (live, kind) in enumerate(zip(lives, kinds, strict=True)):
        is_bytes = kind == _COPY_BYTES
        planes = [low for low in (segment[i] for segment in lows) if low is not None]
        tensors = [live, *(segment[i] for segment in shadows), *planes]
        steps = [1 if is_bytes else tensor.dtype.itemsize for tensor in tensors]
        count = live.nbytes if is_bytes else live.numel()
        addresses = [tensor.data_ptr() for tensor in tensors]
        head = _elements_to_alignment(addresses, steps)
        pieces = [(0, count, 0)] if head is None else [(0, min(head, count), 0), (min(head, count), count, 1)]
        for begin, end, is_aligned in pieces:
            if begin < end:
                variant = 2 * kind + is_aligned
                segments.append((addresses, steps, begin, end, variant))
                tiles += -(-(end - begin) // tile_elements(variant))
    tiles_per_chunk = min(max(tiles // (workers * _CHUNKS_PER_BLOCK), 1), _MAX_TILES)
    rows = []
    for addresses, steps, begin, end, variant in segments:
        size = tiles_per_chunk * tile_elements(variant)
        for start in range(begin, end, size):
            count = min(size, end - start)
            live_address, *shadow_addresses = (a + start * step for a, step in zip(addresses, steps, strict=True))
            no_planes = [0] * (2 * len(shadows) - len(shadow_addresses))
            rows.append([live_address, count, variant, count * steps[1], *shadow_addresses, *no_planes])
    return rows


def _elements_to_alignment(addresses: Sequence[int], steps: Sequence[int]) -> int | None:
    """Return after how many elements all addresses are multiples of 16; None: never."""
    for head in range(16):
        if all((address + head * step) % 16 == 0 for address, step in zip(addresses, steps, strict=True)):
            return head
    return None


def _workers(device: torch.device) -> int:
    """Return how many blocks run at once; 1 in the interpreter."""
    if device.type not in _GPUS:
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    count = properties.multi_processor_count if device.type == "cuda" else properties.gpu_subslice_count
    return count * _BLOCKS_PER_MULTIPROCESSOR


def _warp_size(device: torch.device) -> int:
    """Return 64 on AMD's CDNA, where 8 warps would leave 8-byte accesses to each thread; else 32."""
    return getattr(torch.cuda.get_device_properties(device), "warp_size", 32) if device.type == "cuda" else 32


# ---- a launch ----


def _check_scalars(tensor: Tensor | None, dtype: torch.dtype, count: int, device: torch.device, name: str) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype or tensor.numel() != count or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be {count} {dtype} on {device}")
