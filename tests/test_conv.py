"""conv against lax's convolution with the rest composed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxops
from jaxops.nn import linen
from jaxops.ops import winograd
from jaxops.ops.activations import gelu, relu, silu
from jaxops.ops.conv import conv
from tests.compare import check, error, some_and_all

NHWC = ("NHWC", "HWIO", "NHWC")
BOTH = ("bias", "residual")


def plain(lhs, rhs, window_strides, padding, *, bias=None, residual=None, activation=None, **more):
    """What a user of lax writes, the accumulation and all after it in float32."""
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    y = lax.conv_general_dilated(lhs, rhs, window_strides, padding, preferred_element_type=wide, **more)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, more.get("dimension_numbers"))
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(wide), [i for i in range(y.ndim) if i != numbers.out_spec[1]])
    y = y if activation is None else activation(y)
    return (y if residual is None else y + residual.astype(wide)).astype(lhs.dtype)


# shapes of lhs and rhs, strides, padding, what comes after the convolution, dtype, options.
CASES = {
    "one axis": ((2, 3, 9), (5, 3, 4), (2,), "SAME", BOTH, "float32", dict(activation=silu)),
    "NCHW": ((2, 3, 7, 5), (4, 3, 3, 2), (1, 2), "SAME_LOWER", ("bias",), "bfloat16", {}),
    "NHWC": (
        (2, 7, 5, 3),
        (3, 2, 3, 4),
        (2, 1),
        "VALID",
        BOTH,
        "bfloat16",
        dict(activation=gelu, dimension_numbers=NHWC),
    ),
    "dilated, padding and cropping": (
        (2, 9, 8, 3),
        (3, 2, 3, 4),
        (1, 1),
        ((2, 1), (-1, 3)),
        ("residual",),
        "float32",
        dict(rhs_dilation=(2, 3), dimension_numbers=NHWC, precision="highest"),
    ),
    "transposed": (
        (2, 4, 5, 3),
        (3, 3, 3, 4),
        (1, 1),
        ((2, 1), (1, 2)),
        ("bias",),
        "float32",
        dict(lhs_dilation=(2, 3), dimension_numbers=NHWC, activation=relu),
    ),
    "three axes, mixed layouts": (
        (3, 2, 4, 5, 3),
        (2, 2, 3, 4, 3),
        (1, 2, 1),
        "SAME",
        BOTH,
        "float32",
        dict(dimension_numbers=("CNDHW", "DHWOI", "NDCHW")),
    ),
    "depthwise": (
        (2, 5, 7, 6),
        (3, 3, 1, 6),
        (1, 1),
        "SAME",
        BOTH,
        "float16",
        dict(feature_group_count=6, dimension_numbers=NHWC),
    ),
    "depthwise, of everything": (
        (3, 2, 7, 9),
        (3, 1, 3, 2),
        (2, 1),
        ((-1, 2), (3, -2)),
        BOTH,
        "float32",
        dict(
            feature_group_count=3,
            activation=silu,
            lhs_dilation=(1, 2),
            rhs_dilation=(1, 3),
            dimension_numbers=("CNHW", "OIHW", "NCWH"),
        ),
    ),
    "depthwise, one axis": (
        (2, 9, 6),
        (4, 1, 6),
        (3,),
        ((3, 0),),
        BOTH,
        "bfloat16",
        dict(feature_group_count=6, dimension_numbers=("NWC", "WIO", "NWC")),
    ),
    "depthwise, no batch": (
        (0, 5, 6),
        (4, 1, 6),
        (1,),
        "SAME",
        ("bias",),
        "float32",
        dict(feature_group_count=6, dimension_numbers=("NWC", "WIO", "NWC")),
    ),
    "pointwise": (
        (2, 3, 5, 4),
        (6, 4, 1, 1),
        (1, 1),
        "SAME",
        BOTH,
        "float32",
        dict(activation=silu, dimension_numbers=("NHWC", "OIHW", "CNHW")),
    ),
    "tiles": ((3, 9, 11, 64), (3, 3, 64, 70), (1, 1), "SAME", BOTH, "float32", dict(dimension_numbers=NHWC)),
    "tiles, two strips": (
        (1, 81, 60, 64),
        (3, 3, 64, 64),
        (1, 1),
        "VALID",
        (),
        "float32",
        dict(dimension_numbers=NHWC),
    ),
    "tiles, cropped, 16 bits": (
        (2, 33, 9, 12),
        (40, 33, 3, 3),
        (1, 1),
        ((-1, 5), (4, -2)),
        BOTH,
        "bfloat16",
        dict(activation=silu),
    ),
    "groups of the batch": (
        (4, 5, 7, 3),
        (3, 3, 3, 6),
        (1, 1),
        "SAME",
        BOTH,
        "float32",
        dict(batch_group_count=2, dimension_numbers=NHWC),
    ),
    "no batch": ((0, 5, 7, 3), (3, 3, 3, 6), (1, 1), "SAME", BOTH, "float32", dict(dimension_numbers=NHWC)),
    "no result": ((2, 2, 7, 3), (3, 3, 3, 6), (1, 1), "VALID", BOTH, "float32", dict(dimension_numbers=NHWC)),
}

FAST = (
    "NHWC",
    "dilated, padding and cropping",
    "transposed",
    "depthwise",
    "depthwise, of everything",
    "tiles",
    "tiles, cropped, 16 bits",
    "no batch",
    "no result",
)


def operands_of(lhs, rhs, strides, padding, more, options):
    random = np.random.default_rng(0)
    shaped = lambda f, *shapes, **named: (
        jax.eval_shape(f, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).shape
    )
    options = {name: value for name, value in options.items() if name != "activation"}
    y = shaped(lambda a, b: plain(a, b, strides, padding, **options), lhs, rhs)
    numbers = lax.conv_dimension_numbers(lhs, rhs, options.get("dimension_numbers"))
    made = dict(lhs=random.standard_normal(lhs), rhs=random.standard_normal(rhs) / max(np.prod(rhs), 1) ** 0.4)
    shapes = dict(bias=(y[numbers.out_spec[1]],), residual=y)
    return made | {name: random.standard_normal(shapes[name]) for name in more}


@pytest.mark.optimized
@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_values_and_gradients(case):
    lhs, rhs, strides, padding, more, dtype, options = CASES[case]
    operands = operands_of(lhs, rhs, strides, padding, more, options)
    options = dict(window_strides=strides, padding=padding, **options)
    check(conv, plain, operands, differentiable=tuple(operands), dtype=dtype, transforms=(), **options)


@pytest.mark.parametrize("form", [winograd.EXACT, winograd.FAST])
@pytest.mark.parametrize("tiles", [1, 7, 30, 1000])
def test_tiles(form, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "_TILES", tiles)
    monkeypatch.setattr(winograd, "_BYTES", 0)
    random = np.random.default_rng(0)
    x, w = random.standard_normal((5, 10, 7, 48)), random.standard_normal((3, 3, 48, 40)) / 20
    padding, size = ((0, 3), (2, -1)), (11, 6)
    low = [before for before, _ in padding]
    with jax.enable_x64(True):
        exact = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC)
        y, pull = jax.vjp(exact, jnp.asarray(x), jnp.asarray(w))
        dy = random.standard_normal(y.shape)
        dw = np.asarray(pull(jnp.asarray(dy))[1])
    assert y.shape == (5, *size, 40)
    bound = 4e-7 if form is winograd.EXACT else 2e-6
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in (x, w, dy))
    assert error(winograd.convolution(x, w, low, size, form), np.asarray(y), 2) < bound
    assert error(winograd.window_gradient(x, dy, low, form), dw, 2) < bound


@pytest.mark.parametrize(
    ("shape", "channels", "dtype", "tiled"),
    [((2, 8, 8), 64, "float32", True), ((2, 8, 8), 32, "float32", False), ((2, 8, 8), 32, "bfloat16", True)]
    + [((1, 7, 7), 64, "float32", False)],
)
def test_what_is_made_of_tiles(shape, channels, dtype, tiled):
    x, w = jnp.ones((*shape, channels), dtype), jnp.ones((3, 3, channels, channels), dtype)
    call = jax.jit(lambda x, w: conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC))
    assert ("convolution" not in call.lower(x, w).compile().as_text()) == tiled


@some_and_all
def test_transforms_of_tiles(transforms):
    options = dict(dimension_numbers=NHWC)
    operands = operands_of((16, 6, 7, 64), (3, 3, 64, 64), (1, 1), "SAME", ("bias",), options)
    more = dict(differentiable=tuple(operands), sharded={"lhs": 0}, transforms=transforms)
    check(conv, plain, operands, window_strides=(1, 1), padding="SAME", **more, **options)


@some_and_all
def test_transforms(transforms):
    options = dict(dimension_numbers=NHWC, activation=silu)
    operands = operands_of((16, 4, 3, 2), (2, 2, 2, 3), (1, 1), "SAME", BOTH, options)
    sharded = {"lhs": 0, "residual": 0}
    check(
        conv,
        plain,
        operands,
        differentiable=tuple(operands),
        sharded=sharded,
        transforms=transforms,
        window_strides=(1, 1),
        padding="SAME",
        **options,
    )


def test_dtypes():
    x, w = jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((3, 2, 2), jnp.float32)
    assert conv(x, w, (1,), "SAME").dtype == jnp.float32
    w = w.astype(jnp.bfloat16) * 1.0078125
    y = conv(x, w, (1,), "VALID", preferred_element_type=jnp.float32, bias=jnp.full(3, 2**-10))
    assert y.dtype == jnp.float32 and jnp.all(y == 4.03125 + 2**-10)
    y = conv(x.astype(jnp.float32), w.astype(jnp.float32), (1,), "VALID", preferred_element_type=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(("width", "batch", "wanted"), [(16, 8, "pallas"), (12, 7, "pallas"), (12, 8, "xla")])
def test_what_runs_depthwise(width, batch, wanted):
    x, w = jnp.ones((batch, 6, width, 40)), jnp.ones((3, 3, 1, 40))
    call = functools.partial(
        conv, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC, feature_group_count=40
    )
    lines = jaxops.explain(call, x, w, target="v5e").lines
    assert [(line.operator, line.implementation) for line in lines] == [("conv", wanted)]


def test_an_activation_may_close_over_an_array():
    x, w, slope = jnp.ones((1, 2, 4)), jnp.ones((3, 2, 1)), jnp.asarray(2.0)
    gradient = jax.grad(lambda slope: conv(x, w, (1,), "SAME", activation=lambda y: slope * y).sum())(slope)
    assert gradient == pytest.approx(24)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_that_is_split(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    o = operands_of((8, 4, 4, 2), (3, 3, 2, 4), (1, 1), "SAME", BOTH, dict(dimension_numbers=NHWC))
    o = {name: jnp.asarray(x, jnp.float32) for name, x in o.items()}
    call = lambda o, **more: conv(
        o["lhs"], o["rhs"], (1, 1), "SAME", None, None, NHWC, bias=o["bias"], activation=silu, **more
    )
    specs = dict(lhs=P("data"), rhs=P(), bias=P(), residual=P("data"))
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in o.items()}
    with jax.set_mesh(mesh):
        sharding = {"out_sharding": P("data")} if kind == AxisType.Explicit else {}
        y, told = jax.jit(call)(placed), jax.jit(functools.partial(call, **sharding))(placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 4)
    assert error(y, call(o)) < 1e-6 and error(told, call(o)) < 1e-6


X, W = jnp.ones((2, 3, 6, 6)), jnp.ones((4, 3, 3, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: conv(jnp.ones((2, 3, 6, 6), int), W, (1, 1), "SAME"), TypeError, "lhs must be of a floating dtype"),
        (lambda: conv(X, W[0], (1, 1), "SAME"), ValueError, r"the same rank, at least 2, got \(2, 3, 6, 6\) and"),
        (lambda: conv(X, W, (1,), "SAME"), ValueError, r"window_strides must be a sequence of 2 ints.*got \(1,\)"),
        (lambda: conv(X, W, None, "SAME"), ValueError, "window_strides must be a sequence of 2 ints.*got None"),
        (lambda: conv(X, W, (1, 0), "SAME"), ValueError, "window_strides must be at least 1, got 0"),
        (lambda: conv(X, W, (1, 1.5), "SAME"), TypeError, "window_strides must be an int, got 1.5"),
        (lambda: conv(X, W, (1, 1), "FULL"), ValueError, "padding must be one of SAME.*got 'FULL'"),
        (lambda: conv(X, W, (1, 1), ((1, 1),)), ValueError, r"2 pairs \(low, high\) of ints, got \(\(1, 1\),\)"),
        (lambda: conv(X, W, (1, 1), 1), ValueError, "2 pairs"),
        (lambda: conv(X, W, (1, 1), ((-4, -4), (0, 0))), ValueError, "must not crop more than axis 2 of lhs"),
        (lambda: conv(X, W, (1, 1), "SAME", (2, 1)), ValueError, "must be pairs .* where lhs is dilated, got 'SAME'"),
        (lambda: conv(X, W, (1, 1), "SAME", None, (2,)), ValueError, r"rhs_dilation must be a sequence of 2 ints"),
        (
            lambda: conv(X, W, (1, 1), "SAME", None, None, ("NHWC", "HWIO")),
            ValueError,
            "dimension_numbers must be None or",
        ),
        (
            lambda: conv(X, W, (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHXC")),
            ValueError,
            "dimension_numbers must be",
        ),
        (
            lambda: conv(X, W, (1, 1), "SAME", None, None, NHWC),
            ValueError,
            "rhs must have 6 input channels.*dimension_numbers",
        ),
        (
            lambda: conv(X, W, (1, 1), "SAME", None, None, None, 2),
            ValueError,
            "feature_group_count must divide the 3 channels",
        ),
        (
            lambda: conv(X, W, (1, 1), "SAME", None, None, None, 1, 3),
            ValueError,
            "batch_group_count must divide the batch of 2",
        ),
        (lambda: conv(X, W, (1, 1), "SAME", None, None, None, 3, 2), ValueError, "at most one of feature_group_count"),
        (
            lambda: conv(X, W, (1, 1), "SAME", preferred_element_type=int),
            TypeError,
            "preferred_element_type must be a floating",
        ),
        (
            lambda: conv(X, W, (1, 1), "SAME", bias=jnp.ones(3)),
            ValueError,
            r"bias must have shape \(4,\) \(the output channels",
        ),
        (lambda: conv(X, W, (1, 1), "VALID", residual=X), ValueError, r"residual must have shape \(2, 4, 4, 4\)"),
        (lambda: conv(X, W, (1, 1), "SAME", activation=jnp.sum), ValueError, "activation must keep the shape"),
        (lambda: conv(X, W, (1, 1), "SAME", implementation="cudnn"), ValueError, "implementation must be None"),
        (lambda: conv(X, W, (1, 1), "SAME", precision="most"), ValueError, "conv: Precision argument must"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def data(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


# kernel size, shape of the input, further constructor arguments: those of nnx.Conv.
LAYERS = {
    "two axes": ((3, 2), (2, 7, 5, 4), dict(strides=2, padding="VALID")),
    "circular": (3, (2, 7, 4), dict(padding="CIRCULAR", kernel_dilation=2)),
    "causal, groups": (3, (2, 7, 4), dict(padding="CAUSAL", feature_group_count=2, dtype=jnp.bfloat16)),
    "reflected, no batch": ((3, 3), (7, 5, 4), dict(padding="REFLECT", use_bias=False)),
    "masked, two batches": ((3, 3), (2, 3, 5, 5, 4), dict(padding=((1, 2), 1), input_dilation=2, mask=True)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    """nnx.Conv, nnx.Conv of our function, ours and its Linen twin, with the same parameters."""
    size, shape, options = LAYERS[case]
    x = data(*shape)
    if "mask" in options:
        options = options | {"mask": data(3, 3, 4, 6) > 0}
    theirs = nnx.Conv(4, 6, size, rngs=nnx.Rngs(0), **options)
    plugged = nnx.Conv(4, 6, size, rngs=nnx.Rngs(0), conv_general_dilated=jaxops.conv, **options)
    ours = jaxops.nn.Conv(4, 6, size, rngs=nnx.Rngs(0), activation=silu, **options)
    twin = linen.Conv(6, size, activation=silu, **options)
    parameters = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    parameters = {name: data(*value.shape) for name, value in parameters.items()}
    shapes = jax.tree.map(jnp.shape, twin.init(jax.random.key(0), x)["params"])
    assert shapes == {name: value.shape for name, value in parameters.items()}
    for layer in (theirs, plugged, ours):
        nnx.update(layer, parameters)
    want = theirs(x)
    tolerance = 1e-5 if want.dtype == jnp.float32 else 2e-2
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and error(a, b) < tolerance
    assert same(plugged(x), want)
    assert [line.operator for line in jaxops.explain(lambda x: plugged(x), x).lines] == ["conv"]
    assert same(ours(x), silu(want))
    assert same(twin.apply({"params": parameters}, x), silu(want))
    residual = data(*want.shape)
    assert same(ours(x, residual=residual), silu(want) + residual.astype(want.dtype))
    if case != "two axes":
        return
    loss = lambda layer: jnp.sum(jnp.sin(layer(x).astype(jnp.float32)))
    found, expected = nnx.grad(loss)(plugged), nnx.grad(loss)(theirs)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def test_a_layer_takes_no_other_convolution():
    with pytest.raises(TypeError, match=r"conv_general_dilated"):
        jaxops.nn.Conv(4, 6, 3, rngs=nnx.Rngs(0), conv_general_dilated=lax.conv_general_dilated)
    with pytest.raises(ValueError, match=r"an input must end in 2 spatial axes and 4 channels, got \(2, 7, 5\)"):
        jaxops.nn.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))(data(2, 7, 5))
