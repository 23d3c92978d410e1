"""The Triton kernels, for NVIDIA and AMD from one source: two passes over a feature map, and the maths between them.

Names and formulas are those of :mod:`ecanet.ops.reference`; :mod:`ecanet.ops.gpu` launches them. Importing this file
imports triton.

A map ``(N, C, S)`` has N C rows; a row is one channel of one sample. The map is walked in tiles of ``ROWS`` by
``POSITIONS`` elements. In memory the positions of a row are neighbours or, with channels last (``LAST``), the channels
of a position. ``ALIGN`` divides the number of neighbours and ``TOTAL`` the number of elements: loads and stores are as
wide as these allow.

A kernel that sums over positions takes a tile of rows and moves along their positions, so that most sums happen within
a thread. With channels last, all of them do: each thread of a warp has its own channels. The positions may be split
over ``splits`` programs; their partial sums are merged in a fixed order, so results are the same bit for bit on every
run. Contiguous rows that are not aligned (such as those of 7 x 7) are read from the last multiple of ``START`` before
them; elements of neighbouring rows are left out of the sums.

An element-wise kernel cuts a contiguous map into runs of ``POSITIONS`` neighbours, each in one row or in two.
"""

from typing import Any

import triton
import triton.language as tl

# Any: type checkers do not understand triton's language.
jit: Any = triton.jit


@jit
def _multiple(size, OF: tl.constexpr):
    """The size, written so that the compiler sees that ``OF`` divides it."""
    return size // OF * OF


@jit
def _size(samples, channels, positions, TOTAL: tl.constexpr, INDEX: tl.constexpr):
    """Number of elements in the map."""
    return _multiple(tl.cast(samples, INDEX) * channels * positions, TOTAL)


