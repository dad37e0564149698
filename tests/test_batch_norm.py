"""batch_norm and instance_norm: against float64 and Flax's, with masks, given statistics and statistics of devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxops
from jaxops.ops.batch_norm import batch_norm
from jaxops.ops.group_norm import instance_norm
from jaxops.reference.batch_norm import batch_norm as reference
from jaxops.reference.group_norm import group_norm
from jaxops.workbench.comparison import TRANSFORMS, against_float64
from tests.compare import check, error, some_and_all

NAMES = ("x", "scale", "bias")
CASES = [  # shape of x, dtype
    pytest.param((7,), "float32", marks=pytest.mark.slow),
    ((3, 9, 11, 129), "bfloat16"),
    pytest.param((127, 129), "float32", marks=pytest.mark.slow),
    pytest.param((2, 3, 5, 7, 8), "float16", marks=pytest.mark.slow),
]


def operands_of(shape, seed=0):
    random = np.random.default_rng(seed)
    x = 3 + 2 * random.standard_normal(shape)
    return dict(x=x, scale=random.standard_normal(shape[-1:]), bias=random.standard_normal(shape[-1:]))


def in_float32(shape, seed=0):
    return {name: jnp.asarray(x, jnp.float32) for name, x in operands_of(shape, seed).items()}


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_gradients(shape, dtype):
    # One number for a channel: its variance is 0, and so is every gradient of y.
    options = dict(differentiable=NAMES, dtype=dtype, transforms=(), eps=1e-3)
    check(batch_norm, reference, operands_of(shape), outputs=3, **options)


@some_and_all
def test_transforms(transforms):
    """Over devices shard_map takes the statistics of its part, which is another function: those are tested below."""
    chosen = [name for name in transforms or TRANSFORMS if not name.startswith("shard_map")]
    options = dict(differentiable=NAMES, sharded={"x": 0}, transforms=chosen, outputs=3, eps=1e-3)
    check(batch_norm, reference, operands_of((8, 3, 2, 12)), **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_only_y_is_used(dtype):
    operands = {name: jnp.asarray(x, dtype) for name, x in operands_of((40, 5)).items()}
    rows = against_float64(lambda **operands: batch_norm(**operands)[0], operands)
    assert len(rows) == 4 and all(row.holds for row in rows), list(map(str, rows))


def test_instance_norm():
    o = operands_of((3, 5, 7, 12))
    plain = lambda x, scale, bias, *, eps: group_norm(x, scale, bias, num_groups=12, eps=eps)
    check(instance_norm, plain, o, differentiable=NAMES, transforms=(), eps=1e-5)
    o = in_float32((3, 5, 7, 12))
    theirs = nn.InstanceNorm(use_fast_variance=False)
    theirs = theirs.apply({"params": {"scale": o["scale"], "bias": o["bias"]}}, o["x"])
    assert error(instance_norm(**o), theirs) < 1e-5
    assert instance_norm(jnp.ones((2, 3, 0))).shape == (2, 3, 0)


MASKS = {
    "positions": ((4, 5, 1), 0.5),
    "whole": ((4, 5, 6), 0.5),
    "batch": ((4, 1, 1), 0.5),
    "nothing": ((4, 5, 6), 0.0),
}


def flax_batch_norm(o, **call):
    """(y, mean, var) of Flax's layer."""
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=False)
    channels = o["x"].shape[-1:]
    variables = {
        "params": {"scale": o["scale"], "bias": o["bias"]},
        "batch_stats": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)},
    }
    y, new = layer.apply(variables, o["x"], mutable=["batch_stats"], **call)
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


@pytest.mark.parametrize(
    "case", [name if name == "nothing" else pytest.param(name, marks=pytest.mark.slow) for name in MASKS]
)
def test_masks(case):
    """As Flax's, with its gradients; where nothing is seen the statistics are 0, not NaN."""
    shape, share = MASKS[case]
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < share)
    o = in_float32((4, 5, 6))
    if case == "nothing":
        y, mean, var = batch_norm(**o, mask=mask)
        assert not mean.any() and not var.any() and jnp.isfinite(y).all()
        return
    loss = lambda f: lambda o: sum(jnp.sum(jnp.sin(a)) for a in f(o))
    ours, theirs = lambda o: batch_norm(**o, mask=mask), lambda o: flax_batch_norm(o, mask=mask)
    found, wanted = (jax.jit(lambda o, f=f: (f(o), jax.grad(loss(f))(o)))(o) for f in (ours, theirs))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(got, want) < 1e-5
    hidden = jnp.where(mask, o["x"], jnp.nan)  # what is masked does not count
    assert all(jnp.isfinite(s).all() for s in batch_norm(**o | {"x": hidden}, mask=mask)[1:])


