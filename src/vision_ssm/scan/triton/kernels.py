"""Selective scans along routes in Triton: forward, summaries of chunks, and backward.

A program carries a block of channels along one route (or several, one after the other) in tiles. A tile's steps lie in
a (Q, S) grid, step ``s * Q + q`` at ``[q, s]``: Q neighboring steps are a segment, scanned in the registers of one
thread where the layout allows; the ends of the S segments are then scanned across threads.

Several images may follow each other in one sequence: step v is step ``v % steps`` of image ``v // steps``, and the
decay at an image's first step is 0. Steps after the last one leave the state as it is.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Three products in TF32 are as exact as one in float32; AMD has no such mode.
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

# Up to this rank, step sizes are multiply-adds: the way to the tensor cores and back would take longer. The backward
# pass has fewer free registers.
FEW_FORWARD = tl.constexpr(16)
FEW_BACKWARD = tl.constexpr(8)

# Neighboring channels per thread, whatever the dtype, so that tensors of different dtypes have one layout.
NEIGHBORS = tl.constexpr(4)

# Sizes that change from call to call and whose divisors no vector load depends on: not specialized.
_ANY = ("batch", "tokens", "steps", "routes", "taken", "images", "tiles", "chunks", "parts")


@triton.jit
def _compose(a1, b1, a2, b2):
    """Compose maps of the state, h -> a h + b: the first, then the second."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_both(a1, p1, b1, m1, a2, p2, b2, m2):
    """Compose runs of steps: (a, b) maps the state through all of the run, (p, m) to a point inside its last step."""
    return a1 * a2, a1 * p2, a2 * b1 + b2, p2 * b1 + m2


@triton.jit
def _edge(values, position: tl.constexpr):
    """Return one entry along the first axis."""
    chosen = tl.arange(0, values.shape[0]) == position
    chosen = chosen[:, None, None] if len(values.shape) == 3 else chosen[:, None]
    return tl.sum(tl.where(chosen, values, -0.0), 0)  # adding -0.0 changes nothing, so the compiler leaves it out


@triton.jit
def _scan(a, b, carry):
    """Return the states of a tile, (Q, S, C), from the state in front of it, and the state behind it, (C,)."""
    Q: tl.constexpr = a.shape[0]
    S: tl.constexpr = a.shape[1]
    if Q == 1:
        a, b = tl.associative_scan((a, b), 1, _compose)
        h = a * carry[None, None, :] + b
        return h, _edge(_edge(h, 0), S - 1)
    a, b = tl.associative_scan((a, b), 0, _compose)
    segment_a, segment_b = _edge(a, Q - 1), _edge(b, Q - 1)  # (S, C)
    one, zero = tl.full(segment_a.shape, 1.0, tl.float32), tl.zeros(segment_a.shape, tl.float32)
    a_all, a_in, b_all, b_in = tl.associative_scan((segment_a, one, segment_b, zero), 0, _compose_both)
    into = a_in * carry[None, :] + b_in
    return a * into[None, :, :] + b, _edge(a_all * carry[None, :] + b_all, S - 1)


@triton.jit
def _scan_both(a, b, m, carry, REVERSE: tl.constexpr):
    """Return the states inside and after each step of a tile, in either direction; all (Q, S, C)."""
    Q: tl.constexpr = a.shape[0]
    one = tl.full(a.shape, 1.0, tl.float32)
    a, p, b, m = tl.associative_scan((a, one, b, m), 0, _compose_both, reverse=REVERSE)
    segment_a, segment_b = _edge(a, 0 if REVERSE else Q - 1), _edge(b, 0 if REVERSE else Q - 1)  # (S, C)
    one, zero = tl.full(segment_a.shape, 1.0, tl.float32), tl.zeros(segment_a.shape, tl.float32)
    _, a_in, _, b_in = tl.associative_scan((segment_a, one, segment_b, zero), 0, _compose_both, reverse=REVERSE)
    into = (a_in * carry[None, :] + b_in)[None, :, :]
    return p * into + m, a * into + b