@jit
def _rows(
    block, samples, channels, positions, ROWS: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    START: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Where the rows of a tile are.

    Returns, for each row: the offset where reading starts; how many elements that is before its first position; its
    index in ``(N, C)``; its channel; whether it exists. Last, the distance between neighbouring positions.
    """
    step = 1
    if LAST:
        step = _multiple(channels, ALIGN)
        blocks = tl.cdiv(channels, ROWS)
        sample = (block // blocks).to(INDEX)
        channel = block % blocks * ROWS + tl.arange(0, ROWS)
        first = sample * positions * step + channel
        row = sample * channels + channel
        exists = channel < step
    else:
        row = block.to(INDEX) * ROWS + tl.arange(0, ROWS)
        channel = (row % channels).to(tl.int32)
        first = row * _multiple(positions, ALIGN)
        exists = row < tl.cast(samples, INDEX) * channels
    start = _multiple(first, START)
    return start, (first - start).to(tl.int32), row, channel, exists, step


@jit
def _end(begin, per_split, positions, LAST: tl.constexpr, ALIGN: tl.constexpr, START: tl.constexpr):
    """Where a split ends, counted from the offset where reading a row starts."""
    if LAST:
        return tl.minimum(begin + per_split, positions)
    if START > 1:  # the only split
        return _multiple(positions + 2 * (START - 1), START)
    return tl.minimum(begin + per_split, _multiple(positions, ALIGN))


@jit
def _tile(
    start, lead, exists, step, at, end, positions, size, POSITIONS: tl.constexpr, START: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Offsets of elements from position ``at`` on, [ROWS, POSITIONS]; which are readable; which belong to their row."""
    position = at + tl.arange(0, POSITIONS)
    place = start[:, None] + position.to(INDEX)[None, :] * step
    readable = exists[:, None] & (position < end)[None, :]
    inside = readable
    if START > 1:
        own = position[None, :] - lead[:, None]
        inside = readable & (own.to(tl.uint32) < positions.to(tl.uint32))  # unsigned: also rules out negative ones
        readable &= place < size
    return place, readable, inside


@jit
def _elements(
    program, samples, channels, positions, ROWS: tl.constexpr, POSITIONS: tl.constexpr, LAST: tl.constexpr,
    ALIGN: tl.constexpr, TOTAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The elements of a program in an element-wise kernel.

    Returns their offsets and which of them exist, [ROWS, POSITIONS]; for each run, [ROWS], the row where it begins and
    the row after that; which elements belong to the row after.
    """
    rows = tl.cast(samples, INDEX) * channels
    size = _size(samples, channels, positions, TOTAL, INDEX)
    if LAST:
        tiles = tl.cdiv(positions, POSITIONS)
        start, lead, row, _, exists, step = _rows(
            program // tiles, samples, channels, positions, ROWS, LAST, ALIGN, 1, INDEX
        )
        at = program % tiles * POSITIONS
        place, _, inside = _tile(start, lead, exists, step, at, positions, positions, size, POSITIONS, 1, INDEX)
        is_after = tl.zeros((1, 1), tl.int1)
    else:
        first = program.to(INDEX) * (ROWS * POSITIONS)
        run = tl.arange(0, ROWS) * POSITIONS
        place = first + (run[:, None] + tl.arange(0, POSITIONS)[None, :])
        inside = place < size
        row = first // positions  # only this division needs 64 bits; those of the runs use 32
        run += (first - row * positions).to(tl.int32)
        down = run // positions
        row += down
        is_after = (run - down * positions)[:, None] + tl.arange(0, POSITIONS)[None, :] >= positions
    return place, inside, tl.minimum(row, rows - 1), tl.minimum(row + 1, rows - 1), is_after


@jit
def _load_per_row(
    values, row, after, is_after, POSITIONS: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """For every element of a tile, the value of its row."""
    value = tl.load(values + row).to(ACC)[:, None]
    if not LAST and ALIGN % POSITIONS != 0:  # otherwise no run spans two rows
        value = tl.where(is_after, tl.load(values + after).to(ACC)[:, None], value)
    return value


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _activate(y, ACT: tl.constexpr):
    # Comparisons with NaN are false, so NaN passes through.
    if ACT == 1:
        y = tl.where(y < 0.0, 0.0, y)
    if ACT == 2:
        y = tl.where(y < 0.0, 0.0, y)
        y = tl.where(y > 6.0, 6.0, y)
    if ACT == 3:
        y = y / (1.0 + tl.exp(-y))
    if ACT == 4:
        gate = y + 3.0
        gate = tl.where(gate < 0.0, 0.0, gate)
        gate = tl.where(gate > 6.0, 6.0, gate)
        y = y * gate / 6.0
    return y


@jit
def _activate_backward(grad, seen, ACT: tl.constexpr):
    """``grad * act'``; ``seen`` is the output for ReLU and ReLU6, the input for SiLU and Hardswish."""
    if ACT == 1:
        grad = tl.where(seen <= 0.0, 0.0, grad)
    if ACT == 2:
        grad = tl.where(seen <= 0.0, 0.0, grad)
        grad = tl.where(seen >= 6.0, 0.0, grad)
    if ACT == 3:
        gate = _sigmoid(seen)
        grad = grad * gate * (1.0 + seen * (1.0 - gate))
    if ACT == 4:
        inside = grad * (seen / 3.0 + 0.5)
        outside = tl.where(seen <= -3.0, 0.0, grad)
        grad = tl.where((seen < 3.0) & (seen > -3.0), inside, outside)
    return grad


@jit
def _upstream(grad, x, saved, scale, shift, place, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """Gradient of the activation's input; scale and shift are [ROWS, 1]."""
    g = tl.load(grad + place, mask, 0.0).to(ACC)
    if ACT == 1 or ACT == 2:
        g = _activate_backward(g, tl.load(saved + place, mask, 0.0).to(ACC), ACT)
    if ACT == 3 or ACT == 4:
        seen = x * scale
        if shift is not None:
            seen += shift
        if saved is not None:
            seen += tl.load(saved + place, mask, 0.0).to(ACC)
        g = _activate_backward(g, seen, ACT)
    return g


@jit
def _fold_positions(tile, THREADS: tl.constexpr):
    """The part of a tile, [ROWS, POSITIONS], that a program accumulates over its tiles.

    With channels last, ``THREADS`` threads share a row and each takes every ``THREADS``-th position: the result has the
    sum of each thread, [ROWS, THREADS]. Otherwise ``THREADS`` is 0, and the result is the tile.
    """
    if THREADS > 0:
        tile = tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // THREADS, THREADS)), 1)
    return tile


@jit
def moments(
    x, mean, m2, samples, channels, positions, splits, per_split,
    SECOND: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, TOTAL: tl.constexpr, START: tl.constexpr,
    THREADS: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Mean of every row over one split and, if ``SECOND``, the sum of squared deviations from it.

    ``mean`` and ``m2`` are ``(splits, N, C)``. The mean of the first tile is subtracted from all values. Cancellation
    then enlarges the rounding error of the sums of squares by at most the number of tiles.
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, lead, row, _, exists, step = _rows(block, samples, channels, positions, ROWS, LAST, ALIGN, START, INDEX)
    size = _size(samples, channels, positions, TOTAL, INDEX)
    begin = split * per_split
    end = _end(begin, per_split, positions, LAST, ALIGN, START)
    count = (tl.minimum(begin + per_split, positions) - begin).to(ACC)
    place, readable, inside = _tile(start, lead, exists, step, begin, end, positions, size, POSITIONS, START, INDEX)
    value = tl.load(x + place, readable, 0.0).to(ACC)
    origin = tl.zeros((ROWS,), ACC)
    if SECOND:
        first = tl.minimum(begin + POSITIONS - lead, tl.minimum(begin + per_split, positions)) - begin
        origin = tl.sum(tl.where(inside, value, 0.0), 1) / first.to(ACC)
        origin = tl.where(origin - origin == 0.0, origin, 0.0)  # 0 if not finite: Inf - Inf would be NaN
    centered = tl.where(inside, value - origin[:, None], 0.0)
    total = _fold_positions(centered, THREADS)
    squares = _fold_positions(centered * centered, THREADS)
    for at in range(begin + POSITIONS, end, POSITIONS):
        place, readable, inside = _tile(start, lead, exists, step, at, end, positions, size, POSITIONS, START, INDEX)
        value = tl.load(x + place, readable, 0.0).to(ACC)
        centered = tl.where(inside, value - origin[:, None], 0.0)
        total += _fold_positions(centered, THREADS)
        if SECOND:
            squares += _fold_positions(centered * centered, THREADS)
    at_split = split.to(INDEX) * samples * channels + row
    shift = tl.sum(total, 1) / count
    tl.store(mean + at_split, origin.to(OUT) + shift.to(OUT), exists)
    if SECOND:
        tl.store(m2 + at_split, tl.sum(squares, 1) - shift * shift * count, exists)


@jit
def _merge_splits(
    mean, m2, at, exists, rows, positions, splits, per_split,
    SECOND: tl.constexpr, SPLITS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of whole rows, from those of their splits (Chan, Golub, LeVeque 1979).

    ``at`` and the results are [A, B]; the sums of squares are 0 unless ``SECOND``.
    """
    split = tl.arange(0, SPLITS)[:, None, None]
    known = exists[None, :, :] & (split < splits)
    place = split.to(INDEX) * rows + at[None, :, :]
    part = tl.load(mean + place, known, 0.0)
    count = tl.maximum(tl.minimum(positions - split * per_split, per_split), 0).to(part.dtype)
    m = tl.sum(part * count, 0) / positions
    q = tl.zeros_like(m)
    if SECOND:
        centered = tl.where(known, part - m[None, :, :], 0.0)
        q = tl.sum(tl.load(m2 + place, known, 0.0).to(part.dtype) + centered * centered * count, 0)
    return m, q


@jit
def merge(
    mean, m2, mean_out, m2_out, rows, positions, splits, per_split,
    SECOND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Merge the splits of every row into one mean and one sum of squared deviations."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = at < rows
    m, q = _merge_splits(mean, m2, at, exists, rows, positions, splits, per_split, SECOND, SPLITS, INDEX)
    tl.store(mean_out + at, m.to(mean_out.dtype.element_ty), exists)
    if SECOND:
        tl.store(m2_out + at, q.to(m2_out.dtype.element_ty), exists)


@jit
def add_splits(p, q, p_out, q_out, rows, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """Sums of whole rows, from those of their splits."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    known = (at < rows)[None, :] & (split < splits)
    place = split.to(INDEX) * rows + at[None, :]
    tl.store(p_out + at, tl.sum(tl.load(p + place, known, 0.0), 0), at < rows)
    tl.store(q_out + at, tl.sum(tl.load(q + place, known, 0.0), 0), at < rows)


@jit
def statistics(
    mean, m2, means_out, m2_out, mean_out, var_out, samples, channels, positions, splits, per_split,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Means of rows, and mean and biased variance of every channel over the batch; merged in float64.

    The rows' own sums of squared deviations are stored unless the pointer ``m2_out`` is None.

    The first mean of the channel is subtracted from all its means. It is one of the values that are summed, so no
    more digits are lost than the number of values has.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    rows = tl.cast(samples, INDEX) * channels
    pivot = tl.load(mean + channel, known, 0.0).to(tl.float64)
    pivot = tl.where(pivot - pivot == 0.0, pivot, 0.0)  # 0 if not finite: Inf - Inf would be NaN
    total = tl.zeros((SAMPLES, CHANNELS), tl.float64)
    squares = tl.zeros((SAMPLES, CHANNELS), tl.float64)
    for n in range(0, samples, SAMPLES):
        sample = n + tl.arange(0, SAMPLES)
        at = sample.to(INDEX)[:, None] * channels + channel[None, :]
        exists = (sample < samples)[:, None] & known[None, :]
        row_mean = tl.zeros((SAMPLES, CHANNELS), tl.float64)
        for split in tl.static_range(SPLITS):
            valid = exists & (split < splits)
            count = tl.maximum(tl.minimum(positions - split * per_split, per_split), 0).to(tl.float64)
            place = split * rows + at
            centered = tl.where(valid, tl.load(mean + place, valid, 0.0).to(tl.float64) - pivot[None, :], 0.0)
            row_mean += centered * count
            squares += tl.load(m2 + place, valid, 0.0).to(tl.float64) + centered * centered * count
        row_mean /= positions
        tl.store(means_out + at, (pivot[None, :] + row_mean).to(means_out.dtype.element_ty), exists)
        total += row_mean
        if m2_out is not None:
            own = tl.zeros((SAMPLES, CHANNELS), tl.float64)
            for split in tl.static_range(SPLITS):
                valid = exists & (split < splits)
                count = tl.maximum(tl.minimum(positions - split * per_split, per_split), 0).to(tl.float64)
                place = split * rows + at
                centered = tl.load(mean + place, valid, 0.0).to(tl.float64) - pivot[None, :] - row_mean
                centered = tl.where(valid, centered, 0.0) if SPLITS > 1 else tl.zeros_like(own)
                own += tl.load(m2 + place, valid, 0.0).to(tl.float64) + centered * centered * count
            tl.store(m2_out + at, own.to(m2_out.dtype.element_ty), exists)
    shift = tl.sum(total, 0) / samples
    tl.store(mean_out + channel, (pivot + shift).to(mean_out.dtype.element_ty), known)
    variance = tl.maximum(tl.sum(squares, 0) / samples / positions - shift * shift, 0.0, tl.PropagateNan.ALL)
    tl.store(var_out + channel, variance.to(var_out.dtype.element_ty), known)


@jit
def update_running(
    running_mean, running_var, mean, var, channels, momentum, unbiased,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``(1 - momentum) running + momentum new``; ``unbiased`` is momentum count / (count - 1)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    m, v = tl.load(mean + channel, known, 0.0), tl.load(var + channel, known, 0.0)
    keep = 1.0 - momentum
    m = keep * tl.load(running_mean + channel, known, 0.0).to(m.dtype) + momentum * m
    v = keep * tl.load(running_var + channel, known, 0.0).to(v.dtype) + unbiased * v
    tl.store(running_mean + channel, m.to(running_mean.dtype.element_ty), known)
    tl.store(running_var + channel, v.to(running_var.dtype.element_ty), known)


@jit
def apply(
    x, scale, shift, residual, out, samples, channels, positions,
    ACT: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr,
    POSITIONS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``act(x * scale + shift + residual)``; ``out`` may be ``x``."""
    place, inside, row, after, is_after = _elements(
        tl.program_id(0), samples, channels, positions, ROWS, POSITIONS, LAST, ALIGN, TOTAL, INDEX
    )
    y = tl.load(x + place, inside, 0.0).to(ACC)
    y *= _load_per_row(scale, row, after, is_after, POSITIONS, LAST, ALIGN, ACC)
    if shift is not None:
        y += _load_per_row(shift, row, after, is_after, POSITIONS, LAST, ALIGN, ACC)
    if residual is not None:
        y += tl.load(residual + place, inside, 0.0).to(ACC)
    tl.store(out + place, _activate(y, ACT).to(out.dtype.element_ty), inside)


@jit
def reduce(
    grad, x, scale, shift, center, saved, d, p, q, samples, channels, positions, splits, per_split,
    ACT: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, TOTAL: tl.constexpr, START: tl.constexpr,
    THREADS: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """First pass of the backward: d, and the sums of d and of d (x - center) over one split of every row.

    ``p`` and ``q`` are ``(splits, N, C)``; d is stored unless the pointer ``d`` is None.
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, lead, row, channel, exists, step = _rows(
        block, samples, channels, positions, ROWS, LAST, ALIGN, START, INDEX
    )
    size = _size(samples, channels, positions, TOTAL, INDEX)
    begin = split * per_split
    end = _end(begin, per_split, positions, LAST, ALIGN, START)
    a = None
    b = None
    if ACT == 3 or ACT == 4:
        a = tl.load(scale + row, exists, 0.0).to(ACC)[:, None]
        if shift is not None:
            b = tl.load(shift + row, exists, 0.0).to(ACC)[:, None]
    middle = tl.zeros((ROWS,), ACC)
    if center is not None:
        middle = tl.load(center + channel, exists, 0.0).to(ACC)
    p_total = _fold_positions(tl.zeros((ROWS, POSITIONS), ACC), THREADS)
    q_total = _fold_positions(tl.zeros((ROWS, POSITIONS), ACC), THREADS)
    for at in range(begin, end, POSITIONS):
        place, readable, inside = _tile(start, lead, exists, step, at, end, positions, size, POSITIONS, START, INDEX)
        value = tl.load(x + place, readable, 0.0).to(ACC)
        g = _upstream(grad, value, saved, a, b, place, readable, ACT, ACC)
        if d is not None:
            # If d does not depend on scale and shift, any row's program writes the same value: store all that was read.
            if ACT == 3 or ACT == 4:
                readable = inside
            tl.store(d + place, g.to(d.dtype.element_ty), readable)
        p_total += _fold_positions(tl.where(inside, g, 0.0), THREADS)
        q_total += _fold_positions(tl.where(inside, g * (value - middle[:, None]), 0.0), THREADS)
    at_split = split.to(INDEX) * samples * channels + row
    tl.store(p + at_split, tl.sum(p_total, 1), exists)
    tl.store(q + at_split, tl.sum(q_total, 1), exists)


@jit
def input_grad(
    grad, x, scale, shift, saved, offset, slope, center, out, samples, channels, positions,
    ACT: tl.constexpr, PER_SAMPLE: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, TOTAL: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Second pass of the backward: ``scale * d + offset + slope * (x - center)``; ``slope`` is (N, C), or (C,)."""
    place, inside, row, after, is_after = _elements(
        tl.program_id(0), samples, channels, positions, ROWS, POSITIONS, LAST, ALIGN, TOTAL, INDEX
    )
    a = _load_per_row(scale, row, after, is_after, POSITIONS, LAST, ALIGN, ACC)
    b = None
    if (ACT == 3 or ACT == 4) and shift is not None:
        b = _load_per_row(shift, row, after, is_after, POSITIONS, LAST, ALIGN, ACC)
    value = None
    if ACT == 3 or ACT == 4 or slope is not None:
        value = tl.load(x + place, inside, 0.0).to(ACC)
    g = _upstream(grad, value, saved, a, b, place, inside, ACT, ACC) * a
    g += _load_per_row(offset, row, after, is_after, POSITIONS, LAST, ALIGN, ACC)
    if slope is not None:
        channel, next_channel = row % channels, after % channels
        if center is not None:
            value -= _load_per_row(center, channel, next_channel, is_after, POSITIONS, LAST, ALIGN, ACC)
        if PER_SAMPLE:
            g += _load_per_row(slope, row, after, is_after, POSITIONS, LAST, ALIGN, ACC) * value
        else:
            g += _load_per_row(slope, channel, next_channel, is_after, POSITIONS, LAST, ALIGN, ACC) * value
    tl.store(out + place, g.to(out.dtype.element_ty), inside)


@jit
def _norm_slope(var, weight, channel, known, eps: tl.constexpr, ACC: tl.constexpr):
    """Weight / sqrt(var + eps)."""
    a = tl.full(channel.shape, 1.0, ACC)
    if var is not None:
        a = 1.0 / tl.sqrt(tl.load(var + channel, known, 1.0).to(ACC) + eps)
    if weight is not None:
        a *= tl.load(weight + channel, known, 1.0).to(ACC)
    return a


@jit
def _load_or_zero(pointer, at, mask, ACC: tl.constexpr):
    value = tl.zeros(at.shape, ACC)
    if pointer is not None:
        value = tl.load(pointer + at, mask, 0.0).to(ACC)
    return value


@jit
def _neighbour(channel, by: tl.constexpr, channels, CIRCULAR: tl.constexpr):
    """The channel at distance ``by``, and whether it exists."""
    other = channel + by
    if CIRCULAR:
        other = (other + channels) % channels
    return other, (other >= 0) & (other < channels)


@jit
def _norm_mean(map_means, mean, var, weight, bias, row, channel, known, eps: tl.constexpr, ACC: tl.constexpr):
    """Mean of a row of the norm's output: a (m - mean) + bias."""
    m = tl.load(map_means + row + channel, known, 0.0).to(ACC) - _load_or_zero(mean, channel, known, ACC)
    return _norm_slope(var, weight, channel, known, eps, ACC) * m + _load_or_zero(bias, channel, known, ACC)


@jit
def coefficients(
    map_means, mean, var, weight, bias, kernel, s_out, gate_out, scale_out, shift_out, samples, channels,
    eps: tl.constexpr, factor: tl.constexpr, K: tl.constexpr, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From means, compute gates, scales and shifts; without ``kernel`` there is no gate."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = at < tl.cast(samples, INDEX) * channels
    channel = (at % channels).to(tl.int32)
    row = at - channel
    a = _norm_slope(var, weight, channel, exists, eps, ACC)
    b = _load_or_zero(bias, channel, exists, ACC) - a * _load_or_zero(mean, channel, exists, ACC)
    s = _norm_mean(map_means, mean, var, weight, bias, row, channel, exists, eps, ACC)
    tl.store(s_out + at, s, exists)
    if kernel is not None:
        logit = tl.zeros((BLOCK,), ACC)
        for j in tl.static_range(K):
            other, known = _neighbour(channel, j - K // 2, channels, CIRCULAR)
            known = known & exists
            near = _norm_mean(map_means, mean, var, weight, bias, row, other, known, eps, ACC)
            logit += tl.load(kernel + j).to(ACC) * tl.where(known, near, 0.0)
        gate = _sigmoid(logit) * factor
        tl.store(gate_out + at, gate, exists)
        a *= gate
        b *= gate
    tl.store(scale_out + at, a, exists)
    tl.store(shift_out + at, b, exists)


@jit
def _logit_grad(
    p, q, gate, var, weight, bias, row, channel, known, eps: tl.constexpr, factor: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gradient of a gate's logit: (a q + bias p) gate (1 - gate / factor)."""
    at = row + channel
    g = tl.load(gate + at, known, 0.0).to(ACC)
    grad = _norm_slope(var, weight, channel, known, eps, ACC) * tl.load(q + at, known, 0.0).to(ACC)
    if bias is not None:
        grad += tl.load(bias + channel, known, 0.0).to(ACC) * tl.load(p + at, known, 0.0).to(ACC)
    return tl.where(known, grad * g * (1.0 - g / factor), 0.0)


@jit
def coefficients_backward(
    p, q, map_means, gate, grad_s, m2, grad_v, mean, var, weight, bias, kernel, offset_out, slope_out, sum_a, sum_b,
    kernel_sums, samples, channels, positions, per_program,
    eps: tl.constexpr, factor: tl.constexpr, K: tl.constexpr, CIRCULAR: tl.constexpr, SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Offsets and slopes ``(N, C)``, and partial sums over samples, from which :func:`finish` computes the rest.

    ``sum_a`` and ``sum_b`` are ``(groups of samples, C)``, ``kernel_sums`` ``(programs, TAPS)``.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = channel < channels
    a = _norm_slope(var, weight, channel, exists, eps, ACC)
    middle = _load_or_zero(mean, channel, exists, ACC)
    a_total = tl.zeros((SAMPLES, CHANNELS), ACC)
    b_total = tl.zeros((SAMPLES, CHANNELS), ACC)
    taps = tl.zeros((TAPS,), ACC)
    for n in range(group * per_program, tl.minimum(samples, group * per_program + per_program), SAMPLES):
        sample = n + tl.arange(0, SAMPLES)[:, None]
        row = sample.to(INDEX) * channels
        inside = (sample < samples) & exists
        ds = tl.zeros((SAMPLES, CHANNELS), ACC)
        if kernel is not None:
            logit = _logit_grad(p, q, gate, var, weight, bias, row, channel, inside, eps, factor, ACC)
            for j in tl.static_range(K):
                other, known = _neighbour(channel, K // 2 - j, channels, CIRCULAR)
                near = _logit_grad(p, q, gate, var, weight, bias, row, other, known & inside, eps, factor, ACC)
                ds += tl.load(kernel + j).to(ACC) * near
                other, known = _neighbour(channel, j - K // 2, channels, CIRCULAR)
                known = known & inside
                s = _norm_mean(map_means, mean, var, weight, bias, row, other, known, eps, ACC)
                taps += tl.where(tl.arange(0, TAPS) == j, tl.sum(tl.where(known, logit * s, 0.0)), 0.0)
        elif grad_s is not None:
            ds = tl.load(grad_s + row + channel, inside, 0.0).to(ACC)
        g = tl.full((SAMPLES, CHANNELS), 1.0, ACC)
        if gate is not None:
            g = tl.load(gate + row + channel, inside, 0.0).to(ACC)
        centered = tl.load(map_means + row + channel, inside, 0.0).to(ACC) - middle
        grad_a = g * tl.load(q + row + channel, inside, 0.0).to(ACC) + ds * centered
        offset = ds * a / positions
        if grad_v is not None:
            per_position = tl.load(grad_v + row + channel, inside, 0.0).to(ACC) * 2.0 * a / positions
            grad_a += per_position * tl.load(m2 + row + channel, inside, 0.0).to(ACC)
            offset -= per_position * a * centered
            tl.store(slope_out + row + channel, per_position * a, inside)
        a_total += tl.where(inside, grad_a, 0.0)
        b_total += tl.where(inside, g * tl.load(p + row + channel, inside, 0.0).to(ACC) + ds, 0.0)
        tl.store(offset_out + row + channel, offset, inside)
    at = group * channels + block * CHANNELS + tl.arange(0, CHANNELS)
    known = block * CHANNELS + tl.arange(0, CHANNELS) < channels
    tl.store(sum_a + at, tl.sum(a_total, 0), known)
    tl.store(sum_b + at, tl.sum(b_total, 0), known)
    if kernel is not None:
        tl.store(kernel_sums + tl.program_id(0) * TAPS + tl.arange(0, TAPS), taps)


@jit
def finish(
    sum_a, sum_b, kernel_sums, var, weight, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var,
    channels, groups, programs,
    eps: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
    TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of norm and band from the sums of :func:`coefficients_backward`."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    group = tl.arange(0, GROUPS)[:, None]
    at, valid = group * channels + channel[None, :], known[None, :] & (group < groups)
    a = tl.sum(tl.load(sum_a + at, valid, 0.0), 0)
    b = tl.sum(tl.load(sum_b + at, valid, 0.0), 0)
    inverse = _norm_slope(var, None, channel, known, eps, ACC)
    gamma = tl.full((CHANNELS,), 1.0, ACC)
    if weight is not None:
        gamma = tl.load(weight + channel, known, 1.0).to(ACC)
    tl.store(grad_weight + channel, a * inverse, known)
    tl.store(grad_bias + channel, b, known)
    tl.store(grad_mean + channel, -gamma * inverse * b, known)
    tl.store(grad_var + channel, -0.5 * gamma * a * inverse * inverse * inverse, known)
    if K > 0 and tl.program_id(0) == 0:
        taps = tl.zeros((TAPS,), ACC)
        tap = tl.arange(0, TAPS)
        for first in range(0, programs, PROGRAMS):
            program = first + tl.arange(0, PROGRAMS)
            part = tl.load(kernel_sums + program[:, None] * TAPS + tap[None, :], (program < programs)[:, None], 0.0)
            taps += tl.sum(part, 0)
        tl.store(grad_kernel + tap, taps, tap < K)
