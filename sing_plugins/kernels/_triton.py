# mypy: ignore-errors
"""One step of SING for float32 tensors on an accelerator, in Triton: three launches for all tensors of a param group.

The arithmetic is that of ``_cpu.c``. Work is cut into units whose sizes depend on the shapes only, and whose sums are
added in a fixed order, so that the result is the same at every run. Statistics are summed up in
float64: neither the square of 3e38 nor that of 1e-45 leaves its range, and 1e8 entries cost no digit.

Tables are :mod:`sing_plugins.kernels.accelerator`'s, on the device: for each tensor, ``addresses``, ``layout`` (int64)
and ``table`` (float32) have the fields that are listed below. Offsets are int64.

No ``from __future__ import annotations`` here: Triton's interpreter reads the annotations. Names are Triton's own
language, not Python's types.
"""

import triton
import triton.language as tl

ADDRESSES = ("param", "first", "second", "slow", "step", "grad")
LAYOUT = ("rows", "columns", "each", "chunks", "units", "unit", "row", "block", "centred", "decays")
FACTORS = ("scale", "inverse", "root", "size", "keep", "eps")

_ADDRESSES = tl.constexpr(len(ADDRESSES))
_LAYOUT = tl.constexpr(len(LAYOUT))
_ROWS, _COLUMNS, _EACH, _CHUNKS, _UNITS, _UNIT, _ROW, _BLOCK, _CENTRED, _DECAYS = (
    tl.constexpr(k) for k in range(len(LAYOUT))
)
_FACTORS = tl.constexpr(len(FACTORS))
_SCALE, _INVERSE, _ROOT, _SIZE, _KEEP, _EPS = (tl.constexpr(k) for k in range(len(FACTORS)))

# As in cpu.py; a host that is not written here gets the divided gradient.
_NO_HOST, _ADAMW, _ADABELIEF, _SGD, _SGD_MOMENTUM, _SGD_NESTEROV = (tl.constexpr(k) for k in range(-1, 5))

_FEW, _SOME = tl.constexpr(32), tl.constexpr(512)  # columns, of which a tile has more than one row


@triton.jit
def _pointers(addresses, tensor):
    """A tensor's; those that a kernel does not use are not loaded once it is compiled."""
    mine = addresses + tensor * _ADDRESSES
    param = tl.load(mine).to(tl.pointer_type(tl.float32))
    first = tl.load(mine + 1).to(tl.pointer_type(tl.float32))
    second = tl.load(mine + 2).to(tl.pointer_type(tl.float32))
    slow = tl.load(mine + 3).to(tl.pointer_type(tl.float32))
    step = tl.load(mine + 4).to(tl.pointer_type(tl.float32))
    grad = tl.load(mine + 5).to(tl.pointer_type(tl.float32))
    return param, first, second, slow, step, grad


@triton.jit
def _sums(grad, means, begin, end, first, last, columns, centred, whole, height: tl.constexpr, width: tl.constexpr):
    """Sums of (x - shift) and of its square over rows begin..end and columns first..last.

    The shift is a centred row's first entry: the squares of what is left of a row whose mean is large lose nothing
    then. Of whole centred rows, the squares are those of the centred entries, and the means are written.
    """
    sums = tl.full([height], 0.0, tl.float64)
    squares = tl.full([height], 0.0, tl.float64)
    for top in range(begin, end, height):
        rows = (top + tl.arange(0, height)).to(tl.int64)
        there = rows < end
        starts = grad + rows * columns
        shift = tl.load(starts, mask=there & (centred != 0), other=0.0).to(tl.float64)
        s = tl.full([height, width], 0.0, tl.float64)
        q = tl.full([height, width], 0.0, tl.float64)
        for left in range(first, last, width):
            at = (left + tl.arange(0, width)).to(tl.int64)
            inside = there[:, None] & (at < last)[None, :]
            x = tl.load(starts[:, None] + at[None, :], mask=inside, other=0.0)
            d = tl.where(inside, x.to(tl.float64) - shift[:, None], 0.0)
            s += d
            q += d * d
        row_sums = tl.sum(s, axis=1)
        row_squares = tl.sum(q, axis=1)
        if (centred != 0) & whole:
            mean = row_sums / columns.to(tl.float64)
            row_squares = row_squares - row_sums * mean
            row_squares = tl.where(row_squares < 0, 0.0, row_squares)  # not the other way round: NaN stays
            tl.store(means + rows, (shift + mean).to(tl.float32), mask=there)
        sums += row_sums
        squares += row_squares
    return tl.sum(sums, axis=0), tl.sum(squares, axis=0)


