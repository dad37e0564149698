"""max_pool, avg_pool, global_max_pool, global_avg_pool, adaptive_avg_pool: public functions and XLA rules.

Only max_pool has a rule of its own: what JAX makes of the gradients of averages is as good. Windows that do not overlap
are an axis of their own after a reshape; others are, on a TPU, reads that are shifted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation, only_xla
from jaxops.ops import checks
from jaxops.reference import pooling as plain

Padding = str | Sequence[tuple[int, int]]
_READS = 16  # elements of a window along an axis that are read one by one: more make a long program


def _forward(inputs, *, window, strides, padding):
    if window != strides:
        return (_reduced(inputs, -jnp.inf, lax.max, window, strides, padding),), ()
    return (jnp.max(_cut(inputs, window, padding, -jnp.inf), _inner(inputs, window)),), ()


def _backward(inputs, *, outputs, residuals, cotangents, window, strides, padding):
    """Of windows that do not overlap: dx = dy at the first place where x = y. XLA selects and scatters for others."""
    del residuals
    if window != strides:
        plain_pool = lambda x: plain.max_pool(x, window=window, strides=strides, padding=padding)[0]
        return {"inputs": jax.vjp(plain_pool, inputs)[1](cotangents[0])[0]}
    axes = _inner(inputs, window)
    cut = _cut(inputs, window, padding, -jnp.inf)
    y, dy = (jnp.expand_dims(a, axes) for a in (outputs[0], cotangents[0]))
    place = jnp.zeros(cut.shape, jnp.int32)
    for axis, size in zip(axes, window, strict=True):
        place = place * size + lax.broadcasted_iota(jnp.int32, cut.shape, axis)
    for axis, spatial, (low, _) in zip(axes, inputs.shape[-len(window) - 1 : -1], padding, strict=True):
        here = lax.broadcasted_iota(jnp.int32, cut.shape, axis - 1) * cut.shape[axis] - low
        here = here + lax.broadcasted_iota(jnp.int32, cut.shape, axis)
        # Where all of a window is -inf, what was filled in is none of its places.
        place = jnp.where((here >= 0) & (here < spatial), place, math.prod(window))
    found = jnp.where((cut == y) | jnp.isnan(cut), place, math.prod(window))
    first = jnp.min(found, axes, keepdims=True)
    dx = jnp.where((place == first) & (place < math.prod(window)), dy, jnp.zeros_like(dy))
    return {"inputs": _joined(dx, inputs, window, padding)}


def _reduced(x, fill: float, function: Callable, *how: Any):
    """`plain.reduced`, however a platform does it best; how: window, strides and padding."""
    whole = lambda x: plain.reduced(x, fill, function, *how)
    return whole(x) if max(how[0]) > _READS else dispatch.on_tpu(lambda x: shifted(x, fill, function, *how), whole, x)


def shifted(x, fill: float, function: Callable, window: tuple[int, ...], strides: tuple[int, ...], padding):
    """`plain.reduced`, along one axis after the other, of reads that are shifted. A stride makes an axis two, blocks
    and phases, and a read is of one phase: XLA for the TPU is slow to read every second element and to reduce windows.
    """
    lead = x.ndim - len(window) - 1
    for axis, size, stride, (low, high) in zip(range(lead, x.ndim - 1), window, strides, padding, strict=True):
        count = max(0, (x.shape[axis] + low + high - size) // stride + 1)
        blocks = count + (size - 1) // stride
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (low, blocks * stride - low - x.shape[axis], 0)
        x = lax.pad(x, jnp.asarray(fill, x.dtype)[()], edges)
        x = x.reshape(*x.shape[:axis], blocks, stride, *x.shape[axis + 1 :])
        phases = [lax.index_in_dim(x, phase, axis + 1, keepdims=False) for phase in range(min(size, stride))]
        reads = (lax.slice_in_dim(phases[k % stride], k // stride, k // stride + count, axis=axis) for k in range(size))
        x = functools.reduce(function, reads)
    return x


def _inner(inputs, window: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `_cut` that are inside of windows."""
    lead = inputs.ndim - len(window) - 1
    return tuple(range(lead + 1, lead + 2 * len(window), 2))


