"""The MLP's step in a few Triton kernels, for CUDA devices.

Layers this small take a device less time than it takes from one kernel to the next, so what counts
is how many there are: one for each layer's outputs, one for the error in them, and one for its
gradient with the update. The batch is gathered where it is read. In stacks, which are bound by
memory, parameters and velocities are read and written once a step.

Shapes: K models, B batch, D inputs and H outputs of a layer, C = 10 classes. `stride` is the
distance from one model's parameters to the next's; all other tensors are contiguous. Sides of tiles
are powers of two, 16 at least.
"""

import triton
import triton.language as tl

CLASSES = tl.constexpr(10)
CLASS_TILE = tl.constexpr(16)


@triton.jit
def activate(x, activation: tl.constexpr):
    if activation == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN
    if activation == "tanh":
        return 2 * tl.sigmoid(2 * x) - 1
    return tl.sigmoid(x)


@triton.jit
def slope(y, activation: tl.constexpr):
    """The activation's derivative as a function of its output."""
    if activation == "relu":
        return tl.where(y > 0, 1.0, 0.0)
    if activation == "tanh":
        return 1 - y * y
    return y * (1 - y)


@triton.jit
def places(rows, rows_stride, k, b, batch, gathered: tl.constexpr):
    """Where a batch's inputs lie: as `rows` has it, or one after the other."""
    if gathered:
        return tl.load(rows + k * rows_stride + b, mask=b < batch, other=0)
    return k * batch + b