@triton.jit
def statistics(addresses, layout, tensor_of_unit, sums, squares, means, chunk: tl.constexpr):
    """Of each unit the sum of its entries' squares, and where it is a part of a centred row, the sum of its entries.

    One program a unit, which is a number of whole rows or at most ``chunk`` columns of one.
    """
    unit = tl.program_id(0)
    tensor = tl.load(tensor_of_unit + unit).to(tl.int64)
    mine = layout + tensor * _LAYOUT
    rows = tl.load(mine + _ROWS)
    columns = tl.load(mine + _COLUMNS)
    chunks = tl.load(mine + _CHUNKS)
    centred = tl.load(mine + _CENTRED)
    each = tl.load(mine + _EACH)
    number = unit - tl.load(mine + _UNIT)
    begin = number // chunks * each
    end = tl.minimum(begin + each, rows)
    first = number % chunks * chunk
    last = tl.minimum(first + chunk, columns)
    last = tl.where(chunks == 1, columns, last)
    whole = chunks == 1
    _, _, _, _, _, grad = _pointers(addresses, tensor)
    row_means = means + tl.load(mine + _ROW)
    if columns <= _FEW:
        s, q = _sums(grad, row_means, begin, end, first, last, columns, centred, whole, 128, 8)
    elif columns <= _SOME:
        s, q = _sums(grad, row_means, begin, end, first, last, columns, centred, whole, 8, 128)
    else:
        s, q = _sums(grad, row_means, begin, end, first, last, columns, centred, whole, 1, 1024)
    tl.store(sums + unit, s)
    tl.store(squares + unit, q)


@triton.jit
def _rows_of_chunks(grad, means, sums, squares, rows, columns, chunks, height: tl.constexpr, width: tl.constexpr):
    """The centred squares of rows that several units share; their means are written."""
    total = tl.full([height], 0.0, tl.float64)
    for top in range(0, rows, height):
        numbers = (top + tl.arange(0, height)).to(tl.int64)
        there = numbers < rows
        s = tl.full([height, width], 0.0, tl.float64)
        q = tl.full([height, width], 0.0, tl.float64)
        for left in range(0, chunks, width):
            at = (left + tl.arange(0, width)).to(tl.int64)
            inside = there[:, None] & (at < chunks)[None, :]
            units = numbers[:, None] * chunks + at[None, :]
            s += tl.load(sums + units, mask=inside, other=0.0)
            q += tl.load(squares + units, mask=inside, other=0.0)
        row_sums = tl.sum(s, axis=1)
        mean = row_sums / columns.to(tl.float64)
        centred = tl.sum(q, axis=1) - row_sums * mean
        total += tl.where(centred < 0, 0.0, centred)
        shift = tl.load(grad + numbers * columns, mask=there, other=0.0).to(tl.float64)
        tl.store(means + numbers, (shift + mean).to(tl.float32), mask=there)
    return tl.sum(total, axis=0)


@triton.jit
def _power(x, n):
    """x to the power of n >= 0, in float64."""
    result = x * 0 + 1
    while n > 0:
        result = tl.where(n % 2 == 1, result * x, result)
        x = x * x
        n = n // 2
    return result