def _cut(inputs, window: tuple[int, ...], padding: plain.Pairs, fill: float):
    """inputs[..., *spatial, channels] as [..., (windows, window) of each spatial axis, channels], of whole windows."""
    lead, spatial = inputs.shape[: -len(window) - 1], inputs.shape[-len(window) - 1 : -1]
    counts = [(size + sum(pair)) // w for size, pair, w in zip(spatial, padding, window, strict=True)]
    # At the end, what is short of a window is cut off, padding first.
    ends = [n * w - size - low for n, w, size, (low, _) in zip(counts, window, spatial, padding, strict=True)]
    edges = [(low, end, 0) for (low, _), end in zip(padding, ends, strict=True)]
    whole = lax.pad(inputs, jnp.asarray(fill, inputs.dtype)[()], [(0, 0, 0)] * len(lead) + edges + [(0, 0, 0)])
    pairs = [size for n, w in zip(counts, window, strict=True) for size in (n, w)]
    return whole.reshape(*lead, *pairs, inputs.shape[-1])


def _joined(cut, inputs, window: tuple[int, ...], padding: plain.Pairs):
    """The inverse of `_cut`; zero in what it cut off."""
    count = len(window)
    lead, spatial = inputs.shape[: -count - 1], inputs.shape[-count - 1 : -1]
    covered = [cut.shape[axis - 1] * cut.shape[axis] for axis in _inner(inputs, window)]
    edges = [(-low, size + low - have, 0) for size, (low, _), have in zip(spatial, padding, covered, strict=True)]
    whole = cut.reshape(*lead, *covered, inputs.shape[-1])
    return lax.pad(whole, jnp.zeros((), whole.dtype), [(0, 0, 0)] * len(lead) + edges + [(0, 0, 0)])


_OPERATOR = Operator(
    name="max_pool",
    differentiable=("inputs",),
    reference=plain.max_pool,
    xla=Rules(_forward, _backward),
    tpu="max_pool has no Pallas kernel yet",
    gpu="max_pool has no Pallas kernel yet",
)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """y[i] = max over j in the window of x[i · stride + j], in each channel.

    A drop-in for `flax.nnx.max_pool` and `flax.linen.max_pool`. The gradient goes to the first of the largest, in the
    order of memory, as XLA's does. What is padded is -inf.

    Args:
      inputs: floating [..., *spatial, channels], with as many spatial axes as the window has, and any before them.
      window_shape: ints of at least 1.
      strides: from one window to the next; None: 1.
      padding: "VALID" (whole windows only), "SAME" (as many as size / stride, rounded up), or a pair (low, high) of
        ints of at least 0 for each spatial axis.
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y[..., *windows, channels] in the dtype of inputs.

    Raises:
      TypeError: inputs is not floating, or a size no int.
      ValueError: window_shape, strides, padding and the axes of inputs do not fit together, or `implementation` is
        unknown or, alone, cannot run.
    """
    inputs, *how = _checked("max_pool", inputs, window_shape, strides, padding)
    window, steps, pairs = how
    (y,) = _OPERATOR({"inputs": inputs}, implementation=implementation, window=window, strides=steps, padding=pairs)
    return y


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """y[i] = mean over j in the window of x[i · stride + j], in each channel.

    A drop-in for `flax.nnx.avg_pool` and `flax.linen.avg_pool`; the sum is in float32 whatever the dtype (float64 for
    float64).

    Args:
      inputs, window_shape, strides, padding, implementation: as for `max_pool`; what is padded is 0.
      count_include_pad: whether the sum is divided by the size of the window, or by how much of it is not padded (where
        that is nothing y is 0).

    Returns and raises as `max_pool`.
    """
    only_xla("avg_pool", implementation)
    inputs, window, steps, pairs = _checked("avg_pool", inputs, window_shape, strides, padding)
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    if window == steps:
        total = jnp.sum(_cut(wide, window, pairs, 0.0), _inner(inputs, window))
    else:
        total = _reduced(wide, 0.0, lax.add, window, steps, pairs)
    count = np.full((1,) * (len(window) + 1), math.prod(window))
    if not count_include_pad:
        for axis, (size, w, step, (low, _)) in enumerate(
            zip(inputs.shape[-len(window) - 1 : -1], window, steps, pairs, strict=True)
        ):
            start = np.arange(total.shape[axis - len(window) - 1]) * step - low
            there = np.maximum(np.minimum(start + w, size) - np.maximum(start, 0), 0)
            count = count // w * there.reshape(-1, *(1,) * (len(window) - axis))
    return (total / np.maximum(count, 1).astype(wide.dtype)).astype(inputs.dtype)


def global_max_pool(inputs: jax.Array, *, keepdims: bool = False, implementation: Implementation = None) -> jax.Array:
    """y = max over all axes but the first and the last: inputs [batch, ..., channels] to [batch, channels].

    The gradient goes to the first of the largest. keepdims: the axes stay, of size 1. Else as `max_pool`.
    """
    inputs = _spatial("global_max_pool", inputs)
    if inputs.ndim == 2:
        only_xla("global_max_pool", implementation)
        return inputs
    y = max_pool(inputs, inputs.shape[1:-1], inputs.shape[1:-1], implementation=implementation)
    return y if keepdims else y.reshape(inputs.shape[0], inputs.shape[-1])


def global_avg_pool(inputs: jax.Array, *, keepdims: bool = False, implementation: Implementation = None) -> jax.Array:
    """y = mean over all axes but the first and the last: inputs [batch, ..., channels] to [batch, channels].

    The sum is in float32 whatever the dtype (float64 for float64). keepdims: the axes stay, of size 1. Raises as
    `avg_pool`.
    """
    only_xla("global_avg_pool", implementation)
    inputs = _spatial("global_avg_pool", inputs)
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    return jnp.mean(wide, range(1, inputs.ndim - 1), keepdims=keepdims).astype(inputs.dtype)


def adaptive_avg_pool(
    inputs: jax.Array, output_shape: Sequence[int], *, implementation: Implementation = None
) -> jax.Array:
    """y[i] = mean of x[⌊i · size / n⌋ : ⌈(i + 1) · size / n⌉] along every spatial axis, n the windows asked for.

    What `torch.nn.AdaptiveAvgPool1d` to `3d` compute, with the channels last. The sum is in float32 whatever the dtype
    (float64 for float64).

    Args:
      inputs: floating [..., *spatial, channels], with as many spatial axes as output_shape has, and any before them.
      output_shape: ints of at least 1, the windows of each spatial axis.
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y[..., *output_shape, channels] in the dtype of inputs.

    Raises:
      TypeError: inputs is not floating, or a size no int.
      ValueError: inputs has too few axes or an empty one, a size is below 1, or `implementation` is unknown or, alone,
        cannot run.
    """
    name = "adaptive_avg_pool"
    only_xla(name, implementation)
    inputs = checks.floating(name, "inputs", inputs)
    shape = _sizes(name, "output_shape", output_shape)
    _rank(name, inputs, "output_shape", shape)
    spatial = inputs.shape[-len(shape) - 1 : -1]
    if 0 in spatial:
        raise ValueError(f"{name}: inputs must have no empty spatial axis, got shape {inputs.shape}")
    if all(size % n == 0 for size, n in zip(spatial, shape, strict=True)):
        window = tuple(size // n for size, n in zip(spatial, shape, strict=True))
        return avg_pool(inputs, window, window)
    y = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    for axis, (size, n) in enumerate(zip(spatial, shape, strict=True), inputs.ndim - len(shape) - 1):
        start, stop = np.arange(n) * size // n, -(-np.arange(1, n + 1) * size // n)
        place = np.arange(size)
        share = ((place >= start[:, None]) & (place < stop[:, None])) / (stop - start)[:, None]
        product = jnp.tensordot(y, jnp.asarray(share, y.dtype), ((axis,), (1,)), precision=lax.Precision.HIGHEST)
        y = jnp.moveaxis(product, -1, axis)
    return y.astype(inputs.dtype)


def _spatial(name: str, inputs: jax.Array) -> jax.Array:
    inputs = checks.floating(name, "inputs", inputs)
    if inputs.ndim < 2 or 0 in inputs.shape[1:-1]:
        raise ValueError(
            f"{name}: inputs must have a batch axis and channels, and no empty axis between, got shape {inputs.shape}"
        )
    return inputs


def _sizes(name: str, argument: str, value: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(index, value))
    except TypeError:
        raise TypeError(f"{name}: {argument} must be a sequence of ints, got {value!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name}: {argument} must be ints of at least 1, one for each spatial axis, got {value!r}")
    return sizes


def _rank(name: str, inputs: jax.Array, argument: str, sizes: tuple[int, ...]) -> None:
    if inputs.ndim < len(sizes) + 1:
        raise ValueError(
            f"{name}: inputs must have {len(sizes)} spatial axes, as many as {argument} {sizes}, and channels, got "
            f"shape {inputs.shape}"
        )


def _checked(name: str, inputs, window_shape, strides, padding: Padding):
    """(inputs, window, strides, pairs of padding)."""
    inputs = checks.floating(name, "inputs", inputs)
    window = _sizes(name, "window_shape", window_shape)
    _rank(name, inputs, "window_shape", window)
    steps = (1,) * len(window) if strides is None else _sizes(name, "strides", strides)
    if len(steps) != len(window):
        raise ValueError(f"{name}: strides must be {len(window)} ints, as window_shape {window}, got {strides}")
    spatial = inputs.shape[-len(window) - 1 : -1]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"{name}: padding must be 'SAME', 'VALID' or pairs of ints, got {padding!r}")
        pairs = tuple(lax.padtype_to_pads(spatial, window, steps, padding))
        return inputs, window, steps, tuple((int(low), int(high)) for low, high in pairs)
    try:
        pairs = tuple((index(low), index(high)) for low, high in padding)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: padding must be 'SAME', 'VALID' or pairs of ints, got {padding!r}") from None
    if len(pairs) != len(window) or min(map(min, pairs)) < 0:
        raise ValueError(
            f"{name}: padding must be a pair of ints of at least 0 for each of {len(window)} axes, got {padding}"
        )
    return inputs, window, steps, pairs
