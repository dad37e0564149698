"""layer_norm and rms_norm against their references, Flax's modules, and what they may communicate and allocate."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops.ops.layer_norm import layer_norm
from jaxops.ops.rms_norm import rms_norm
from jaxops.reference.layer_norm import layer_norm as layer_norm_reference
from jaxops.reference.rms_norm import rms_norm as rms_norm_reference
from tests.compare import check, error

NORMS = {
    "layer_norm": (layer_norm, layer_norm_reference, ("x", "scale", "bias")),
    "rms_norm": (rms_norm, rms_norm_reference, ("x", "scale")),
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


def operands_of(shape, seed=0):
    random = np.random.default_rng(seed)
    x = 3 + 2 * random.standard_normal(shape)
    return dict(x=x, scale=random.standard_normal(shape[-1:]), bias=random.standard_normal(shape[-1:]))


def chosen(norm, shape):
    operator, reference, names = NORMS[norm]
    return operator, reference, {name: x for name, x in operands_of(shape).items() if name in names}, names


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "dtype", "static"), CASES, ids=str)
def test_values_and_gradients(norm, shape, dtype, static):
    operator, reference, operands, names = chosen(norm, shape)
    check(operator, reference, operands, differentiable=names, dtype=dtype, transforms=(), **static)


@pytest.mark.parametrize("norm", NORMS)
def test_transforms(norm):
    operator, reference, operands, names = chosen(norm, (16, 24))
    check(operator, reference, operands, differentiable=names, sharded={"x": 0}, **PLAIN)


def test_against_flax():
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((5, 40)).items()}
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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 256, 512), ("d",)),
        ((4096, 256), ("d",)),
        ((4, 1024, 256), (None, "d")),
        ((4, 512, 8, 128), (None, None, "d")),
    ],
    ids=str,
)
def test_rows_over_devices_stay_local(norm, shape, spec):
    """Over automatically partitioned rows the backward sums its parameter gradients and communicates nothing else."""
    operator, _, names = NORMS[norm]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, PartitionSpec(*spec))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
    parameters = [jax.ShapeDtypeStruct(shape[-1:], jnp.float32, sharding=everywhere)] * (len(names) - 1)

    def loss(x, *parameters):
        return jnp.sum(jnp.square(operator(x, *parameters)))

    compiled = jax.jit(jax.grad(loss, tuple(range(len(names))))).lower(x, *parameters).compile()
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
        (lambda: rms_norm("x"), TypeError, "x must be an array, got str"),
        (lambda: rms_norm(jnp.ones((2, 3)), implementation="triton"), ValueError, "implementation must be"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