@triton.jit
def factors(
    addresses,
    layout,
    sums,
    squares,
    means,
    table,
    lr,
    weight_decay,
    eps,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    softplus_beta,
    host: tl.constexpr,
    lr_is_there: tl.constexpr,
    statistics_are_there: tl.constexpr,
    relative: tl.constexpr,
    normalize: tl.constexpr,
    maximize: tl.constexpr,
):
    """What the entries of each tensor are updated with; counts the tensor's step. One program a tensor.

    Numbers that are given are float32 here: the decay rates come in two parts, whose sum is as exact as float64, since
    ``1 - beta**step`` would lose four digits. ``lr`` may be a tensor on the device.
    """
    tensor = tl.program_id(0).to(tl.int64)
    mine = layout + tensor * _LAYOUT
    out = table + tensor * _FACTORS
    zero = tl.full([], 0.0, tl.float64)
    _, _, _, _, counter, grad = _pointers(addresses, tensor)

    total = zero
    if statistics_are_there:
        chunks = tl.load(mine + _CHUNKS)
        unit = tl.load(mine + _UNIT)
        if (tl.load(mine + _CENTRED) != 0) & (chunks > 1):
            total = _rows_of_chunks(
                grad,
                means + tl.load(mine + _ROW),
                sums + unit,
                squares + unit,
                tl.load(mine + _ROWS),
                tl.load(mine + _COLUMNS),
                chunks,
                8,
                128,
            )
        else:
            units = tl.load(mine + _UNITS)
            q = tl.full([1024], 0.0, tl.float64)
            for start in range(0, units, 1024):
                at = (start + tl.arange(0, 1024)).to(tl.int64)
                q += tl.load(squares + unit + at, mask=at < units, other=0.0)
            total = tl.sum(q, axis=0)

    # The scale is a power of two, and keeps the inverse of the norm a normal number.
    scale = zero + 1.0
    inverse = zero + 1.0
    if normalize:
        norm = tl.sqrt(total) + eps
        for _ in tl.static_range(2):
            scaled = norm * scale
            shrunk = tl.where(scaled > 1e30, scale * 8.673617379884035e-19, scale)  # 2**-60
            scale = tl.where(scaled < 1e-30, scale * 1152921504606846976.0, shrunk)
        inverse = 1.0 / (norm * scale)  # 0 for an infinite norm, whose infinite entry becomes NaN
    if maximize:
        inverse = -inverse
    tl.store(out + _SCALE, scale.to(tl.float32))
    tl.store(out + _INVERSE, inverse.to(tl.float32))

    if host != _NO_HOST:
        count = tl.load(counter) + 1.0
        tl.store(counter, count)
        rate = tl.load(lr).to(tl.float64) if lr_is_there else zero + lr
        keep = tl.where(tl.load(mine + _DECAYS) != 0, 1.0 - rate * weight_decay, zero + 1.0)
        root = zero
        size = rate
        own_eps = zero + eps
        if (host == _ADAMW) | (host == _ADABELIEF):
            step = count.to(tl.int32)
            # The softplus's beta and the change's 1/beta leave the loop.
            beta = zero + softplus_beta
            if relative:
                entries = (tl.load(mine + _ROWS) * tl.load(mine + _COLUMNS)).to(tl.float64)
                beta *= tl.sqrt(entries)
                own_eps /= entries  # AdaBelief adds it to what is of the order of 1/entries
            root = beta / tl.sqrt(1.0 - _power(zero + beta2 + beta2_rest, step))
            size = beta * rate / (1.0 - _power(zero + beta1 + beta1_rest, step))
        tl.store(out + _ROOT, root.to(tl.float32))
        tl.store(out + _SIZE, size.to(tl.float32))
        tl.store(out + _KEEP, keep.to(tl.float32))
        tl.store(out + _EPS, own_eps.to(tl.float32))


