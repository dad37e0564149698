"""The norms against their references, Flax's modules, and what they may communicate and allocate."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxops
from jaxops.inspection import operator_calls
from jaxops.ops.add_layer_norm import add_layer_norm
from jaxops.ops.add_rms_norm import add_rms_norm
from jaxops.ops.group_norm import group_norm
from jaxops.ops.layer_norm import layer_norm
from jaxops.ops.rms_norm import rms_norm
from jaxops.reference.add_layer_norm import add_layer_norm as add_layer_norm_reference
from jaxops.reference.add_rms_norm import add_rms_norm as add_rms_norm_reference
from jaxops.reference.group_norm import group_norm as group_norm_reference
from jaxops.reference.layer_norm import layer_norm as layer_norm_reference
from jaxops.reference.rms_norm import rms_norm as rms_norm_reference
from jaxops.workbench.comparison import against_float64
from tests.compare import check, error, some_and_all

NORMS = {
    "layer_norm": (layer_norm, layer_norm_reference, ("x", "scale", "bias")),
    "rms_norm": (rms_norm, rms_norm_reference, ("x", "scale")),
}
ADDING = {
    "add_layer_norm": (add_layer_norm, add_layer_norm_reference, ("x", "residual", "scale", "bias")),
    "add_rms_norm": (add_rms_norm, add_rms_norm_reference, ("x", "residual", "scale")),
}
PLAIN = dict(eps=1e-6, scale_offset=0.0)
# shape of x, dtype, options. The larger ones go through several tiles, with a remainder or none.
CASES = [
    ((7,), "float32", PLAIN),
    # eps above x²: for one feature the gradient is all but cancelled by itself as eps / x² goes to 0.
    ((1, 1), "float32", dict(eps=30.0, scale_offset=0.0)),
    ((127, 129), "float32", PLAIN),
    ((128, 128), "float32", dict(eps=1e-3, scale_offset=1.0)),
    ((129, 127), "bfloat16", PLAIN),
    ((1, 1000), "float16", PLAIN),
    ((1000, 257), "float32", PLAIN),
    ((1009, 200), "bfloat16", dict(eps=1e-5, scale_offset=1.0)),
    ((3, 500, 128), "float32", PLAIN),
    ((2, 129, 4, 200), "float32", PLAIN),
    ((0, 5), "float32", PLAIN),
    ((4, 0), "float32", PLAIN),
]
ADDING_CASES = [
    ((7,), "float32", PLAIN),
    ((129, 127), "bfloat16", dict(eps=1e-3, scale_offset=1.0)),
    ((1000, 257), "float32", PLAIN),
    ((2, 129, 4, 200), "float16", PLAIN),
    ((0, 5), "float32", PLAIN),
]
GROUPED = [  # shape of x, groups, dtype
    ((3, 6), 2, "float32"),
    ((2, 7, 30), 30, "float32"),  # each channel by itself
    ((3, 9, 11, 129), 3, "bfloat16"),
    ((2, 3, 5, 7, 8), 1, "float16"),
    ((2, 63, 65, 48), 4, "float32"),
    ((2, 0, 6), 2, "float32"),
]


def operands_of(shape, seed=0):
    random = np.random.default_rng(seed)
    x = 3 + 2 * random.standard_normal(shape)
    made = dict(x=x, scale=random.standard_normal(shape[-1:]), bias=random.standard_normal(shape[-1:]))
    return made | dict(residual=random.standard_normal(shape))


def chosen(norm, shape):
    operator, reference, names = (NORMS | ADDING)[norm]
    return operator, reference, {name: x for name, x in operands_of(shape).items() if name in names}, names


@pytest.mark.optimized
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "dtype", "static"), CASES, ids=str)
def test_values_and_gradients(norm, shape, dtype, static):
    operator, reference, operands, names = chosen(norm, shape)
    check(operator, reference, operands, differentiable=names, dtype=dtype, transforms=(), **static)


@pytest.mark.parametrize("norm", ["rms_norm", pytest.param("layer_norm", marks=pytest.mark.slow)])
@some_and_all
def test_transforms(norm, transforms):
    operator, reference, operands, names = chosen(norm, (16, 24))
    check(operator, reference, operands, differentiable=names, sharded={"x": 0}, transforms=transforms, **PLAIN)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("norm", "shape", "dtype", "static"),
    [
        *(("add_layer_norm", *case) for case in ADDING_CASES),
        *(("add_rms_norm", *case) for case in ADDING_CASES[1:3]),
    ],
    ids=str,
)
def test_values_and_gradients_with_an_addition(norm, shape, dtype, static):
    operator, reference, operands, names = chosen(norm, shape)
    check(operator, reference, operands, differentiable=names, dtype=dtype, transforms=(), outputs=2, **static)


@pytest.mark.parametrize("norm", ["add_rms_norm", pytest.param("add_layer_norm", marks=pytest.mark.slow)])
@some_and_all
def test_transforms_with_an_addition(norm, transforms):
    operator, reference, operands, names = chosen(norm, (16, 24))
    options = dict(differentiable=names, sharded={"x": 0, "residual": 0}, transforms=transforms)
    check(operator, reference, operands, outputs=2, **options, **PLAIN)


@pytest.mark.parametrize(("x", "residual"), [("bfloat16", "float32"), ("bfloat16", "float16")])
def test_an_addition_of_two_dtypes_is_rounded_once(x, residual):
    operands = {name: jnp.asarray(array, jnp.float32) for name, array in chosen("add_layer_norm", (40, 129))[2].items()}
    operands |= {"x": operands["x"].astype(x), "residual": operands["residual"].astype(residual)}
    y, total = add_layer_norm(**operands)
    assert y.dtype == total.dtype == jnp.float32
    assert (total == operands["x"].astype(jnp.float32) + operands["residual"].astype(jnp.float32)).all()
    rows = against_float64(add_layer_norm, operands)
    assert len(rows) == 6 and all(row.holds for row in rows), list(map(str, rows))


def test_what_the_next_layer_does_not_use_of_a_sum_costs_nothing():
    """Where the sum has no cotangent none is made; the gradient is that of the norm."""
    operands = chosen("add_rms_norm", (8, 24))[2]
    x, residual, scale = (jnp.asarray(operands[name], jnp.float32) for name in ("x", "residual", "scale"))
    both = jax.grad(lambda *o: jnp.sum(jnp.sin(add_rms_norm(*o)[0])), (0, 1, 2))
    (call,) = [
        e.params["call"]
        for e in operator_calls(jax.jit(both).trace(x, residual, scale).jaxpr.jaxpr)
        if e.params["call"].phase == "backward"
    ]
    assert call.still == (1,)
    want = jax.grad(lambda x, scale: jnp.sum(jnp.sin(rms_norm(x, scale))), (0, 1))(x + residual, scale)
    for got, expected in zip(both(x, residual, scale), (want[0], *want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    only_sum = jax.grad(lambda *o: jnp.sum(jnp.sin(add_rms_norm(*o)[1])), (0, 1, 2))(x, residual, scale)
    for got, expected in zip(only_sum, (jnp.cos(x + residual),) * 2 + (0 * scale,), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(("norm", "dtype"), [("layer_norm", "float32"), ("add_rms_norm", "float16")])
def test_y_in_a_dtype_of_its_own(norm, dtype):
    """y is rounded once, from float32, and so is the gradient of a cotangent in that dtype."""
    operator, _, operands, _ = chosen(norm, (40, 129))
    operands = {name: jnp.asarray(x, jnp.bfloat16) for name, x in operands.items()}
    rows = against_float64(lambda **operands: operator(**operands, dtype=dtype), operands)
    assert all(row.holds for row in rows), list(map(str, rows))
    y = jax.tree.leaves(operator(**operands, dtype=dtype))[0]
    assert y.dtype == dtype
    if norm in NORMS:
        want = operator(**{name: x.astype(jnp.float32) for name, x in operands.items()})
        assert error(y, want) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_in_int8_a_norm_is_quantised_and_constant(norm):
    operator, _, operands, _ = chosen(norm, (16, 24))
    operands = {name: jnp.asarray(x, jnp.float32) for name, x in operands.items()}
    got, want = operator(**operands, dtype="int8"), jaxops.quantize(operator(**operands))
    assert isinstance(got, jaxops.Quantized) and got.zeros is None
    assert error(got.scales, want.scales) < 1e-6 and (jnp.abs(got.values - want.values) <= 1).all()
    w = jaxops.quantize(jnp.eye(24), axis=0)
    product = jaxops.quantized_matmul(got.values, w.values, w.scales, x_scales=got.scales)
    assert error(product, operator(**operands)) < 0.01
    in_rows = jax.vmap(lambda x: operator(**operands | {"x": x}, dtype=jnp.int8))(operands["x"].reshape(4, 4, 24))
    assert (in_rows.values.reshape(16, 24) == got.values).all()
    loss = lambda x: jnp.sum(jaxops.dequantize(operator(**operands | {"x": x}, dtype="int8")))
    for transformed in (
        jax.grad(loss),
        jax.jit(jax.grad(loss)),
        lambda x: jax.jvp(loss, (x,), (x,))[1],
        jax.hessian(loss),
    ):
        assert not transformed(operands["x"]).any()


@pytest.mark.parametrize("norm", ["add_rms_norm", pytest.param("add_layer_norm", marks=pytest.mark.slow)])
def test_in_int8_a_sum_is_differentiable_still(norm):
    operator, _, operands, _ = chosen(norm, (16, 24))
    own = {name: jnp.asarray(a, jnp.float32) for name, a in operands.items()}

    def loss(x, residual, dtype):
        y, total = operator(**own | {"x": x, "residual": residual}, dtype=dtype)
        y = jaxops.dequantize(y) if dtype == "int8" else jax.lax.stop_gradient(y)
        return jnp.sum(jnp.sin(total) * y)

    x, residual = own["x"], own["residual"]
    got, want = (jax.value_and_grad(loss, (0, 1))(x, residual, dtype) for dtype in ("int8", "float32"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(a, b) < 0.02
    assert (got[1][0] == got[1][1]).all()
    moved = jax.jvp(lambda x: loss(x, residual, "int8"), (x,), (x,))[1]
    assert error(moved, jnp.sum(got[1][0] * x)) < 1e-5
    y, total = operator(**own, dtype=jnp.int8)
    assert (total == x + residual).all() and y.scales.shape == (16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_in_int8_over_devices(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    x = jnp.asarray(operands_of((16, 24))["x"], jnp.float32)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d", None)))
        y, total = jax.jit(lambda x: add_rms_norm(x, x, dtype="int8"))(placed)
        local = jax.shard_map(
            lambda x: tuple(rms_norm(x, dtype="int8")[:2]), in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
        )
        values, scales = jax.jit(local)(placed)
    want, whole = add_rms_norm(x, x, dtype="int8"), rms_norm(x, dtype="int8")
    assert (y.values == want[0].values).all() and error(total, 2 * x) == 0
    assert (values == whole.values).all() and (scales == whole.scales).all()


@pytest.mark.parametrize(("shape", "num_groups", "dtype"), GROUPED, ids=str)
def test_groups(shape, num_groups, dtype):
    _, _, operands, names = chosen("layer_norm", shape)
    static = dict(num_groups=num_groups, eps=1e-5)
    check(group_norm, group_norm_reference, operands, differentiable=names, dtype=dtype, transforms=(), **static)


@some_and_all
def test_transforms_of_groups(transforms):
    _, _, operands, names = chosen("layer_norm", (8, 3, 2, 12))
    options = dict(differentiable=names, sharded={"x": 0}, transforms=transforms, num_groups=3, eps=1e-5)
    check(group_norm, group_norm_reference, operands, **options)


@pytest.mark.parametrize(("shape", "num_groups"), [((3, 12), 4), ((2, 5, 7, 12), 3)])
def test_groups_against_flax(shape, num_groups):
    o = {name: jnp.asarray(x, jnp.float32) for name, x in chosen("layer_norm", shape)[2].items()}
    module = nn.GroupNorm(num_groups, use_fast_variance=False)
    theirs = module.apply({"params": {"scale": o["scale"], "bias": o["bias"]}}, o["x"])
    assert error(group_norm(**o, num_groups=num_groups), theirs) < 1e-5
    theirs = nn.GroupNorm(num_groups, use_scale=False, use_bias=False, use_fast_variance=False).apply({}, o["x"])
    assert error(group_norm(o["x"], num_groups=num_groups), theirs) < 1e-5


def test_against_flax():
    o = {name: jnp.asarray(x, jnp.float32) for name, x in chosen("layer_norm", (5, 40))[2].items()}
    theirs = nn.LayerNorm(epsilon=1e-6).apply({"params": {"scale": o["scale"], "bias": o["bias"]}}, o["x"])
    assert error(layer_norm(**o), theirs) < 1e-5
    assert error(layer_norm(o["x"]), nn.LayerNorm(use_scale=False, use_bias=False).apply({}, o["x"])) < 1e-5
    theirs = nn.RMSNorm(epsilon=1e-6).apply({"params": {"scale": o["scale"]}}, o["x"])
    assert error(rms_norm(o["x"], o["scale"]), theirs) < 1e-5
    assert error(rms_norm(o["x"], scale_offset=1.0), nn.RMSNorm(use_scale=False).apply({}, o["x"])) < 1e-5


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_a_large_mean_does_not_cancel(mean):
    x = np.float32(np.random.default_rng(0).standard_normal((4, 100)) + mean)
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert error(layer_norm(x), exact) < 1e-3
    assert error(group_norm(x, num_groups=1), exact) < 1e-3


PLACED = [
    ((8, 256, 512), ("d",)),
    ((4096, 256), ("d",)),
    ((4, 1024, 256), (None, "d")),
    ((4, 512, 8, 128), (None, None, "d")),
]


@pytest.mark.parametrize(
    ("norm", "shape", "spec"),
    [*((norm, *placed) for norm in NORMS for placed in PLACED), *((norm, *PLACED[2]) for norm in ADDING)],
    ids=str,
)
def test_rows_over_devices_stay_local(norm, shape, spec):
    """Over automatically partitioned rows the backward sums its parameter gradients and communicates nothing else."""
    operator, _, names = (NORMS | ADDING)[norm]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, PartitionSpec(*spec))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
    rows = [x] * (2 if norm in ADDING else 1)
    parameters = [jax.ShapeDtypeStruct(shape[-1:], jnp.float32, sharding=everywhere)] * (len(names) - len(rows))

    def loss(*operands):
        return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(operator(*operands)))

    compiled = jax.jit(jax.grad(loss, tuple(range(len(names))))).lower(*rows, *parameters).compile()
    hlo = compiled.as_text()
    assert "while" in hlo
    assert re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", hlo) == []
    loops = re.findall(r"^%?\S*(?:region|body)\S* .*?^}", hlo, re.MULTILINE | re.DOTALL)
    assert loops and not any("all-reduce(" in body and "while" in body.split("{")[0] for body in loops)


@pytest.mark.parametrize("norm", NORMS)
def test_temporary_memory(norm):
    operator, _, names = NORMS[norm]
    x = jax.ShapeDtypeStruct((8192, 2048), jnp.float32)
    parameters = [jax.ShapeDtypeStruct((2048,), jnp.float32)] * (len(names) - 1)

    def pull_back(x, dy, *parameters):
        return jax.vjp(operator, x, *parameters)[1](dy)

    compiled = jax.jit(pull_back).lower(x, x, *parameters).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


@pytest.mark.parametrize("norm", ADDING)
def test_temporary_memory_with_an_addition(norm):
    """Beside what it returns an addition with its norm keeps nothing."""
    operator, _, names = ADDING[norm]
    x = jax.ShapeDtypeStruct((8192, 2048), jnp.float32)
    parameters = [jax.ShapeDtypeStruct((2048,), jnp.float32)] * (len(names) - 2)

    def both(x, residual, cotangents, *parameters):
        outputs, pull_back = jax.vjp(operator, x, residual, *parameters)
        return outputs, pull_back(cotangents)

    compiled = jax.jit(both).lower(x, x, (x, x), *parameters).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


def test_temporary_memory_of_groups():
    x, channels = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.float32), jax.ShapeDtypeStruct((256,), jnp.float32)

    def both(x, dy, *parameters):
        y, pull_back = jax.vjp(lambda *o: group_norm(*o, num_groups=32), x, *parameters)
        return y, pull_back(dy)

    compiled = jax.jit(both).lower(x, x, channels, channels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: layer_norm(jnp.ones((2, 3), int)), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: layer_norm(1.0), ValueError, "x must have at least one axis"),
        (lambda: layer_norm(jnp.ones((2, 3)), jnp.ones(4)), ValueError, r"scale must have shape \(3,\).*got \(4,\)"),
        (lambda: layer_norm(jnp.ones((2, 3)), None, jnp.ones((2, 3))), ValueError, r"bias must have shape \(3,\)"),
        (lambda: rms_norm(jnp.ones((2, 3)), jnp.ones(3, int)), TypeError, "scale must be of a floating dtype"),
        (lambda: rms_norm(jnp.ones((2, 3)), eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
        (lambda: rms_norm(jnp.ones((2, 3)), eps=jnp.ones(())), TypeError, "eps must be a Python number"),
        (lambda: rms_norm(jnp.ones((2, 3)), scale_offset=float("nan")), ValueError, "scale_offset must be finite"),
        (lambda: rms_norm(jnp.ones((2, 3)), dtype=jnp.int32), TypeError, "dtype must be floating.*got int32"),
        (lambda: rms_norm(jnp.ones((2, 3)), dtype="float8_e5m2"), TypeError, "at least 16 bits, or int8, got float8"),
        (lambda: add_layer_norm(jnp.ones(3), jnp.ones(3), dtype="int"), TypeError, "dtype must be floating.*got int64"),
        (lambda: layer_norm(jnp.ones(3), dtype="a"), TypeError, "dtype must be floating or int8, got 'a'"),
        (lambda: rms_norm("x"), TypeError, "x must be an array, got str"),
        (lambda: add_rms_norm(jnp.ones((2, 3)), jnp.ones(3)), ValueError, r"residual must have shape \(2, 3\).*\(3,\)"),
        (lambda: add_rms_norm(jnp.ones(3), jnp.ones(3, int)), TypeError, "residual must be of a floating dtype"),
        (
            lambda: add_layer_norm(jnp.ones(3), jnp.ones(3), None, jnp.ones(2)),
            ValueError,
            r"bias must have shape \(3,\)",
        ),
        (lambda: group_norm(jnp.ones(6), num_groups=2), ValueError, r"x must have a batch axis and channels.*\(6,\)"),
        (lambda: group_norm(jnp.ones((2, 6)), num_groups=4), ValueError, "a divisor of the 6 channels of x, got 4"),
        (lambda: group_norm(jnp.ones((2, 6)), num_groups=0), ValueError, "a divisor of the 6 channels of x, got 0"),
        (lambda: group_norm(jnp.ones((2, 6)), num_groups=2.0), TypeError, "num_groups must be an int, got float"),
        (
            lambda: group_norm(jnp.ones((2, 512), jnp.float16), num_groups=1, implementation="pallas"),
            ValueError,
            "float32 or bfloat16 on a TPU.*must be at most 256 channels wide.*got groups of 512 channels",
        ),
        (lambda: rms_norm(jnp.ones((2, 3)), implementation="triton"), ValueError, "implementation must be"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
