"""What the kernels of convolutions share on every chip: arrays in one order of axes, and what their gradients are."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import activations

f32 = jnp.float32


def turned(lhs, rhs, geometry: dict[str, Any]) -> dict[str, Any]:
    """The options of the convolution of dz with the window turned around that is the gradient of lhs."""
    numbers = geometry["dimension_numbers"]
    sizes = [rhs.shape[axis] - 1 for axis in numbers.rhs_spec[2:]]
    around = [size * step for size, step in zip(sizes, geometry["rhs_dilation"], strict=True)]
    pads = zip(around, geometry["padding"], strict=True)
    specs = numbers.out_spec, (numbers.rhs_spec[1], numbers.rhs_spec[0], *numbers.rhs_spec[2:]), numbers.lhs_spec
    return {
        **geometry,
        "activation": None,
        "dtype": lhs.dtype.name,
        "padding": tuple((window - low, window - high) for window, (low, high) in pads),
        "dimension_numbers": type(numbers)(*specs),
    }


def image(a, spec: tuple[int, ...]):
    """a, whose axes are said by `spec`, as [batch, height, width, channels]."""
    a = a.transpose(spec[0], *spec[2:], spec[1])
    return a if a.ndim == 4 else a[:, None]


def unimage(a, spec: tuple[int, ...]):
    """The inverse of `image`."""
    order = (spec[0], *spec[2:], spec[1])
    a = a if len(spec) == 4 else a[:, 0]
    return a.transpose([order.index(axis) for axis in range(len(spec))])


def beside(dy, bias, residual, residuals, activation, numbers) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(dz in float32, the gradients of bias and residual that are present)."""
    wide = dy.astype(f32)
    dz = wide if not residuals else activations.along(activation, residuals[0].astype(f32), wide)[1]
    gradients = {}
    if bias is not None:
        others = [axis for axis in range(dz.ndim) if axis != numbers.out_spec[1]]
        gradients["bias"] = jnp.sum(dz, others).astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = dy.astype(residual.dtype)
    return dz, gradients