@triton.jit
def update(
    addresses,
    layout,
    tensor_of_block,
    means,
    table,
    mix1,
    beta2,
    mix2,
    momentum,
    alpha,
    due,
    host: tl.constexpr,
    softplus: tl.constexpr,
    merge: tl.constexpr,
    block: tl.constexpr,
):
    """Update ``block`` entries, one program each. Without a host, the divided gradient is written to ``param``.

    Slow weights are merged for a ``merge`` of 1, and for one of 2 where ``due`` is not 0 on the device.
    """
    number = tl.program_id(0)
    tensor = tl.load(tensor_of_block + number).to(tl.int64)
    mine = layout + tensor * _LAYOUT
    columns = tl.load(mine + _COLUMNS)
    start = (number - tl.load(mine + _BLOCK)) * block
    entry = tl.arange(0, block)
    at = start + entry
    there = at < tl.load(mine + _ROWS) * columns
    factor = table + tensor * _FACTORS
    scale = tl.load(factor + _SCALE)

    mean = tl.full([block], 0.0, tl.float32)
    if tl.load(mine + _CENTRED) != 0:
        # Which row: one division in int64, the others in int32, of what is below the block's size.
        row = start // columns
        left = tl.minimum((row + 1) * columns - start, block).to(tl.int32)
        width = tl.minimum(columns, block).to(tl.int32)
        below = tl.where(entry < left, 0, 1 + (entry - left) // width)
        mean = tl.load(means + tl.load(mine + _ROW) + row + below, mask=there, other=0.0)
    param, first, second, slow, _, grad = _pointers(addresses, tensor)
    g = (tl.load(grad + at, mask=there, other=0.0) * scale - mean * scale) * tl.load(factor + _INVERSE)

    param += at
    first += at
    second += at
    slow += at
    if host == _NO_HOST:
        tl.store(param, g, mask=there)
    else:
        change = g
        if (host == _SGD_MOMENTUM) | (host == _SGD_NESTEROV):
            buffer = momentum * tl.load(first, mask=there, other=0.0) + g
            tl.store(first, buffer, mask=there)
            change = g + momentum * buffer if host == _SGD_NESTEROV else buffer
        elif (host == _ADAMW) | (host == _ADABELIEF):
            eps = tl.load(factor + _EPS)
            m = tl.load(first, mask=there, other=0.0)
            m = m + mix1 * (g - m)
            v = beta2 * tl.load(second, mask=there, other=0.0)
            v = v + mix2 * ((g - m) * (g - m)) + eps if host == _ADABELIEF else v + mix2 * (g * g)
            tl.store(first, m, mask=there)
            tl.store(second, v, mask=there)
            # With softplus its argument: beta times the root of the corrected moment.
            y = tl.sqrt_rn(v) * tl.load(factor + _ROOT)
            if softplus:
                # ln(1 + e^y) = P/Q within 2e-7 up to 14, and y beyond; 5e-7 with the rounding of float32. As in _cpu.c.
                a = tl.where(y < 14.0, y, 14.0)
                beyond = y - a
                a2 = a * a
                a4 = a2 * a2
                p = (0.693147302 + 0.716306031 * a) + a2 * (0.360261172 + 0.109994091 * a)
                p = p + a4 * (0.020469334 + 0.00145198999 * a)
                q = (1.0 + 0.312074035 * a) + a2 * (0.114210598 + 0.0202806741 * a)
                q = q + a4 * 0.0014554183
                change = tl.div_rn(m * q, p + beyond * q)
            else:
                change = tl.div_rn(m, y + eps)
        weight = tl.load(factor + _KEEP) * tl.load(param, mask=there, other=0.0) - tl.load(factor + _SIZE) * change
        merges = merge == 1
        if merge == 2:
            merges = tl.load(due) != 0
        if merges:
            before = tl.load(slow, mask=there, other=0.0)
            weight = before + alpha * (weight - before)
            tl.store(slow, weight, mask=there)
        tl.store(param, weight, mask=there)
