"""One program a chunk, in one launch for every mix of dtypes and rules: full tiles -> masked vectors -> scalar tail.

The twin of csrc/ema_math.h and csrc/cuda_kernels.cu: the same rule with the same roundings. The chunk table lies in
device memory and holds addresses as integers. A pointer made of an integer is of unknown alignment to Triton, and every
access through it would be 32 bits wide; the host knows which chunks are aligned, and only those get the hint, because a
false one is a fault.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Formats and kinds are numbered as in csrc/chunks.h: kind = rule + 4 * shadow format + live format.
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
PLANES = tl.constexpr(4)  # of a shadow alone: a float32 in two planes
CONVERT, COPY_BYTES = tl.constexpr(32), tl.constexpr(64)
#: What is in memory. bfloat16 is narrowed by integers, as in ema_math.h: one rule for every chip, and Triton's
#: interpreter, whose own conversion truncates.
STORED = tl.constexpr((tl.float32, tl.float64, tl.uint16, tl.float16, tl.uint16))

#: Of one launch; more take several. The weights are arguments of the kernel.
MAX_SHADOWS = 4
THREADS = 256  # 8 warps, as the launches ask for
#: A row of the chunk table, int64: live address, elements (bytes for COPY_BYTES), variant, bytes, K shadow
#: addresses (of the high plane, where there are two), K addresses of low planes, or zeros;
#: variant = 2 * kind + 1 where all its addresses are multiples of 16, else 2 * kind.
COUNT, VARIANT, BYTES, SHADOWS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
EXCHANGE_TILE = tl.constexpr(8192)  # bytes: 32 a thread of each side
UNHINTED_TILE = tl.constexpr(4 * THREADS)


def tile_elements(variant: int) -> int:
    """Return the elements of a tile, so that 32 bytes a thread of the wider operand are in flight (16 of a copy).

    That leaves 40 to 56 registers a thread: five or six blocks a multiprocessor, of which each has 16 KiB in flight.
    Chunks without the hint take what does not raise the registers of all.
    """
    kind, is_aligned = divmod(variant, 2)
    if not is_aligned:
        return UNHINTED_TILE.value
    if kind == COPY_BYTES.value:
        return 16 * THREADS
    return (4 if FLOAT64.value in (kind % 32 // 4, kind % 4) else 8) * THREADS


# ---- one element: csrc/ema_math.h ----


@triton.jit
def _widened(stored, FORMAT: tl.constexpr, OP: tl.constexpr):
    """Return the value in opmath; exact but for a float64 seen in float32."""
    if FORMAT == BFLOAT16:
        stored = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return stored.to(OP)


@triton.jit
def _narrowed(value, FORMAT: tl.constexpr):
    """Round to the stored dtype, to nearest even. 16-bit formats go through float32, as they do in C++."""
    if FORMAT == FLOAT64:
        stored = value.to(tl.float64)
    elif FORMAT == FLOAT32:
        stored = value.to(tl.float32)
    elif FORMAT == FLOAT16:
        stored = value.to(tl.float32).to(tl.float16)
    else:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        stored = tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)
    return stored


@triton.jit
def _is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _joined(high, low):
    """Return the float32 of two planes. Where 0 or infinity in `high` and a stale `low` make a NaN, `high` counts."""
    upper = high.to(tl.uint32) << 16
    bits = upper + low.to(tl.int16, bitcast=True).to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(_is_nan(bits), upper, bits).to(tl.float32, bitcast=True)


@triton.jit
def _split(value):
    """Return the planes of a float32: the nearest bfloat16, ties away from zero, and the rest."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(_is_nan(bits), (bits & 0x80000000) | 0x7FC00000, bits)
    return ((bits + 0x8000) >> 16).to(tl.uint16), (bits & 0xFFFF).to(tl.uint16)