@triton.jit
def forward(
    x, rows, rows_stride, weight, bias, y, batch, stride,
    inputs: tl.constexpr, outputs: tl.constexpr, gathered: tl.constexpr,
    activation: tl.constexpr, precision: tl.constexpr,
    TILE_B: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """y [K, B, H] = activation(x [K, B, D] weight [K, H, D]' + bias [K, H])."""
    k = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    h = tl.program_id(0) * TILE_H + tl.arange(0, TILE_H)
    place = places(rows, rows_stride, k, b, batch, gathered)
    weight += k * stride
    total = tl.zeros((TILE_B, TILE_H), tl.float32)
    for start in range(0, inputs, TILE_D):
        d = start + tl.arange(0, TILE_D)
        left = tl.load(
            x + place[:, None] * inputs + d[None, :],
            mask=(b[:, None] < batch) & (d[None, :] < inputs),
            other=0.0,
        )
        right = tl.load(
            weight + h[:, None] * inputs + d[None, :],
            mask=(h[:, None] < outputs) & (d[None, :] < inputs),
            other=0.0,
        )
        total = tl.dot(left, tl.trans(right), total, input_precision=precision)
    total += tl.load(bias + k * stride + h, mask=h < outputs, other=0.0)[None, :]
    tl.store(
        y + (k * batch + b[:, None]) * outputs + h[None, :],
        activate(total, activation),
        mask=(b[:, None] < batch) & (h[None, :] < outputs),
    )


@triton.jit
def forward_sum(
    x, rows, rows_stride, weight, bias, y, batch, stride,
    inputs: tl.constexpr, outputs: tl.constexpr, gathered: tl.constexpr,
    activation: tl.constexpr,
    TILE_B: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """As `forward`, for few models: small tiles, summed at the end, occupy more of the device."""
    k = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    h = tl.program_id(0) * TILE_H + tl.arange(0, TILE_H)
    place = places(rows, rows_stride, k, b, batch, gathered)
    weight += k * stride
    total = tl.zeros((TILE_B, TILE_H, TILE_D), tl.float32)
    for start in range(0, inputs, TILE_D):
        d = start + tl.arange(0, TILE_D)
        left = tl.load(
            x + place[:, None] * inputs + d[None, :],
            mask=(b[:, None] < batch) & (d[None, :] < inputs),
            other=0.0,
        )
        right = tl.load(
            weight + h[:, None] * inputs + d[None, :],
            mask=(h[:, None] < outputs) & (d[None, :] < inputs),
            other=0.0,
        )
        total += left[:, None, :] * right[None, :, :]
    found = tl.sum(total, 2)
    found += tl.load(bias + k * stride + h, mask=h < outputs, other=0.0)[None, :]
    tl.store(
        y + (k * batch + b[:, None]) * outputs + h[None, :],
        activate(found, activation),
        mask=(b[:, None] < batch) & (h[None, :] < outputs),
    )


@triton.jit
def output(
    x, rows, rows_stride, weight, bias,
    targets, targets_stride, logits, logits_stride, error, below,
    batch, stride,
    inputs: tl.constexpr, gathered: tl.constexpr,
    activation: tl.constexpr, precision: tl.constexpr,
    TILE_B: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The last layer: logits [K, B, C], error = softmax(logits) - targets, and the error below."""
    k = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    c = tl.arange(0, CLASS_TILE)
    place = places(rows, rows_stride, k, b, batch, gathered)
    weight += k * stride
    total = tl.zeros((TILE_B, CLASS_TILE), tl.float32)
    for start in range(0, inputs, TILE_D):
        d = start + tl.arange(0, TILE_D)
        left = tl.load(
            x + place[:, None] * inputs + d[None, :],
            mask=(b[:, None] < batch) & (d[None, :] < inputs),
            other=0.0,
        )
        right = tl.load(
            weight + c[:, None] * inputs + d[None, :],
            mask=(c[:, None] < CLASSES) & (d[None, :] < inputs),
            other=0.0,
        )
        total = tl.dot(left, tl.trans(right), total, input_precision=precision)
    total += tl.load(bias + k * stride + c, mask=c < CLASSES, other=0.0)[None, :]
    inside = (b[:, None] < batch) & (c[None, :] < CLASSES)
    at = b[:, None] * CLASSES + c[None, :]
    tl.store(logits + k * logits_stride + at, total, mask=inside)
    scores = tl.where(c[None, :] < CLASSES, total, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    wrong = powers / tl.sum(powers, 1)[:, None]
    wrong -= tl.load(targets + k * targets_stride + at, mask=inside, other=0.0)
    wrong = tl.where(b[:, None] < batch, wrong, 0.0)
    tl.store(error + k * batch * CLASSES + at, wrong, mask=inside)
    if not gathered:
        for start in range(0, inputs, TILE_D):
            d = start + tl.arange(0, TILE_D)
            here = (b[:, None] < batch) & (d[None, :] < inputs)
            right = tl.load(
                weight + c[:, None] * inputs + d[None, :],
                mask=(c[:, None] < CLASSES) & (d[None, :] < inputs),
                other=0.0,
            )
            back = tl.dot(wrong, right, input_precision=precision)
            there = place[:, None] * inputs + d[None, :]
            back *= slope(tl.load(x + there, mask=here, other=0.0), activation)
            tl.store(below + there, back, mask=here)


@triton.jit
def backward(
    error, weight, y, below, batch, stride,
    inputs: tl.constexpr, outputs: tl.constexpr,
    activation: tl.constexpr, precision: tl.constexpr,
    TILE_B: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """below [K, B, D] = (error [K, B, H] weight [K, H, D]) * slope(y [K, B, D])."""
    k = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    d = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    weight += k * stride
    total = tl.zeros((TILE_B, TILE_D), tl.float32)
    for start in range(0, outputs, TILE_H):
        h = start + tl.arange(0, TILE_H)
        left = tl.load(
            error + (k * batch + b[:, None]) * outputs + h[None, :],
            mask=(b[:, None] < batch) & (h[None, :] < outputs),
            other=0.0,
        )
        right = tl.load(
            weight + h[:, None] * inputs + d[None, :],
            mask=(h[:, None] < outputs) & (d[None, :] < inputs),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=precision)
    inside = (b[:, None] < batch) & (d[None, :] < inputs)
    at = (k * batch + b[:, None]) * inputs + d[None, :]
    total *= slope(tl.load(y + at, mask=inside, other=0.0), activation)
    tl.store(below + at, total, mask=inside)


@triton.jit
def finish(
    parameters, gradients, at, inside, total, carry, alpha, rate,
    carries: tl.constexpr, keeps: tl.constexpr, updates: tl.constexpr,
):  # fmt: skip
    """gradients = carry * gradients + alpha * total; parameters -= rate * gradients."""
    total *= alpha
    if carries:
        total += carry * tl.load(gradients + at, mask=inside, other=0.0)
    if keeps:
        tl.store(gradients + at, total, mask=inside)
    if updates:
        before = tl.load(parameters + at, mask=inside, other=0.0)
        tl.store(parameters + at, before - rate * total, mask=inside)


@triton.jit
def gradient(
    error, x, rows, rows_stride, weight, bias, weight_gradient, bias_gradient, rates,
    batch, stride, carry, alpha,
    inputs: tl.constexpr, outputs: tl.constexpr, gathered: tl.constexpr,
    carries: tl.constexpr, keeps: tl.constexpr, updates: tl.constexpr, precision: tl.constexpr,
    TILE_B: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """A layer's gradient, error [K, B, H]' x [K, B, D] and the error's sum; and its update."""
    k = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    h = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    total = tl.zeros((TILE_H, TILE_D), tl.float32)
    sums = tl.zeros((TILE_H,), tl.float32)
    for start in range(0, batch, TILE_B):
        b = start + tl.arange(0, TILE_B)
        place = places(rows, rows_stride, k, b, batch, gathered)
        left = tl.load(
            error + (k * batch + b[:, None]) * outputs + h[None, :],
            mask=(b[:, None] < batch) & (h[None, :] < outputs),
            other=0.0,
        )
        right = tl.load(
            x + place[:, None] * inputs + d[None, :],
            mask=(b[:, None] < batch) & (d[None, :] < inputs),
            other=0.0,
        )
        total = tl.dot(tl.trans(left), right, total, input_precision=precision)
        sums += tl.sum(left, 0)
    rate = tl.load(rates + k) if updates else 0.0
    at = k * stride + h[:, None] * inputs + d[None, :]
    inside = (h[:, None] < outputs) & (d[None, :] < inputs)
    finish(weight, weight_gradient, at, inside, total, carry, alpha, rate, carries, keeps, updates)
    if tl.program_id(0) == 0:
        finish(
            bias, bias_gradient, k * stride + h, h < outputs, sums, carry, alpha, rate,
            carries, keeps, updates,
        )  # fmt: skip
