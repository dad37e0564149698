"""conv_transpose against lax's, and against the gradient of a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxops
from jaxops.nn import linen
from jaxops.ops.activations import silu
from tests.compare import error, no_worse

NHWC = ("NHWC", "HWIO", "NHWC")


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


# shapes of lhs and rhs, strides, padding, options of both functions.
CASES = {
    "one axis": ((2, 9, 3), (5, 3, 4), (3,), "SAME", {}),
    "wide strides": ((2, 4, 5, 3), (2, 3, 3, 4), (5, 2), "VALID", {}),
    "same, wide strides": ((2, 4, 5, 3), (2, 3, 3, 4), (4, 1), "SAME", {}),
    "pairs": ((2, 4, 5, 3), (3, 3, 3, 4), (2, 1), ((1, 2), (0, -1)), dict(rhs_dilation=(2, 1))),
    "pairs of the convolution": (
        (2, 4, 5, 3),
        (3, 2, 3, 4),
        (2, 2),
        ((1, 1), (0, 1)),
        dict(use_consistent_padding=True),
    ),
    "NCHW, turned": (
        (2, 3, 4, 5),
        (3, 4, 3, 2),
        (2, 3),
        "SAME",
        dict(dimension_numbers=("NCHW", "OIHW", "NCHW"), transpose_kernel=True),
    ),
    "three axes": ((1, 3, 2, 4, 2), (2, 1, 3, 2, 5), (2, 1, 2), "VALID", {}),
    "no axes": ((4, 3), (3, 5), (), "SAME", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_lax(case):
    lhs, rhs, strides, padding, options = CASES[case]
    lhs, rhs = data(*lhs), data(*rhs)
    run = lambda f: jax.jit(lambda a, b: jax.vjp(lambda a, b: jnp.sin(f(a, b, strides, padding, **options)), a, b)[0])
    want, got = (run(f)(lhs, rhs) for f in (lax.conv_transpose, jaxops.conv_transpose))
    assert got.shape == want.shape and got.dtype == want.dtype
    assert error(got, want) < 1e-6
    loss = lambda f: jax.jit(jax.grad(lambda a, b: jnp.sum(jnp.sin(f(a, b, strides, padding, **options))), (0, 1)))
    for mine, theirs in zip(loss(jaxops.conv_transpose)(lhs, rhs), loss(lax.conv_transpose)(lhs, rhs), strict=True):
        assert error(mine, theirs) < 1e-5


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 1))])
def test_it_is_the_gradient_of_a_convolution(padding):
    x, w = data(2, 8, 9, 3), data(3, 2, 3, 4)
    options = dict(dimension_numbers=NHWC)
    forward = lambda x: jaxops.conv(x, w, (2, 3), padding, **options)
    y, pull = jax.vjp(forward, x)
    dy = data(*y.shape, seed=1)
    (want,) = pull(dy)
    got = jaxops.conv_transpose(dy, w, (2, 3), padding, transpose_kernel=True, use_consistent_padding=True, **options)
    inside = tuple(slice(0, min(a, b)) for a, b in zip(got.shape, want.shape, strict=True))  # what no window reached
    assert error(got[inside], want[inside]) < 1e-6


def test_what_comes_after_it_in_bfloat16():
    lhs, rhs, bias = (a.astype(jnp.bfloat16) for a in (data(2, 5, 4, 8), data(3, 3, 8, 6), data(6)))
    residual = data(2, 10, 8, 6).astype(jnp.bfloat16)

    def plain(lhs, rhs, bias, residual):
        return silu(lax.conv_transpose(lhs, rhs, (2, 2), "SAME") + bias) + residual

    got = jaxops.conv_transpose(
        lhs, rhs, (2, 2), "SAME", bias=bias, activation=silu, residual=residual, implementation="xla"
    )
    wide = [a.astype(jnp.float32) for a in (lhs, rhs, bias, residual)]
    no_worse("output", got, plain(lhs, rhs, bias, residual), plain(*wide), jnp.bfloat16)


# kernel size, shape of the input, constructor arguments of nnx.ConvTranspose.
LAYERS = {
    "two axes": ((3, 2), (2, 7, 5, 4), dict(strides=2)),
    "no batch, turned": (3, (7, 4), dict(strides=3, padding="VALID", transpose_kernel=True, use_bias=False)),
    "two batches, masked": ((2, 3), (2, 3, 4, 5, 4), dict(padding=((1, 2), 1), kernel_dilation=2, mask=True)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    size, shape, options = LAYERS[case]
    if "mask" in options:
        options = options | {"mask": data(2, 3, 4, 6) > 0}
    x = data(*shape)
    theirs = nnx.ConvTranspose(4, 6, size, rngs=nnx.Rngs(0), **options)
    ours = jaxops.nn.ConvTranspose(4, 6, size, rngs=nnx.Rngs(0), activation=silu, **options)
    twin = linen.ConvTranspose(6, size, activation=silu, **options)
    want, residual = theirs(x), data(*theirs(x).shape)
    assert error(ours(x), silu(want)) < 1e-5
    parameters = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    shapes = jax.tree.map(jnp.shape, twin.init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(jnp.shape, parameters)
    assert error(twin.apply({"params": parameters}, x, residual=residual), silu(want) + residual) < 1e-5
    assert error(ours(x, residual=residual), silu(want) + residual) < 1e-5


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(padding="SAME_LOWER"), ValueError, "conv_transpose: padding must be 'SAME', 'VALID' or pairs"),
        (dict(padding=((1, 1),)), ValueError, "conv_transpose: padding must be one of .* or 2 pairs"),
        (dict(strides=(2,)), ValueError, "conv_transpose: strides must be a sequence of 2 ints"),
        (dict(strides=(2, 0)), ValueError, "conv_transpose: strides must be at least 1, got 0"),
        (dict(rhs=jnp.ones((3, 3, 5, 4))), ValueError, "conv_transpose: rhs must have 3 input channels"),
        (dict(rhs=jnp.ones((3, 3, 4))), ValueError, r"conv_transpose: lhs and rhs must have the same rank"),
        (dict(lhs=jnp.ones((2, 5, 5, 3), int)), TypeError, "conv_transpose: lhs must be"),
        (dict(dimension_numbers=("NHWC", "HWIO")), ValueError, "conv_transpose: dimension_numbers must be"),
        (dict(bias=jnp.ones(3)), ValueError, r"bias must have shape \(4,\)"),
    ],
)
def test_bad_input(change, kind, message):
    call = dict(lhs=jnp.ones((2, 5, 5, 3)), rhs=jnp.ones((3, 3, 3, 4)), strides=(2, 2), padding="SAME") | change
    with pytest.raises(kind, match=message):
        jaxops.conv_transpose(**call)


def test_bad_input_of_a_layer():
    with pytest.raises(ValueError, match=r"ConvTranspose: padding must be 'SAME', 'VALID' or pairs.*got 'CIRCULAR'"):
        jaxops.nn.ConvTranspose(4, 6, 3, padding="CIRCULAR", rngs=nnx.Rngs(0))(data(2, 7, 4))
    with pytest.raises(ValueError, match=r"an input must end in 2 spatial axes and 4 channels, got \(2, 7, 5\)"):
        jaxops.nn.ConvTranspose(4, 6, (3, 3), rngs=nnx.Rngs(0))(data(2, 7, 5))