@triton.jit
def _through(a, b, REVERSE: tl.constexpr):
    """Return the map of the state through a tile, in either direction; both (C,)."""
    Q: tl.constexpr = a.shape[0]
    S: tl.constexpr = a.shape[1]
    a, b = tl.associative_scan((a, b), 0, _compose, reverse=REVERSE)
    a, b = _edge(a, 0 if REVERSE else Q - 1), _edge(b, 0 if REVERSE else Q - 1)
    a, b = tl.associative_scan((a, b), 0, _compose, reverse=REVERSE)
    return _edge(a, 0 if REVERSE else S - 1), _edge(b, 0 if REVERSE else S - 1)


@triton.jit
def _program(width, chunks, parts, C: tl.constexpr):
    """Return a program's group of images, part of their routes, chunk of the sequence and block of channels."""
    blocks = tl.cdiv(width, C)
    rest = tl.program_id(0)
    block, rest = rest % blocks, rest // blocks
    chunk, rest = rest % chunks, rest // chunks
    return rest // parts, rest % parts, chunk, block


@triton.jit
def _channels(block, C: tl.constexpr):
    """Return the channels of a block, (C,)."""
    return tl.max_contiguous(block * C + tl.arange(0, C), NEIGHBORS)


@triton.jit
def _at(first, c):
    """Return where a block's channels lie, from the first number of each step's row on, (Q, S, C).

    The hint's 2 is not true: it makes the compiler spread segments over threads rather than the steps of a segment.
    The width of loads and stores follows from the last axis, whose hint is true.
    """
    return tl.max_contiguous(first[:, :, None] + c[None, None, :], [1, 2, NEIGHBORS])


@triton.jit
def _mask(valid, inside, WHOLE: tl.constexpr):
    """Return which entries of a tile exist, (Q, S, C), from its steps and channels; WHOLE if all channels do."""
    mask = tl.broadcast_to(valid[:, :, None], (valid.shape[0], valid.shape[1], inside.shape[0]))
    if not WHOLE:
        mask &= inside[None, None, :]
    return mask


@triton.jit
def _route(route_index, group, j, taken, routes, tokens, steps):
    """Return an image's j-th route, how many tokens it writes to and its last step: 0 and -1 if out of range."""
    route, limit, final_step = j, tokens, steps - 1
    if route_index is not None:
        route = tl.load(route_index + group.to(tl.int64) * taken + j).to(tl.int32)
        there = (route >= 0) & (route < routes)
        route, limit, final_step = tl.where(there, route, 0), tl.where(there, tokens, 0), tl.where(there, steps - 1, -1)
    return route, limit, final_step


