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
from typing import Any

import torch
from torch import Tensor

from fastema.backends.contract import Segment, UpdateArgs
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
        Plan([Segment((shadow,), live, copy=False)], []).update(UpdateArgs([0.5], skip_nonfinite=True))
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

    def __init__(self, segments: Sequence[Segment], views: Sequence[Tensor]) -> None:
        self._kernels = _load_kernels()
        if self._kernels is None:
            raise RuntimeError(f"Triton cannot be imported ({_import_error})")
        self._device = segments[0].live.device if segments else torch.device("cpu")
        self._count = len(segments[0].shadows) if segments else 0
        kinds = [_checked_kind(segment, self._count, self._device) for segment in segments]
        # Held, so that the addresses in the tables stay valid.
        self._held = [tensor for s in segments for tensor in (s.live, *s.shadows, *s.lows)]
        self._same_dtypes = all(segment.shadows[0].dtype == segment.live.dtype for segment in segments)
        self._views = list(views)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=self._device)
        most = self._kernels.MAX_SHADOWS
        self._launches = [
            _Launch(self._kernels, segments, kinds, self._device, first, min(most, self._count - first))
            for first in range(0, self._count, most)
        ]
        self._pack = struct.Struct(f"{self._count}d")
        self._unpack = struct.Struct(f"{self._count}q")
        tables = [launch.table for launch in self._launches]
        self._streams = Streams(self._device, [self._nonfinite, *tables, *self._held])
        # Triton launches on the current device and its current stream. Device -1 leaves the current one as it is.
        gpu = torch.get_device_module(self._device) if self._device.type in _GPUS else torch.cuda
        self._current = gpu.device(self._device.index if self._device.type in _GPUS else -1)

    def update(self, args: UpdateArgs) -> None:
        if self._launches:
            if len(args.weights) != self._count:
                raise ValueError(f"got {len(args.weights)} weights for {self._count} shadows")
            _check_scalars(args.skip, torch.float32, 1, self._device, "skip")
            _check_scalars(args.device_weights, torch.float64, self._count, self._device, "weights")
            bits = self._unpack.unpack(self._pack.pack(*args.weights))
            self._streams.note_current()
            with self._current:
                for launch in self._launches:
                    launch.update(bits, self._nonfinite, args)
        torch.autograd.graph.increment_version(self._views)

    def exchange(self, which: int) -> None:
        """Swap the contents of live and of one shadow."""
        if not self._launches:
            return
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
    """The chunk table of the plan's shadows [first, first + count)."""

    def __init__(
        self,
        kernels: Any,
        segments: Sequence[Segment],
        kinds: Sequence[int],
        device: torch.device,
        first: int,
        count: int,
    ) -> None:
        mine = slice(first, first + count)
        cut = [segment._replace(shadows=segment.shadows[mine], lows=segment.lows[mine]) for segment in segments]
        rows = _chunk_rows(cut, kinds, kernels.tile_elements, _workers(device))
        self._kernels = kernels
        self._options = {**_OPTIONS, "num_warps": kernels.THREADS // _warp_size(device)}
        self._chunks = len(rows)
        self._shadows = count
        self._first = first
        self.table = torch.tensor(rows, dtype=torch.int64).to(device)
        # The kernel is compiled for these alone: others would cost registers and time to compile.
        self._variants = tuple(sorted({row[2] for row in rows}))
        self._tiles = tuple(kernels.tile_elements(variant) for variant in self._variants)

    def update(self, bits: Sequence[int], nonfinite: Tensor, args: UpdateArgs) -> None:
        """Launch. `bits`: of all weights of the plan."""
        if self._chunks == 0:
            return
        mine = [*bits[self._first : self._first + self._shadows], 0, 0, 0][: self._kernels.MAX_SHADOWS]
        device_weights = args.device_weights
        if device_weights is not None and self._first:
            device_weights = device_weights[self._first :]  # a view: nothing is allocated on the device
        self._kernels.update[(self._chunks,)](
            self.table,
            nonfinite,
            args.skip,
            device_weights,
            *mine,
            VARIANTS=self._variants,
            TILES=self._tiles,
            K=self._shadows,
            SKIP_NONFINITE=args.skip_nonfinite,
            COUNT_LIVE=self._first == 0,
            **self._options,
        )

    def exchange(self, column: int) -> None:
        if self._chunks:
            self._kernels.exchange[(self._chunks,)](self.table, column, K=self._shadows, **self._options)


# ---- the chunk table ----


def _checked_kind(segment: Segment, count: int, device: torch.device) -> int:
    """Return the kind of a segment under `count` shadows, numbered as in csrc/chunks.h."""
    shadows, live, copy, lows = segment
    if not shadows:
        raise ValueError("a segment needs at least one shadow")
    if len(shadows) != count or len(lows) not in (0, count):
        raise ValueError("every segment of a plan must have as many shadows, and as many low planes or none")
    if any(t.dim() != 1 or t.shape != live.shape or not t.is_contiguous() for t in (live, *shadows)):
        raise ValueError("a segment must be two contiguous 1-D tensors of equal length")
    if any(tensor.device != device for tensor in (live, *shadows)):
        raise ValueError("all segments of a plan must lie on one device")
    dtype = shadows[0].dtype
    if any(shadow.dtype != dtype for shadow in shadows):
        raise ValueError("all shadows of a segment must have one dtype")
    if lows:
        alike = all(low.dtype == torch.int16 and low.shape == live.shape and low.is_contiguous() for low in lows)
        if not alike or (dtype, live.dtype) != (torch.bfloat16, torch.bfloat16):
            raise ValueError("a float32 in two planes is a bfloat16 and an int16 beside a bfloat16 tensor")
        return (_CONVERT if copy else 0) + 4 * _PLANES + _FORMATS[live.dtype]
    if copy and dtype == live.dtype:
        return _COPY_BYTES
    if dtype not in _FORMATS or live.dtype not in _FORMATS:
        raise ValueError(f"no kernel for a {dtype} shadow of a {live.dtype} tensor")
    return (_CONVERT if copy else 0) + 4 * _FORMATS[dtype] + _FORMATS[live.dtype]


def _chunk_rows(
    segments: Sequence[Segment], kinds: Sequence[int], tile_elements: Callable[[int], int], workers: int
) -> list[list[int]]:
    """Cut every segment into chunks of whole tiles; every element is in exactly one.

    Live and shadow of a segment mostly become aligned after the same few elements: these get a chunk of their own, and
    the rest is marked as aligned. If they never do, the whole segment is not marked.
    """
    pieces = []
    tiles = 0
    for (shadows, live, _, lows), kind in zip(segments, kinds, strict=True):
        is_bytes = kind == _COPY_BYTES
        tensors = [live, *shadows, *lows]
        steps = [1 if is_bytes else tensor.dtype.itemsize for tensor in tensors]
        count = live.nbytes if is_bytes else live.numel()
        addresses = [tensor.data_ptr() for tensor in tensors]
        head = _elements_to_alignment(addresses, steps)
        cuts = [(0, count, 0)] if head is None else [(0, min(head, count), 0), (min(head, count), count, 1)]
        for begin, end, is_aligned in cuts:
            if begin < end:
                variant = 2 * kind + is_aligned
                no_planes = [0] * (len(shadows) - len(lows))
                pieces.append((addresses, steps, begin, end, variant, no_planes))
                tiles += -(-(end - begin) // tile_elements(variant))
    tiles_per_chunk = min(max(tiles // (workers * _CHUNKS_PER_BLOCK), 1), _MAX_TILES)
    rows = []
    for addresses, steps, begin, end, variant, no_planes in pieces:
        size = tiles_per_chunk * tile_elements(variant)
        for start in range(begin, end, size):
            count = min(size, end - start)
            live_address, *shadow_addresses = (a + start * step for a, step in zip(addresses, steps, strict=True))
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