@triton.jit
def _is_finite(value):
    if value.dtype == tl.float64:
        finite = (value.to(tl.int64, bitcast=True) & 0x7FF0000000000000) != 0x7FF0000000000000
    else:
        finite = (value.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    return finite


@triton.jit
def _averaged(old, new, weight, OP: tl.constexpr):
    """Return old + weight * (new - old), fused; from weight 0.5 on computed from `new`. weight: float64."""
    rounded = weight.to(OP)
    from_live = rounded >= 0.5
    coefficient = tl.where(from_live, rounded - 1.0, rounded)
    difference = new - old
    return tl.fma(tl.zeros_like(difference) + coefficient, difference, tl.where(from_live, new, old))


@triton.jit
def _updated(old, new, weight, is_live, OP: tl.constexpr, SKIP_NONFINITE: tl.constexpr):
    """Return the new average and whether the element is counted: see `takes_live` in csrc/ema_math.h.

    is_live: whether `new` is finite.
    """
    average = _averaged(old, new, weight, OP)
    copies = tl.zeros_like(new) + weight.to(OP) == 1.0
    result = tl.where(copies, new, average)
    is_bad = ~_is_finite(average)
    if SKIP_NONFINITE:
        takes_live = is_live & (copies | ~_is_finite(old))
        result = tl.where(is_bad, tl.where(takes_live, new, old), result)
    return result, is_bad


# ---- one tile, one chunk ----


@triton.jit
def _address(row, column, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update_tile(
    shadows,
    lows,
    live,
    weights,
    offsets,
    mask,
    nonfinite,
    KIND: tl.constexpr,
    K: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    COUNT_LIVE: tl.constexpr,
):
    """Update one tile and return `nonfinite` with its count added. Live is read once for all shadows."""
    stored_live = tl.load(live + offsets, mask=mask)
    SHADOW: tl.constexpr = KIND % 32 // 4
    LIVE: tl.constexpr = KIND % 4
    if KIND == COPY_BYTES:
        for k in tl.static_range(K):
            tl.store(shadows[k] + offsets, stored_live, mask=mask)
    elif KIND >= CONVERT:
        WIDE: tl.constexpr = tl.float64 if SHADOW == FLOAT64 or LIVE == FLOAT64 else tl.float32
        new = _widened(stored_live, LIVE, WIDE)
        for k in tl.static_range(K):
            _store_average(shadows[k] + offsets, lows[k] + offsets, new, mask, SHADOW)
    else:
        OP: tl.constexpr = tl.float64 if SHADOW == FLOAT64 else tl.float32
        new = _widened(stored_live, LIVE, OP)
        is_live = _is_finite(new)
        for k in tl.static_range(K):
            old = _load_average(shadows[k] + offsets, lows[k] + offsets, mask, SHADOW, OP)
            result, is_bad = _updated(old, new, weights[k], is_live, OP, SKIP_NONFINITE)
            _store_average(shadows[k] + offsets, lows[k] + offsets, result, mask, SHADOW)
            if SKIP_NONFINITE:
                counted = is_bad
                if k > 0 or not COUNT_LIVE:  # once for all shadows
                    counted = is_bad & is_live
                if mask is not None:
                    counted = counted & mask
                nonfinite += counted.to(tl.int32)
    return nonfinite


@triton.jit
def _load_average(pointers, low_pointers, mask, SHADOW: tl.constexpr, OP: tl.constexpr):
    stored = tl.load(pointers, mask=mask)
    if SHADOW == PLANES:
        low = tl.load(low_pointers, mask=mask)
        value = _joined(stored, low)
    else:
        value = _widened(stored, SHADOW, OP)
    return value


@triton.jit
def _store_average(pointers, low_pointers, value, mask, SHADOW: tl.constexpr):
    if SHADOW == PLANES:
        high, low = _split(value)
        tl.store(pointers, high, mask=mask)
        tl.store(low_pointers, low, mask=mask)
    else:
        tl.store(pointers, _narrowed(value, SHADOW), mask=mask)


@triton.jit
def _update_chunk(
    row,
    weights,
    nonfinite_total,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    COUNT_LIVE: tl.constexpr,
):
    count = tl.load(row + COUNT).to(tl.int32)
    LIVE: tl.constexpr = tl.uint8 if KIND == COPY_BYTES else STORED[KIND % 4]
    SHADOW: tl.constexpr = tl.uint8 if KIND == COPY_BYTES else STORED[KIND % 32 // 4]
    live = _address(row, 0, LIVE, ALIGNED)
    shadows = ()
    for k in tl.static_range(K):
        shadows = shadows + (_address(row, SHADOWS + k, SHADOW, ALIGNED),)  # noqa: RUF005 (Triton has no unpacking)
    lows = shadows
    if KIND != COPY_BYTES and KIND % 32 // 4 == PLANES:
        lows = ()
        for k in tl.static_range(K):
            lows = lows + (_address(row, SHADOWS + K + k, SHADOW, ALIGNED),)  # noqa: RUF005
    lanes = tl.arange(0, TILE)
    nonfinite = tl.zeros([TILE], tl.int32)
    if ALIGNED:
        full = count // TILE
        for tile in range(full):
            nonfinite = _update_tile(
                shadows, lows, live, weights, tile * TILE + lanes, None, nonfinite, KIND, K, SKIP_NONFINITE, COUNT_LIVE
            )
        if full * TILE < count:
            # A mask that is constant over 16 elements leaves the accesses 16 bytes wide; then come the last 15 at most.
            vectors = tl.multiple_of(count // 16 * 16, 16)
            offsets = full * TILE + lanes
            nonfinite = _update_tile(
                shadows, lows, live, weights, offsets, offsets < vectors, nonfinite, KIND, K, SKIP_NONFINITE, COUNT_LIVE
            )
            if vectors < count:
                last = vectors + tl.arange(0, 16)
                rest = tl.zeros([16], tl.int32)
                rest = _update_tile(
                    shadows, lows, live, weights, last, last < count, rest, KIND, K, SKIP_NONFINITE, COUNT_LIVE
                )
                if SKIP_NONFINITE and KIND < CONVERT:
                    _add_nonfinite(nonfinite_total, rest)
    else:
        for tile in range(tl.cdiv(count, TILE)):
            offsets = tile * TILE + lanes
            nonfinite = _update_tile(
                shadows, lows, live, weights, offsets, offsets < count, nonfinite, KIND, K, SKIP_NONFINITE, COUNT_LIVE
            )
    if SKIP_NONFINITE and KIND < CONVERT:
        _add_nonfinite(nonfinite_total, nonfinite)


@triton.jit
def _add_nonfinite(nonfinite_total, nonfinite):
    here = tl.sum(nonfinite, 0)
    if here != 0:  # rare by nature
        tl.atomic_add(nonfinite_total, here.to(tl.int64))


# ---- the kernels ----


@triton.jit(do_not_specialize=["nonfinite_total", "skip", "device_weights", "bits0", "bits1", "bits2", "bits3"])
def update(
    table,  # int64 [chunks, SHADOWS + 2 * K]
    nonfinite_total,  # int64 scalar: elements that were not finite so far
    skip,  # float32 scalar, or None: not zero: nothing happens
    device_weights,  # float64 [K], or None: read instead of the four
    bits0: tl.int64,  # 1 - decay of each shadow, the bits of a float64: a Python float would arrive as float32
    bits1: tl.int64,
    bits2: tl.int64,
    bits3: tl.int64,
    VARIANTS: tl.constexpr,  # what is in the table
    TILES: tl.constexpr,  # and the tile of each
    K: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    COUNT_LIVE: tl.constexpr,  # a live value that is not finite is counted once for all shadows
):
    """Average or copy every chunk of the table."""
    wanted = True if skip is None else tl.load(skip) == 0.0
    if wanted:
        row = table + tl.program_id(0).to(tl.int64) * (SHADOWS + 2 * K)
        variant = tl.load(row + VARIANT)
        bits = (bits0, bits1, bits2, bits3)
        weights = ()
        for k in tl.static_range(K):
            if device_weights is None:
                weights = weights + (bits[k].to(tl.int64).to(tl.float64, bitcast=True),)  # noqa: RUF005
            else:
                weights = weights + (tl.load(device_weights + k),)  # noqa: RUF005
        for i in tl.static_range(len(VARIANTS)):
            if variant == VARIANTS[i]:
                _update_chunk(
                    row,
                    weights,
                    nonfinite_total,
                    VARIANTS[i] // 2,
                    VARIANTS[i] % 2,
                    TILES[i],
                    K,
                    SKIP_NONFINITE,
                    COUNT_LIVE,
                )


@triton.jit
def _exchange_tile(first, second, offsets, mask):
    held = tl.load(first + offsets, mask=mask)
    other = tl.load(second + offsets, mask=mask)
    tl.store(first + offsets, other, mask=mask)
    tl.store(second + offsets, held, mask=mask)


@triton.jit
def _exchange_chunk(row, which, ALIGNED: tl.constexpr):
    live = _address(row, 0, tl.uint8, ALIGNED)
    shadow = _address(row, SHADOWS + which, tl.uint8, ALIGNED)
    count = tl.load(row + BYTES).to(tl.int32)
    if ALIGNED:
        lanes = tl.arange(0, EXCHANGE_TILE)
        full = count // EXCHANGE_TILE
        for tile in range(full):
            _exchange_tile(shadow, live, tile * EXCHANGE_TILE + lanes, None)
        vectors = tl.multiple_of(count // 16 * 16, 16)
        offsets = full * EXCHANGE_TILE + lanes
        _exchange_tile(shadow, live, offsets, offsets < vectors)
        last = vectors + tl.arange(0, 16)
        _exchange_tile(shadow, live, last, last < count)
    else:
        for tile in range(tl.cdiv(count, UNHINTED_TILE)):
            offsets = tile * UNHINTED_TILE + tl.arange(0, UNHINTED_TILE)
            _exchange_tile(shadow, live, offsets, offsets < count)


@triton.jit(do_not_specialize=["which"])
def exchange(
    table,  # int64 [chunks, SHADOWS + 2 * K]
    which: tl.int64,  # the shadow
    K: tl.constexpr,
):
    """Swap live and one shadow, bit for bit."""
    row = table + tl.program_id(0).to(tl.int64) * (SHADOWS + 2 * K)
    if tl.load(row + VARIANT) % 2 == 1:
        _exchange_chunk(row, which, True)
    else:
        _exchange_chunk(row, which, False)


INTERPRETED = not isinstance(update, triton.JITFunction)