def test_given_statistics():
    o = in_float32((4, 5, 6))
    mean, var = jnp.arange(6.0), jnp.linspace(0.5, 3, 6)
    got = batch_norm(**o, mean=mean, var=var)
    want = (o["x"] - mean) / jnp.sqrt(var + 1e-5) * o["scale"] + o["bias"]
    assert error(got, want) < 1e-6
    low = batch_norm(o["x"].astype(jnp.bfloat16), mean=mean, var=var)
    assert low.dtype == jnp.bfloat16 and error(low, (o["x"] - mean) / jnp.sqrt(var + 1e-5)) < 1e-2


def test_a_large_mean_does_not_cancel():
    x = np.float32(np.random.default_rng(0).standard_normal((100, 4)) + 1e4)
    exact = np.float64(x) - np.float64(x).mean(0)
    exact /= np.sqrt((exact**2).mean(0) + 1e-5)
    assert error(batch_norm(x)[0], exact) < 1e-3
    assert error(batch_norm(x, mask=jnp.ones((100, 1), bool))[0], exact) < 1e-3


def test_nothing_to_normalise():
    y, mean, var = batch_norm(jnp.ones((0, 5)))
    assert y.shape == (0, 5) and not mean.any() and not var.any()
    assert batch_norm(jnp.ones((3, 0)))[0].shape == (3, 0)


@pytest.mark.parametrize(("axes", "masked"), [pytest.param(("d",), False, marks=pytest.mark.slow), (("d", "e"), True)])
def test_over_devices(axes, masked):
    """y, statistics and every gradient are those of the whole batch on one device."""
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    o = in_float32((16, 3, 5))
    mask = jnp.asarray(np.random.default_rng(2).random((16, 3, 1)) < 0.4) if masked else None
    weights = jnp.asarray(np.random.default_rng(3).standard_normal((16, 3, 5)), jnp.float32)

    def loss(x, scale, bias, mask, weights, axis_name):
        y, mean, var = batch_norm(x, scale, bias, mask=mask, axis_name=axis_name)
        total = jnp.sum(jnp.sin(y) * weights)
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        return total + jnp.sum(jnp.cos(mean) + jnp.sin(var)), (y, mean, var)

    over = P(axes)

    def split(x, scale, bias):
        local = jax.shard_map(
            lambda *a: loss(*a, axes if len(axes) > 1 else axes[0]),
            mesh=mesh,
            in_specs=(over, P(), P(), over, over),
            out_specs=(P(), (over, P(), P())),
            check_vma=True,
        )
        return local(x, scale, bias, mask, weights)

    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(split, (0, 1, 2), has_aux=True))(*o.values())
    want = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=5)(
        *o.values(), mask, weights, None
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(jax.device_get(a), b) < 1e-5


def test_over_a_vmap_with_a_name():
    o = in_float32((16, 3, 5))
    parts = o["x"].reshape(4, 4, 3, 5)
    y, mean, _ = jax.vmap(lambda x: batch_norm(x, o["scale"], o["bias"], axis_name="b"), axis_name="b")(parts)
    want = batch_norm(**o)
    assert error(y.reshape(16, 3, 5), want[0]) < 1e-5 and error(mean, jnp.broadcast_to(want[1], (4, 5))) < 1e-5


def test_backward_saves_only_the_statistics():
    """Of the joined form too: x itself, and nothing else of its size."""
    x = jnp.ones((64, 32))
    for options in ({}, {"mask": jnp.ones((64, 1), bool)}):
        _, pull_back = jax.vjp(lambda x, options=options: batch_norm(x, **options)[0], x)
        large = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size == x.size]
        assert len(large) <= 2  # x and, of the operator, y


BAD = [
    (lambda: batch_norm(jnp.ones((3, 4), int)), TypeError, "x must be of a floating dtype, got int32"),
    (lambda: batch_norm(jnp.ones((3, 4)), jnp.ones(3)), ValueError, r"scale must have shape \(4,\).*got \(3,\)"),
    (lambda: batch_norm(jnp.ones((3, 4)), mean=jnp.ones(4)), ValueError, "both or none, got mean"),
    (
        lambda: batch_norm(jnp.ones((3, 4)), mean=jnp.ones(4), var=jnp.ones(4), axis_name="d"),
        ValueError,
        "mask and axis_name say",
    ),
    (lambda: batch_norm(jnp.ones((3, 4)), mask=jnp.ones((3, 4))), TypeError, "mask must be boolean, got float32"),
    (
        lambda: batch_norm(jnp.ones((3, 4)), mask=jnp.ones((2, 4), bool)),
        ValueError,
        r"mask must broadcast to \(3, 4\)",
    ),
    (lambda: batch_norm(jnp.ones((3, 4)), eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    (
        lambda: batch_norm(jnp.ones((3, 4)), mask=jnp.ones((3, 4), bool), implementation="pallas"),
        ValueError,
        "no kernel has a mask or axis_name",
    ),
    (lambda: instance_norm(jnp.ones(4)), ValueError, r"x must have a batch axis and channels, got shape \(4,\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_the_kernel_serves_tpu():
    x = jnp.ones((8, 3, 24))
    told = jaxops.explain(jax.grad(lambda x: batch_norm(x)[0].sum()), x, target="v5e")
    assert [line.implementation for line in told.lines] == ["pallas", "pallas"]
