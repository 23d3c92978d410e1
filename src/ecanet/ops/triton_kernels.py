"""The Triton kernels, for NVIDIA and AMD from one source: two passes over a feature map, and the maths between them.

Names and formulas are those of :mod:`ecanet.ops.reference`; :mod:`ecanet.ops.gpu` launches them. Importing this file
imports triton.

A map ``(N, C, S)`` is walked in tiles of ``ROWS`` rows by ``POSITIONS`` positions, a row being one channel of one
sample: contiguous, the positions of a row are neighbours in memory; channels last (``LAST``), the rows of a position
are. Reductions may split the positions of a row over ``splits`` programs; what each found is merged in a fixed order,
so results repeat themselves bit by bit.
"""

from typing import Any

import triton
import triton.language as tl

# Type checkers know neither triton's language nor that its functions are compiled.
jit: Any = triton.jit


@jit
def _rows(block, samples, channels, positions, ROWS: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr):
    """Of every row of a tile: offset of its first position, index in ``(N, C)``, channel, whether it exists."""
    if LAST:
        blocks = tl.cdiv(channels, ROWS)
        sample = (block // blocks).to(INDEX)
        channel = block % blocks * ROWS + tl.arange(0, ROWS)
        start = sample * positions * channels + channel
        nc = sample * channels + channel
        exists = channel < channels
    else:
        nc = block.to(INDEX) * ROWS + tl.arange(0, ROWS)
        channel = (nc % channels).to(tl.int32)
        start = nc * positions
        exists = nc < tl.cast(samples, INDEX) * channels
    return start, nc, channel, exists


@jit
def _places(start, position, channels, LAST: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of a tile, [ROWS, POSITIONS]."""
    step = channels if LAST else 1
    return start[:, None] + position.to(INDEX)[None, :] * step


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _activate(y, ACT: tl.constexpr):
    # A NaN compares false, so it comes out as it came in.
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
    """Grad act'(...), from the output for ReLU and ReLU6, from the input for SiLU and Hardswish."""
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
    """Gradient of what went into the activation; scale and shift are [ROWS, 1]."""
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
def moments(
    x, mean, m2, samples, channels, positions, splits, per_split,
    SECOND: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Mean of every row over the positions of one split and, if ``SECOND``, the sum of squares about it.

    ``mean`` and ``m2`` are ``(splits, N, C)``. Values are measured from the mean of the first tile: then the sums of
    squares lose digits to cancellation by at most the number of tiles.
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, nc, _, exists = _rows(block, samples, channels, positions, ROWS, LAST, INDEX)
    begin = split * per_split
    end = tl.minimum(begin + per_split, positions)
    count = (end - begin).to(ACC)
    origin = tl.zeros((ROWS,), ACC)
    if SECOND:
        position = begin + tl.arange(0, POSITIONS)
        inside = exists[:, None] & (position < end)[None, :]
        first = tl.load(x + _places(start, position, channels, LAST, INDEX), inside, 0.0).to(ACC)
        origin = tl.sum(first, 1) / tl.minimum(end - begin, POSITIONS).to(ACC)
        origin = tl.where(origin - origin == 0.0, origin, 0.0)  # finite, or none: Inf - Inf would be NaN
    total = tl.zeros((ROWS, POSITIONS), ACC)
    squares = tl.zeros((ROWS, POSITIONS), ACC)
    for at in range(begin, end, POSITIONS):
        position = at + tl.arange(0, POSITIONS)
        inside = exists[:, None] & (position < end)[None, :]
        value = tl.load(x + _places(start, position, channels, LAST, INDEX), inside, 0.0).to(ACC)
        away = tl.where(inside, value - origin[:, None], 0.0)
        total += away
        if SECOND:
            squares += away * away
    here = split.to(INDEX) * samples * channels + nc
    away = tl.sum(total, 1) / count
    tl.store(mean + here, origin.to(OUT) + away.to(OUT), exists)
    if SECOND:
        tl.store(m2 + here, (tl.sum(squares, 1) - away * away * count).to(OUT), exists)


@jit
def _merge_splits(mean, m2, at, exists, rows, positions, splits, per_split, SECOND: tl.constexpr, OUT: tl.constexpr):
    """Mean and sum of squares of whole rows, from those of their splits (Chan, Golub, LeVeque 1979)."""
    m = tl.load(mean + at, exists, 0.0).to(OUT)
    q = tl.zeros_like(m)
    if SECOND:
        q = tl.load(m2 + at, exists, 0.0).to(OUT)
    for split in range(1, splits):
        before = (split * per_split).to(OUT)
        count = (tl.minimum(split * per_split + per_split, positions) - split * per_split).to(OUT)
        at += rows
        other = tl.load(mean + at, exists, 0.0).to(OUT)
        away = other - m
        m = (m * before + other * count) / (before + count)
        if SECOND:
            q += tl.load(m2 + at, exists, 0.0).to(OUT)
            q += away * away * (before * count / (before + count))
    return m, q


@jit
def merge(
    mean, m2, mean_out, m2_out, rows, positions, splits, per_split,
    SECOND: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One mean, and one sum of squares, for every row."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = at < rows
    m, q = _merge_splits(mean, m2, at, exists, rows, positions, splits, per_split, SECOND, OUT)
    tl.store(mean_out + at, m.to(mean_out.dtype.element_ty), exists)
    if SECOND:
        tl.store(m2_out + at, q.to(m2_out.dtype.element_ty), exists)


@jit
def statistics(
    mean, m2, means_out, mean_out, var_out, samples, channels, positions, splits, per_split,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Means of rows, and mean and biased variance of every channel over the batch; merged in float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    rows = tl.cast(samples, INDEX) * channels
    total = tl.zeros((CHANNELS,), tl.float64)
    for n in range(0, samples, SAMPLES):
        sample = n + tl.arange(0, SAMPLES)
        at = sample.to(INDEX)[:, None] * channels + channel[None, :]
        exists = (sample < samples)[:, None] & known[None, :]
        m, _ = _merge_splits(mean, m2, at, exists, rows, positions, splits, per_split, False, tl.float64)
        tl.store(means_out + at, m.to(means_out.dtype.element_ty), exists)
        total += tl.sum(tl.where(exists, m, 0.0), 0)
    center = total / samples
    spread = tl.zeros((CHANNELS,), tl.float64)
    for n in range(0, samples, SAMPLES):
        sample = n + tl.arange(0, SAMPLES)
        at = sample.to(INDEX)[:, None] * channels + channel[None, :]
        exists = (sample < samples)[:, None] & known[None, :]
        m, q = _merge_splits(mean, m2, at, exists, rows, positions, splits, per_split, True, tl.float64)
        away = m - center[None, :]
        spread += tl.sum(tl.where(exists, q + away * away * positions, 0.0), 0)
    tl.store(mean_out + channel, center.to(mean_out.dtype.element_ty), known)
    tl.store(var_out + channel, (spread / samples / positions).to(var_out.dtype.element_ty), known)


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
    ACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``act(x * scale + shift + residual)``; ``out`` may be ``x``."""
    tiles = tl.cdiv(positions, POSITIONS)
    start, nc, _, exists = _rows(tl.program_id(0) // tiles, samples, channels, positions, ROWS, LAST, INDEX)
    position = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    place = _places(start, position, channels, LAST, INDEX)
    inside = exists[:, None] & (position < positions)[None, :]
    y = tl.load(x + place, inside, 0.0).to(ACC) * tl.load(scale + nc, exists, 0.0).to(ACC)[:, None]
    if shift is not None:
        y += tl.load(shift + nc, exists, 0.0).to(ACC)[:, None]
    if residual is not None:
        y += tl.load(residual + place, inside, 0.0).to(ACC)
    tl.store(out + place, _activate(y, ACT).to(out.dtype.element_ty), inside)


@jit
def reduce(
    grad, x, scale, shift, center, saved, d, p, q, samples, channels, positions, splits, per_split,
    ACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """First pass of the backward: d, and for one split of every row the sums of d and of d (x - center).

    ``p`` and ``q`` are ``(splits, N, C)``; without ``d`` it is not kept.
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, nc, channel, exists = _rows(block, samples, channels, positions, ROWS, LAST, INDEX)
    begin = split * per_split
    end = tl.minimum(begin + per_split, positions)
    a = None
    b = None
    if ACT == 3 or ACT == 4:
        a = tl.load(scale + nc, exists, 0.0).to(ACC)[:, None]
        if shift is not None:
            b = tl.load(shift + nc, exists, 0.0).to(ACC)[:, None]
    middle = tl.zeros((ROWS,), ACC)
    if center is not None:
        middle = tl.load(center + channel, exists, 0.0).to(ACC)
    p_total = tl.zeros((ROWS, POSITIONS), ACC)
    q_total = tl.zeros((ROWS, POSITIONS), ACC)
    for at in range(begin, end, POSITIONS):
        position = at + tl.arange(0, POSITIONS)
        place = _places(start, position, channels, LAST, INDEX)
        inside = exists[:, None] & (position < end)[None, :]
        value = tl.load(x + place, inside, 0.0).to(ACC)
        here = _upstream(grad, value, saved, a, b, place, inside, ACT, ACC)
        if d is not None:
            tl.store(d + place, here.to(d.dtype.element_ty), inside)
        p_total += tl.where(inside, here, 0.0)
        q_total += tl.where(inside, here * (value - middle[:, None]), 0.0)
    at_split = split.to(INDEX) * samples * channels + nc
    tl.store(p + at_split, tl.sum(p_total, 1), exists)
    tl.store(q + at_split, tl.sum(q_total, 1), exists)


@jit
def input_grad(
    grad, x, scale, shift, saved, offset, slope, center, out, samples, channels, positions,
    ACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Second pass of the backward: ``scale * d + offset + slope * (x - center)``."""
    tiles = tl.cdiv(positions, POSITIONS)
    start, nc, channel, exists = _rows(tl.program_id(0) // tiles, samples, channels, positions, ROWS, LAST, INDEX)
    position = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    place = _places(start, position, channels, LAST, INDEX)
    inside = exists[:, None] & (position < positions)[None, :]
    a = tl.load(scale + nc, exists, 0.0).to(ACC)[:, None]
    b = None
    if (ACT == 3 or ACT == 4) and shift is not None:
        b = tl.load(shift + nc, exists, 0.0).to(ACC)[:, None]
    value = None
    if ACT == 3 or ACT == 4 or slope is not None:
        value = tl.load(x + place, inside, 0.0).to(ACC)
    g = _upstream(grad, value, saved, a, b, place, inside, ACT, ACC) * a
    g += tl.load(offset + nc, exists, 0.0).to(ACC)[:, None]
    if slope is not None:
        if center is not None:
            value -= tl.load(center + channel, exists, 0.0).to(ACC)[:, None]
        g += tl.load(slope + channel, exists, 0.0).to(ACC)[:, None] * value
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
def _or_zero(pointer, at, mask, ACC: tl.constexpr):
    value = tl.zeros(at.shape, ACC)
    if pointer is not None:
        value = tl.load(pointer + at, mask, 0.0).to(ACC)
    return value


@jit
def _neighbour(channel, by: tl.constexpr, channels, CIRCULAR: tl.constexpr):
    """The channel that is ``by`` away, and whether there is one."""
    other = channel + by
    if CIRCULAR:
        other = (other + channels) % channels
    return other, (other >= 0) & (other < channels)


@jit
def _norm_mean(means, mean, var, weight, bias, row, channel, known, eps: tl.constexpr, ACC: tl.constexpr):
    """Mean of a row of the norm's output: a (m - mean) + bias."""
    m = tl.load(means + row + channel, known, 0.0).to(ACC) - _or_zero(mean, channel, known, ACC)
    return _norm_slope(var, weight, channel, known, eps, ACC) * m + _or_zero(bias, channel, known, ACC)


@jit
def coefficients(
    means, mean, var, weight, bias, kernel, s_out, gate_out, scale_out, shift_out, samples, channels,
    eps: tl.constexpr, K: tl.constexpr, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From means to gates, scales and shifts; without ``kernel`` there is no gate."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = at < tl.cast(samples, INDEX) * channels
    channel = (at % channels).to(tl.int32)
    row = at - channel
    a = _norm_slope(var, weight, channel, exists, eps, ACC)
    b = _or_zero(bias, channel, exists, ACC) - a * _or_zero(mean, channel, exists, ACC)
    s = _norm_mean(means, mean, var, weight, bias, row, channel, exists, eps, ACC)
    tl.store(s_out + at, s, exists)
    if kernel is not None:
        logit = tl.zeros((BLOCK,), ACC)
        for j in tl.static_range(K):
            other, known = _neighbour(channel, j - K // 2, channels, CIRCULAR)
            known = known & exists
            near = _norm_mean(means, mean, var, weight, bias, row, other, known, eps, ACC)
            logit += tl.load(kernel + j).to(ACC) * tl.where(known, near, 0.0)
        gate = _sigmoid(logit)
        tl.store(gate_out + at, gate, exists)
        a *= gate
        b *= gate
    tl.store(scale_out + at, a, exists)
    tl.store(shift_out + at, b, exists)


@jit
def _logit_grad(
    p, q, gate, var, weight, bias, row, channel, known, eps: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gradient of a gate's logit: (a q + bias p) gate (1 - gate)."""
    at = row + channel
    g = tl.load(gate + at, known, 0.0).to(ACC)
    grad = _norm_slope(var, weight, channel, known, eps, ACC) * tl.load(q + at, known, 0.0).to(ACC)
    if bias is not None:
        grad += tl.load(bias + channel, known, 0.0).to(ACC) * tl.load(p + at, known, 0.0).to(ACC)
    return tl.where(known, grad * g * (1.0 - g), 0.0)


@jit
def coefficients_backward(
    p, q, means, gate, grad_s, mean, var, weight, bias, kernel, offset_out, sum_a, sum_b, kernel_sums,
    samples, channels, positions, per_program,
    eps: tl.constexpr, K: tl.constexpr, CIRCULAR: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Offsets ``(N, C)``, and the sums over some samples that the gradients of norm and band are made of.

    ``sum_a`` and ``sum_b`` are ``(groups of samples, C)``, ``kernel_sums`` ``(programs, TAPS)``.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = channel < channels
    a = _norm_slope(var, weight, channel, exists, eps, ACC)
    middle = _or_zero(mean, channel, exists, ACC)
    a_total = tl.zeros((SAMPLES, CHANNELS), ACC)
    b_total = tl.zeros((SAMPLES, CHANNELS), ACC)
    taps = tl.zeros((TAPS,), ACC)
    for n in range(group * per_program, tl.minimum(samples, group * per_program + per_program), SAMPLES):
        sample = n + tl.arange(0, SAMPLES)[:, None]
        row = sample.to(INDEX) * channels
        inside = (sample < samples) & exists
        ds = tl.zeros((SAMPLES, CHANNELS), ACC)
        if kernel is not None:
            logit = _logit_grad(p, q, gate, var, weight, bias, row, channel, inside, eps, ACC)
            for j in tl.static_range(K):
                other, known = _neighbour(channel, K // 2 - j, channels, CIRCULAR)
                near = _logit_grad(p, q, gate, var, weight, bias, row, other, known & inside, eps, ACC)
                ds += tl.load(kernel + j).to(ACC) * near
                other, known = _neighbour(channel, j - K // 2, channels, CIRCULAR)
                known = known & inside
                s = _norm_mean(means, mean, var, weight, bias, row, other, known, eps, ACC)
                taps += tl.where(tl.arange(0, TAPS) == j, tl.sum(tl.where(known, logit * s, 0.0)), 0.0)
        elif grad_s is not None:
            ds = tl.load(grad_s + row + channel, inside, 0.0).to(ACC)
        g = tl.full((SAMPLES, CHANNELS), 1.0, ACC)
        if gate is not None:
            g = tl.load(gate + row + channel, inside, 0.0).to(ACC)
        away = tl.load(means + row + channel, inside, 0.0).to(ACC) - middle
        a_total += tl.where(inside, g * tl.load(q + row + channel, inside, 0.0).to(ACC) + ds * away, 0.0)
        b_total += tl.where(inside, g * tl.load(p + row + channel, inside, 0.0).to(ACC) + ds, 0.0)
        tl.store(offset_out + row + channel, ds * a / positions, inside)
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
    eps: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr, TAPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of norm and band from the sums of :func:`coefficients_backward`."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    a = tl.zeros((CHANNELS,), ACC)
    b = tl.zeros((CHANNELS,), ACC)
    for group in range(groups):
        a += tl.load(sum_a + group * channels + channel, known, 0.0)
        b += tl.load(sum_b + group * channels + channel, known, 0.0)
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
        for at in range(0, programs, PROGRAMS):
            program = at + tl.arange(0, PROGRAMS)
            part = tl.load(kernel_sums + program[:, None] * TAPS + tap[None, :], (program < programs)[:, None], 0.0)
            taps += tl.sum(part, 0)
        tl.store(grad_kernel + tap, taps, tap < K)