@triton.jit
def _places(v, index, end, route, steps, tokens, limit, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """Return of steps v: is there one, its number, its image in the group, its token's row, is that below ``limit``."""
    live = v < end
    image, step = tl.zeros_like(v), v
    if PACKED:
        image, step = v // steps, v % steps
    token = tl.load(index + route.to(tl.int64) * steps + step, mask=live, other=-1)
    row = image * tokens + token
    if WIDE:
        row = row.to(tl.int64)
    return live, step, image, row, live & (token >= 0) & (token < limit)


@triton.jit
def _softplus(raw):
    e = tl.exp2(-tl.abs(raw) * LOG2_E)
    # log(1 + e) / e on 0..1, within 2e-7. The sum 1 + e would lose the digits of a small e, and log takes longer.
    ratio = 0.00525345793
    ratio = ratio * e - 0.0295885075
    ratio = ratio * e + 0.0783616677
    ratio = ratio * e - 0.136747703
    ratio = ratio * e + 0.191114306
    ratio = ratio * e - 0.248443693
    ratio = ratio * e + 0.333192706
    ratio = ratio * e - 0.499995023
    ratio = ratio * e + 1.0
    return ratio * e + tl.maximum(raw, 0.0)


@triton.jit
def _softplus_slope(y):
    """Return the derivative of the softplus where its value is y: 1 - exp(-y)."""
    series = y * (1.0 + y * (-0.5 + y * (0.16666667 + y * (-0.041666667 + y * 0.0083333333))))
    return tl.where(y < 0.0625, series, 1.0 - tl.exp2(-y * LOG2_E))


@triton.jit
def _load_row(parameter, route, c, inside, stride):
    """Return a route's numbers of a parameter with one per channel, (C,): 0 where there is none."""
    row = tl.zeros(c.shape, tl.float32)
    if parameter is not None:
        row = tl.load(parameter + route.to(tl.int64) * stride + c, mask=inside, other=0.0)
    return row


@triton.jit
def _load_scale(route_weight, at):
    """Return by how much a route's outputs are multiplied."""
    scale = 1.0
    if route_weight is not None:
        scale = tl.load(route_weight + at).to(tl.float32)
    return scale


@triton.jit
def _load_weight(weight, r, c, inside, width, R: tl.constexpr):
    """Return rows r of a route's projection of the step sizes, (r, C)."""
    at = weight + r[:, None] * width + c[None, :]
    return tl.load(at, mask=(r < R)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _load_low_rank(
    first, r, dbc, read, end, route, limit, dbc_group, dbc_groups, steps, tokens,
    N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return columns r of the step sizes in low rank, (Q * S, r), where they lie in dbc, and which exist."""
    i = tl.arange(0, Q * S)
    v = first + (i % S) * Q + i // S
    _, _, _, row, valid = _places(v, read, end, route, steps, tokens, limit, PACKED, WIDE)
    at = ((row * dbc_groups + dbc_group) * (R + 2 * N))[:, None] + r[None, :]
    mask = valid[:, None] & (r < R)[None, :]
    return tl.load(dbc + at, mask=mask, other=0.0).to(tl.float32), at, mask


@triton.jit
def _load_tile(
    first, x, dbc, delta, read, dt_weight, weight_stride, bias, end, route, limit, c, inside, channels, offset, width,
    dbc_groups, delta_groups, steps, tokens,
    N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Return a tile's steps (live, step, row of the token, valid), its x and step sizes, (Q, S, C)."""
    v = first + tl.arange(0, S)[None, :] * Q + tl.arange(0, Q)[:, None]  # (Q, S)
    live, step, _, row, valid = _places(v, read, end, route, steps, tokens, limit, PACKED, WIDE)
    here = _mask(valid, inside, WHOLE)
    x_t = tl.load(x + _at(row * channels, offset + c), mask=here, other=0.0).to(tl.float32)
    if delta is None:
        dbc_group = tl.where(dbc_groups > 1, route, 0)
        weight = dt_weight + route.to(tl.int64) * weight_stride
        if R <= FEW:
            raw = tl.zeros(x_t.shape, tl.float32)
            for r in tl.static_range(R):
                low = _load_column(dbc, row, valid, dbc_group, dbc_groups, r, R + 2 * N)
                raw += low * tl.load(weight + r * width + c, mask=inside, other=0.0)[None, None, :]
        else:
            flat = tl.zeros((Q * S, c.shape[0]), tl.float32)
            for first_r in range(0, R, 16):  # in portions: whole, the factors would take too many registers
                r = first_r + tl.arange(0, 16)
                low, low_at, there = _load_low_rank(
                    first, r, dbc, read, end, route, limit, dbc_group, dbc_groups, steps, tokens, N, R, Q, S,
                    PACKED, WIDE,
                )  # fmt: skip
                flat = tl.dot(low, _load_weight(weight, r, c, inside, width, R), flat, input_precision=PRECISION)
            raw = flat.reshape(Q, S, c.shape[0])
    else:
        at = (row * delta_groups + tl.where(delta_groups > 1, route, 0)) * width
        raw = tl.load(delta + at[:, :, None] + c[None, None, :], mask=here, other=0.0).to(tl.float32)
    step_size = raw + bias[None, None, :]
    if SOFTPLUS:
        step_size = _softplus(step_size)
    # Steps that do not exist are of size 0: they keep the state.
    return live, step, row, valid, x_t, tl.where(live[:, :, None], step_size, 0.0)


@triton.jit
def _load_rate(A, route, A_stride, n, c, inside, N: tl.constexpr):
    """Return the rate of state n, (C,); finite, so that steps of size 0 keep the state even of a rate of -inf."""
    rate = tl.load(A + route.to(tl.int64) * A_stride + c * N + n, mask=inside, other=0.0)
    return tl.maximum(rate, -1e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _decay(step_size, rate, step):
    """Return the decay of a state at each step, (Q, S, C); 0 where an image begins."""
    decay = tl.exp2(step_size * (rate * LOG2_E)[None, None, :])
    return tl.where((step == 0)[:, :, None], 0.0, decay)


@triton.jit
def _load_column(dbc, row, valid, dbc_group, dbc_groups, column, F: tl.constexpr):
    """Return one column of dbc for each step, (Q, S, 1)."""
    at = (row * dbc_groups + dbc_group) * F + column
    return tl.load(dbc + at, mask=valid, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def _load_gradient(
    first, grad_y, write, row, valid, end, route, limit, c, inside, channels, offset, steps, tokens,
    Q: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of each step's output, (Q, S, C)."""
    if write is not None:
        v = first + tl.arange(0, S)[None, :] * Q + tl.arange(0, Q)[:, None]  # (Q, S)
        _, _, _, row, valid = _places(v, write, end, route, steps, tokens, limit, PACKED, WIDE)
    mask = _mask(valid, inside, WHOLE)
    at = _at(row * channels, offset + c)
    return tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_state_gradient(
    first, grad_state, end, j, taken, final_step, c, inside, width, steps, n,
    N: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the last state at the last step of each image, 0 elsewhere, (Q, S, C)."""
    v = first + tl.arange(0, S)[None, :] * Q + tl.arange(0, Q)[:, None]  # (Q, S)
    image, step = tl.zeros_like(v), v
    if PACKED:
        image, step = v // steps, v % steps
    at = (image * taken + j) * width * N
    is_last = (step == final_step) & (v < end)
    mask = _mask(is_last, inside, WHOLE)
    return tl.load(grad_state + at[:, :, None] + (c * N + n)[None, None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_ANY)
def summary_kernel(
    x, dbc, delta, A, dt_weight, dt_bias, route_weight, route_index, read, write, grad_y, grad_state,
    through, ends, reverse_ends,
    batch, tokens, channels, steps, width, routes, taken, images, tiles, chunks,
    dbc_groups, delta_groups, A_stride, weight_stride, bias_stride,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    SOFTPLUS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the maps of all states through each chunk, (rows, chunks, N, width); a row is a group's route.

    Decays and ends of the recurrence; given ``grad_y``, also the ends of its gradient's.
    """
    group, j, chunk, block = _program(width, chunks, taken, C)
    c, n_all = _channels(block, C), tl.arange(0, NP)
    inside = c < width
    image = group.to(tl.int64) * images  # the first of the group; all rows are counted from it
    end = tl.minimum(images, batch - group * images) * steps
    x += image * tokens * channels
    dbc += image * tokens * dbc_groups * (R + 2 * N)
    if delta is not None:
        delta += image * tokens * delta_groups * width
    if grad_y is not None:
        grad_y += image * tokens * channels
    if grad_state is not None:
        grad_state += image * taken * width * N
    route, limit, final_step = _route(route_index, group, j, taken, routes, tokens, steps)
    offset = route * width if SIDE_BY_SIDE else 0
    dbc_group = tl.where(dbc_groups > 1, route, 0)
    bias = _load_row(dt_bias, route, c, inside, bias_stride)
    scale = _load_scale(route_weight, group * taken + j)
    all_a = tl.full((NP, C), 1.0, tl.float32)
    all_end, all_reverse = tl.zeros((NP, C), tl.float32), tl.zeros((NP, C), tl.float32)
    for tile in range(tiles):
        first = (chunk * tiles + tile) * Q * S
        live, step, row, valid, x_t, step_size = _load_tile(
            first, x, dbc, delta, read, dt_weight, weight_stride, bias, end, route, limit, c, inside, channels,
            offset, width, dbc_groups, delta_groups, steps, tokens, N, R, Q, S, SOFTPLUS, PACKED, WIDE, WHOLE,
            FEW_FORWARD,
        )  # fmt: skip
        if grad_y is not None:
            g = scale * _load_gradient(
                first, grad_y, write, row, valid, end, route, limit, c, inside, channels, offset, steps, tokens,
                Q, S, PACKED, WIDE, WHOLE,
            )  # fmt: skip
        for n in range(N):
            chosen = (n_all == n)[:, None]
            a = _decay(step_size, _load_rate(A, route, A_stride, n, c, inside, N), step)
            B_t = _load_column(dbc, row, valid, dbc_group, dbc_groups, R + n, R + 2 * N)
            tile_a, tile_b = _through(a, step_size * x_t * B_t, False)
            all_end = tl.where(chosen, tile_a[None, :] * all_end + tile_b[None, :], all_end)
            if grad_y is not None:
                into = g * _load_column(dbc, row, valid, dbc_group, dbc_groups, R + N + n, R + 2 * N)
                if grad_state is not None:
                    into += _load_state_gradient(
                        first, grad_state, end, j, taken, final_step, c, inside, width, steps, n, N, Q, S,
                        PACKED, WHOLE,
                    )  # fmt: skip
                tile_a, reverse = _through(a, a * into, True)
                all_reverse += tl.where(chosen, all_a * reverse[None, :], 0.0)
            all_a = tl.where(chosen, all_a * tile_a[None, :], all_a)
    at = ((group * taken + j).to(tl.int64) * chunks + chunk) * N * width + n_all[:, None] * width + c[None, :]
    mask = (n_all < N)[:, None] & inside[None, :]
    tl.store(through + at, all_a, mask=mask)
    tl.store(ends + at, all_end, mask=mask)
    if grad_y is not None:
        tl.store(reverse_ends + at, all_reverse, mask=mask)


@triton.jit(do_not_specialize=("chunks",))
def chain_kernel(through, ends, elements, chunks, REVERSE: tl.constexpr, CHUNKS: tl.constexpr, E: tl.constexpr):
    """Replace the ends of chunks by the states in front of (in reverse: behind) them; (rows, chunks, elements)."""
    blocks = tl.cdiv(elements, E)
    e = tl.program_id(0) % blocks * E + tl.arange(0, E)
    base = (tl.program_id(0) // blocks).to(tl.int64) * chunks * elements
    carry = tl.zeros((E,), tl.float32)
    one, zero = tl.full((CHUNKS, E), 1.0, tl.float32), tl.zeros((CHUNKS, E), tl.float32)
    for first in range(0, chunks, CHUNKS):
        i = first + tl.arange(0, CHUNKS)
        mask = (i < chunks)[:, None] & (e < elements)[None, :]
        if REVERSE:
            i = chunks - 1 - i
        at = base + (i.to(tl.int64) * elements)[:, None] + e[None, :]
        a, b = tl.load(through + at, mask=mask, other=1.0), tl.load(ends + at, mask=mask, other=0.0)
        a_all, a_in, b_all, b_in = tl.associative_scan((a, one, b, zero), 0, _compose_both)
        tl.store(ends + at, a_in * carry[None, :] + b_in, mask=mask)
        carry = _edge(a_all * carry[None, :] + b_all, CHUNKS - 1)


@triton.jit
def _add(out, values, mask, ADD: tl.constexpr):
    """Store values, or add them to what is there."""
    if ADD:
        values += tl.load(out, mask=mask, other=0.0)
    tl.store(out, values, mask=mask)


@triton.jit
def _add_route(out, sums, at, values, mask, i, last, ADD: tl.constexpr, COMPLETE: tl.constexpr):
    """Store what the i-th route of a program yields, with ADD added to the sums of those before.

    COMPLETE: all routes write the same entries. So the first finds nothing to add to, and the last finishes ``out``.
    """
    if not ADD:
        tl.store(out + at, values, mask=mask)
    elif COMPLETE:
        turn = tl.zeros(mask.shape, tl.int32) + i
        values += tl.load(sums + at, mask=mask & (turn > 0), other=0.0)
        tl.store(sums + at, values, mask=mask & (turn < last))
        tl.store(out + at, values, mask=mask & (turn == last))
    else:
        tl.store(sums + at, values + tl.load(sums + at, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=_ANY)
def forward_kernel(
    x, dbc, delta, A, dt_weight, dt_bias, D, route_weight, route_index, read, write, starts, y, y_sums, last_state,
    batch, tokens, channels, steps, width, routes, taken, images, tiles, chunks, parts, part_stride,
    dbc_groups, delta_groups, A_stride, weight_stride, bias_stride, D_stride,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    SOFTPLUS: tl.constexpr, INCLUSIVE: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    ADD: tl.constexpr, COMPLETE: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a part of the routes, one after the other, each added to those before."""
    group, part, chunk, block = _program(width, chunks, parts, C)
    c, n_all = _channels(block, C), tl.arange(0, NP)
    inside = c < width
    image = group.to(tl.int64) * images  # the first of the group; all rows are counted from it
    end = tl.minimum(images, batch - group * images) * steps
    x += image * tokens * channels
    dbc += image * tokens * dbc_groups * (R + 2 * N)
    if delta is not None:
        delta += image * tokens * delta_groups * width
    y += part.to(tl.int64) * part_stride + image * tokens * channels
    y_sums += part.to(tl.int64) * part_stride + image * tokens * channels
    last_state += image * taken * width * N
    per_part = taken // parts
    for i in range(per_part):
        j = part * per_part + i
        route, limit, final_step = _route(route_index, group, j, taken, routes, tokens, steps)
        offset = route * width if SIDE_BY_SIDE else 0
        dbc_group = tl.where(dbc_groups > 1, route, 0)
        bias = _load_row(dt_bias, route, c, inside, bias_stride)
        skip = _load_row(D, route, c, inside, D_stride)
        scale = _load_scale(route_weight, group * taken + j)
        state = tl.zeros((NP, C), tl.float32)
        if starts is not None:
            at = ((group * taken + j).to(tl.int64) * chunks + chunk) * N + n_all
            mask = (n_all < N)[:, None] & inside[None, :]
            state = tl.load(starts + (at * width)[:, None] + c[None, :], mask=mask, other=0.0)
        for tile in range(tiles):
            first = (chunk * tiles + tile) * Q * S
            live, step, row, valid, x_t, step_size = _load_tile(
                first, x, dbc, delta, read, dt_weight, weight_stride, bias, end, route, limit, c, inside, channels,
                offset, width, dbc_groups, delta_groups, steps, tokens, N, R, Q, S, SOFTPLUS, PACKED, WIDE, WHOLE,
                FEW_FORWARD,
            )  # fmt: skip
            v = first + tl.arange(0, S)[None, :] * Q + tl.arange(0, Q)[:, None]  # (Q, S)
            target, written = row, valid
            if write is not None:
                _, _, place, target, written = _places(v, write, end, route, steps, tokens, limit, PACKED, WIDE)
            y_t = skip[None, None, :] * x_t
            for n in range(N):
                a = _decay(step_size, _load_rate(A, route, A_stride, n, c, inside, N), step)
                drive = step_size * x_t * _load_column(dbc, row, valid, dbc_group, dbc_groups, R + n, R + 2 * N)
                C_t = _load_column(dbc, row, valid, dbc_group, dbc_groups, R + N + n, R + 2 * N)
                carry = tl.sum(state if N == 1 else tl.where((n_all == n)[:, None], state, 0.0), 0)
                if INCLUSIVE:
                    h, carry = _scan(a, drive, carry)
                    y_t += C_t * h
                else:
                    before, h = _scan_both(a, drive, tl.zeros_like(a), carry, False)
                    carry = _edge(_edge(h, Q - 1), S - 1)
                    y_t += C_t * a * before
                state = carry[None, :] if N == 1 else tl.where((n_all == n)[:, None], carry[None, :], state)
                if PACKED:
                    ends = ((v // steps) * taken + j) * width * N + n
                    into = _at(ends, c) if N == 1 else ends[:, :, None] + (c * N)[None, None, :]
                    tl.store(last_state + into, h, mask=_mask(live & (step == steps - 1), inside, WHOLE))
            out = _at(target * channels, offset + c)
            there = _mask(written, inside, WHOLE)
            _add_route(y, y_sums, out, y_t * scale, there, i, per_part - 1, ADD, COMPLETE)
        if not PACKED and chunk == chunks - 1:
            final = (j * width + c)[None, :] * N + n_all[:, None]
            tl.store(last_state + final, state, mask=(n_all < N)[:, None] & inside[None, :])
        tl.debug_barrier()  # the next route adds to what other threads have written


@triton.jit(do_not_specialize=_ANY)
def backward_kernel(
    x, dbc, delta, A, dt_weight, dt_bias, D, route_weight, route_index, read, write, starts, reverse_starts,
    grad_y, grad_state, grad_x, grad_x_sums, grad_dbc, grad_delta, grad_parameters, grad_route_weight,
    batch, tokens, channels, steps, width, routes, taken, images, tiles, chunks, parts, x_part, dbc_block, dbc_part,
    delta_part, dbc_groups, delta_groups, A_stride, weight_stride, bias_stride, D_stride,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Q: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    SOFTPLUS: tl.constexpr, INCLUSIVE: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    ADD: tl.constexpr, COMPLETE: tl.constexpr, ADD_DBC: tl.constexpr, ADD_DELTA: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a part of the routes, tile by tile, from the states in front of and behind each tile.

    Gradients of parameters are sums over a chunk: (rows, chunks, R + N + 2, width), of the projection, A, bias and D.
    """
    group, part, chunk, block = _program(width, chunks, parts, C)
    c, n_all = _channels(block, C), tl.arange(0, NP)
    inside = c < width
    image = group.to(tl.int64) * images  # the first of the group; all rows are counted from it
    end = tl.minimum(images, batch - group * images) * steps
    x += image * tokens * channels
    dbc += image * tokens * dbc_groups * (R + 2 * N)
    if delta is not None:
        delta += image * tokens * delta_groups * width
    grad_y += image * tokens * channels
    if grad_state is not None:
        grad_state += image * taken * width * N
    grad_x += part.to(tl.int64) * x_part + image * tokens * channels
    grad_x_sums += part.to(tl.int64) * x_part + image * tokens * channels
    grad_dbc += block.to(tl.int64) * dbc_block + part.to(tl.int64) * dbc_part
    grad_dbc += image * tokens * dbc_groups * (R + 2 * N)
    if delta is not None:
        grad_delta += part.to(tl.int64) * delta_part + image * tokens * delta_groups * width
    per_part = taken // parts
    all_tiles = tiles * chunks
    for i in range(per_part):
        j = part * per_part + i
        route, limit, final_step = _route(route_index, group, j, taken, routes, tokens, steps)
        offset = route * width if SIDE_BY_SIDE else 0
        dbc_group = tl.where(dbc_groups > 1, route, 0)
        bias = _load_row(dt_bias, route, c, inside, bias_stride)
        skip = _load_row(D, route, c, inside, D_stride)
        scale = _load_scale(route_weight, group * taken + j)
        of_weight = tl.zeros((RP, C), tl.float32)
        of_A = tl.zeros((NP, C), tl.float32)
        of_bias = tl.zeros((C,), tl.float32)
        of_D = tl.zeros((C,), tl.float32)
        for tile in range(tiles):
            number = chunk * tiles + tile
            first = number * Q * S
            live, step, row, valid, x_t, step_size = _load_tile(
                first, x, dbc, delta, read, dt_weight, weight_stride, bias, end, route, limit, c, inside, channels,
                offset, width, dbc_groups, delta_groups, steps, tokens, N, R, Q, S, SOFTPLUS, PACKED, WIDE, WHOLE,
                FEW_BACKWARD,
            )  # fmt: skip
            of_y = _load_gradient(
                first, grad_y, write, row, valid, end, route, limit, c, inside, channels, offset, steps, tokens,
                Q, S, PACKED, WIDE, WHOLE,
            )  # fmt: skip
            g = of_y * scale
            of_x = skip[None, None, :] * g
            of_D += tl.sum(tl.sum(g * x_t, 0), 0)
            of_step = tl.zeros_like(x_t)
            y_t = skip[None, None, :] * x_t
            dbc_at = grad_dbc + (row * dbc_groups + dbc_group) * (R + 2 * N)
            state_at = (((group * taken + j).to(tl.int64) * all_tiles + number) * N) * width + c
            for n in range(N):
                rate = _load_rate(A, route, A_stride, n, c, inside, N)
                a = _decay(step_size, rate, step)
                B_t = _load_column(dbc, row, valid, dbc_group, dbc_groups, R + n, R + 2 * N)
                C_t = _load_column(dbc, row, valid, dbc_group, dbc_groups, R + N + n, R + 2 * N)
                in_front = tl.load(starts + state_at + n * width, mask=inside, other=0.0)
                behind = tl.load(reverse_starts + state_at + n * width, mask=inside, other=0.0)
                drive = step_size * x_t * B_t
                h, _ = _scan(a, drive, in_front)
                kept = h - drive  # what the decay leaves of the state before
                seen = h if INCLUSIVE else kept
                local = C_t * g
                into = local
                if grad_state is not None:
                    into += _load_state_gradient(
                        first, grad_state, end, j, taken, final_step, c, inside, width, steps, n, N, Q, S,
                        PACKED, WHOLE,
                    )  # fmt: skip
                tl.debug_barrier()  # or the assembler mixes both scans, and spills
                mu, nu = _scan_both(a, a * into, into, behind, True)
                of_drive = mu if INCLUSIVE else mu - local
                exponent = mu * kept
                of_input = of_drive * B_t
                of_x += of_input * step_size
                of_step += of_input * x_t + exponent * rate[None, None, :]
                of_rate = tl.sum(tl.sum(exponent * step_size, 0), 0)
                of_A = tl.where((n_all == n)[:, None], of_A + of_rate[None, :], of_A)
                _add(dbc_at + R + n, tl.sum(of_drive * step_size * x_t, 2), valid, ADD_DBC)
                _add(dbc_at + R + N + n, tl.sum(g * seen, 2), valid, ADD_DBC)
                y_t += C_t * seen
            if route_weight is not None:
                v = first + tl.arange(0, S)[None, :] * Q + tl.arange(0, Q)[:, None]
                at = ((block * batch + group) * taken + j).to(tl.int64) * steps + v
                tl.store(grad_route_weight + at, tl.sum(of_y * y_t, 2), mask=live)
            if SOFTPLUS:
                of_step *= _softplus_slope(step_size)
            of_step = tl.where(live[:, :, None], of_step, 0.0)
            of_bias += tl.sum(tl.sum(of_step, 0), 0)
            here = _mask(valid, inside, WHOLE)
            at = _at(row * channels, offset + c)
            _add_route(grad_x, grad_x_sums, at, of_x, here, i, per_part - 1, ADD, COMPLETE)
            if delta is None:
                flat = of_step.reshape(Q * S, C)
                weight = dt_weight + route.to(tl.int64) * weight_stride
                for first_r in range(0, R, 16):
                    r = first_r + tl.arange(0, 16)
                    part_low, part_at, part_there = _load_low_rank(
                        first, r, dbc, read, end, route, limit, dbc_group, dbc_groups, steps, tokens, N, R, Q, S,
                        PACKED, WIDE,
                    )  # fmt: skip
                    across = tl.trans(_load_weight(weight, r, c, inside, width, R))
                    of_low = tl.dot(flat, across, input_precision=PRECISION)
                    _add(grad_dbc + part_at, of_low, part_there, ADD_DBC)
                low, low_at, there = _load_low_rank(
                    first, tl.arange(0, RP), dbc, read, end, route, limit, dbc_group, dbc_groups, steps, tokens, N, R,
                    Q, S, PACKED, WIDE,
                )  # fmt: skip
                of_weight += tl.dot(tl.trans(low), flat, input_precision=PRECISION)
            else:
                at = (row * delta_groups + tl.where(delta_groups > 1, route, 0)) * width
                _add(grad_delta + at[:, :, None] + c[None, None, :], of_step, here, ADD_DELTA)
        at = grad_parameters + ((group * taken + j).to(tl.int64) * chunks + chunk) * (R + N + 2) * width + c
        if delta is None:
            r = tl.arange(0, RP)
            tl.store(at[None, :] + r[:, None] * width, of_weight, mask=(r < R)[:, None] & inside[None, :])
        tl.store(at[None, :] + (R + n_all)[:, None] * width, of_A, mask=(n_all < N)[:, None] & inside[None, :])
        tl.store(at + (R + N) * width, of_bias, mask=inside)
        tl.store(at + (R + N + 1) * width, of_D, mask=inside)
        tl.debug_barrier()
