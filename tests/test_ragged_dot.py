"""ragged_dot against a matrix of its own for every row: groups of every kind, memory, bad sizes and arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxops.ops.ragged_dot import ragged_dot
from jaxops.workbench.comparison import TRANSFORMS
from tests.compare import SOME, check, error


def plain(lhs, rhs, group_sizes, group_offset=0, lhs_rows=None, out_rows=None, out_weights=None, *, out_size=None):
    """A matrix of its own for every row, and dense matrices of zeros and ones that gather and scatter."""
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    m = lhs.shape[0] if lhs_rows is None else lhs_rows.shape[0]
    size = lhs.shape[0] if out_size is None else out_size
    ends = jnp.cumsum(jnp.maximum(group_sizes, 0))
    owner = jnp.sum(jnp.arange(m)[:, None] >= ends, axis=1) - group_offset  # which matrix of rhs
    owned = (owner >= 0) & (owner < rhs.shape[0]) & (jnp.arange(m) < ends[-1])
    pick = jnp.zeros((m, rhs.shape[0])).at[jnp.arange(m), jnp.where(owned, owner, -1)].add(owned)
    if lhs_rows is not None:
        lhs = (lhs_rows[:, None] == jnp.arange(lhs.shape[0])).astype(lhs.dtype) @ lhs
    y = jnp.einsum("mk,mg,gkn->mn", lhs, pick.astype(lhs.dtype), rhs, preferred_element_type=wide)
    if out_weights is not None:
        y = y * out_weights[:, None]
    if out_rows is not None:
        y = (jnp.arange(size)[:, None] == out_rows).astype(wide) @ y
    return y.astype(jnp.promote_types(lhs.dtype, rhs.dtype))


# k, n, sizes of the groups, rows beyond them (negative: missing), dtype
CASES = [
    (1, 1, (1,), 0, "float32"),
    (16, 129, (127, 1, 0, 300, 0, 85), 0, "float32"),
    (33, 7, (0, 40, 0), 0, "bfloat16"),
    (65, 30, (500, 3, 130), 20, "bfloat16"),  # rows beyond the groups give 0
    (20, 30, (50, 200, 130), -111, "float16"),  # the last group begins beyond the rows
    (8, 8, tuple(range(70)), 0, "float32"),
    (8, 5, (0, 0, 0), 9, "float32"),
    (8, 5, (2, -3, 4), 1, "float32"),  # a negative size counts as 0
    (8, 5, (2, 3), -5, "float32"),  # no row
    (0, 5, (2, 3), 0, "float32"),
]


def operands_of(k, n, sizes, beyond=0):
    random = np.random.default_rng(0)
    m = sum(max(size, 0) for size in sizes) + beyond
    return dict(
        lhs=random.standard_normal((m, k)),
        rhs=random.standard_normal((len(sizes), k, n)) / max(k, 1) ** 0.5,
        group_sizes=np.asarray(sizes, np.int32),
    )


@pytest.mark.optimized
@pytest.mark.parametrize(("k", "n", "sizes", "beyond", "dtype"), CASES)
def test_values_and_gradients(k, n, sizes, beyond, dtype):
    operands = operands_of(k, n, sizes, beyond)
    check(ragged_dot, plain, operands, differentiable=("lhs", "rhs"), dtype=dtype, transforms=())


def routed(tokens=24, k=5, n=7, sizes=(9, 0, 20, 11)):
    """Operands with everything fused: rows read or written more than once, rows that are not there."""
    random = np.random.default_rng(1)
    operands = operands_of(k, n, sizes)
    m = len(operands["lhs"])
    operands["lhs"] = operands["lhs"][:tokens]
    operands["lhs_rows"] = random.integers(-1, tokens + 2, m, dtype=np.int32)
    operands["out_rows"] = random.integers(-1, tokens + 2, m, dtype=np.int32)
    operands["out_weights"] = random.standard_normal(m)
    return operands


ALL = ("lhs", "rhs", "out_weights")


@pytest.mark.parametrize(
    ("left_out", "dtype", "out_size"),
    [
        ((), "float32", None),
        ((), "bfloat16", 30),
        (("lhs_rows", "out_weights"), "float32", 3),
        (("out_rows", "out_weights"), "bfloat16", None),
        (("out_rows", "lhs_rows"), "bfloat16", None),
        (("out_weights",), "float16", 24),
    ],
)
def test_gather_and_scatter(left_out, dtype, out_size):
    operands = {name: x for name, x in routed().items() if name not in left_out}
    if "lhs_rows" in left_out:
        operands["lhs"] = operands_of(5, 7, (9, 0, 20, 11))["lhs"]
    options = dict(out_size=out_size) if out_size is not None else {}
    differentiable = tuple(name for name in ALL if name in operands)
    check(ragged_dot, plain, operands, differentiable=differentiable, dtype=dtype, transforms=(), **options)


def test_tiles_of_several_groups_gathered_and_scattered():
    operands = routed(tokens=200, sizes=(300, 5, 0, 150))
    check(ragged_dot, plain, operands, differentiable=ALL, transforms=())


@pytest.mark.parametrize("table", [SOME, pytest.param(TRANSFORMS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_transforms(table):
    """By hand over devices, rows have local groups: that has a test of its own below."""
    chosen = [name for name in table if "shard_map" not in name]
    check(ragged_dot, plain, routed(), differentiable=ALL, sharded={"lhs": 0}, transforms=chosen)


@pytest.mark.parametrize("offset", [0, 2, 5, -1, 9])
def test_a_range_of_the_groups(offset):
    operands = operands_of(6, 5, (3, 0, 10, 4, 9, 2), 3)
    operands["rhs"] = operands["rhs"][:3]
    operands["group_offset"] = np.asarray(offset, np.int32)
    check(ragged_dot, plain, operands, differentiable=("lhs", "rhs"), transforms=())


def test_against_lax():
    o = {
        name: jnp.asarray(x, None if x.dtype == np.int32 else "float32")
        for name, x in operands_of(*CASES[1][:3]).items()
    }
    both = [
        jax.value_and_grad(lambda l, r, f=f: jnp.sum(jnp.sin(f(l, r, o["group_sizes"]))), (0, 1))
        for f in (ragged_dot, jax.lax.ragged_dot)
    ]
    ours, theirs = (jax.tree.leaves(f(o["lhs"], o["rhs"])) for f in both)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-5
    half = [x.astype(jnp.bfloat16) for x in (o["lhs"], o["rhs"])]
    for preferred in (None, jnp.float32):
        ours, theirs = (f(*half, o["group_sizes"], None, preferred) for f in (ragged_dot, jax.lax.ragged_dot))
        assert ours.dtype == theirs.dtype and error(ours, theirs) < 1e-2


def test_sizes_that_overflow_an_int32():
    o = operands_of(4, 3, (2, 3, 4))
    huge = jnp.array([2, 2**31 - 1, 2**31 - 1], jnp.int32)
    np.testing.assert_array_equal(
        ragged_dot(o["lhs"], o["rhs"], huge), ragged_dot(o["lhs"], o["rhs"], jnp.array([2, 7, 0]))
    )


def test_what_no_group_has_is_not_touched():
    """NaN in rows without a group, and in a matrix without rows, reach neither results nor gradients."""
    o = operands_of(4, 3, (2, 0, 4), 3)
    lhs = jnp.asarray(o["lhs"], jnp.float32).at[6:].set(jnp.nan)
    rhs = jnp.asarray(o["rhs"], jnp.float32).at[1].set(jnp.nan)
    value, gradients = jax.value_and_grad(lambda *a: ragged_dot(*a, o["group_sizes"]).sum(), (0, 1))(lhs, rhs)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert not gradients[0][6:].any() and not gradients[1][1].any()


def test_rows_over_devices_by_shard_map():
    """Every device has its own rows and group sizes; the gradient of rhs is the sum."""
    mesh, spec = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("d")
    random = np.random.default_rng(0)
    lhs, rhs = random.standard_normal((8, 10, 6), np.float32), random.standard_normal((3, 6, 4), np.float32)
    sizes = np.array([[i, 3, 7 - i] for i in range(8)], np.int32)
    local = lambda lhs, rhs, sizes: ragged_dot(lhs[0], rhs, sizes[0])[None]
    split = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec(), spec), out_specs=spec)
    want = lambda lhs, rhs, sizes: jnp.stack([plain(lhs[i], rhs, sizes[i]) for i in range(8)])
    of = lambda f: jax.jit(jax.grad(lambda lhs, rhs: jnp.sum(jnp.sin(f(lhs, rhs, sizes))), (0, 1)))(lhs, rhs)
    for a, b in zip(of(split), of(want), strict=True):
        assert error(a, b) < 1e-5


def test_a_batch_over_an_automatic_mesh():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    o = operands_of(6, 5, (8, 0, 30, 26))
    lhs = jax.device_put(jnp.asarray(o["lhs"], jnp.float32), NamedSharding(mesh, PartitionSpec("d")))
    got = jax.jit(ragged_dot)(lhs, jnp.asarray(o["rhs"], jnp.float32), o["group_sizes"])
    assert (
        error(
            jax.device_get(got),
            plain(*(jnp.asarray(o[name], jnp.float32) for name in ("lhs", "rhs")), o["group_sizes"]),
        )
        < 1e-5
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_lhs_is_never_held_once_for_every_group(gradients):
    """64 groups and 8 rows out of each of lhs: neither a copy for each group nor a gathered one."""
    t, k, n, groups, m = 1024, 512, 256, 64, 8192
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    rows = shape(m, dtype=jnp.int32)

    def f(lhs, rhs, sizes, lhs_rows, out_rows, weights):
        out = ragged_dot(lhs, rhs, sizes, lhs_rows=lhs_rows, out_rows=out_rows, out_weights=weights)
        return out.sum() if gradients else out

    program = jax.jit(jax.value_and_grad(f, (0, 1)) if gradients else f)
    lowered = program.lower(shape(t, k), shape(groups, k, n), shape(groups, dtype=jnp.int32), rows, rows, shape(m))
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    gathered = 4 * m * k
    assert temp < gathered / 2, f"{temp / 1e6:.1f} MB"


L, R, S = jnp.ones((6, 3)), jnp.ones((2, 3, 4)), jnp.array([2, 4])
I = jnp.zeros(6, jnp.int32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ragged_dot(L[0], R, S), ValueError, r"lhs must have shape \(t, k\), got \(3,\)"),
        (lambda: ragged_dot(L, R[0], S), ValueError, r"rhs must have shape \(g, 3, n\) for lhs \(6, 3\), got \(3, 4\)"),
        (lambda: ragged_dot(L, R.mT, S), ValueError, "rhs must have shape .* is it transposed"),
        (
            lambda: ragged_dot(L, R, S[:1]),
            ValueError,
            r"group_sizes must have shape \(2,\) \(the groups of rhs\), got \(1",
        ),
        (lambda: ragged_dot(L, R, S[None]), ValueError, r"group_sizes must have one axis, got shape \(1, 2\)"),
        (lambda: ragged_dot(L, R, S * 1.0), TypeError, "group_sizes must be of an integer dtype, got float32"),
        (lambda: ragged_dot(I[:, None], R[:, :1], S), TypeError, "lhs must be of a floating dtype, got int32"),
        (lambda: ragged_dot(L, R, S, group_offset=S), ValueError, r"group_offset must have shape \(\)"),
        (lambda: ragged_dot(L, R, S, None, jnp.int32), TypeError, "preferred_element_type must be a floating dtype"),
        (lambda: ragged_dot(L, R, S, lhs_rows=L), ValueError, "lhs_rows must have one axis"),
        (lambda: ragged_dot(L, R, S, lhs_rows=L[:, 0]), TypeError, "lhs_rows must be of an integer dtype, got float32"),
        (
            lambda: ragged_dot(L, R, S, out_rows=I[:5]),
            ValueError,
            r"out_rows must have shape \(6,\) \(one for each row of",
        ),
        (lambda: ragged_dot(L, R, S, out_weights=I), TypeError, "out_weights must be of a floating dtype, got int32"),
        (lambda: ragged_dot(L, R, S, out_weights=L[:2, 0]), ValueError, r"out_weights must have shape \(6,\)"),
        (lambda: ragged_dot(L, R, S, out_size=4), ValueError, "out_size must be None without out_rows, got 4"),
        (lambda: ragged_dot(L, R, S, out_rows=I, out_size=4.0), TypeError, "out_size must be a Python int, got float"),
        (lambda: ragged_dot(L, R, S, out_rows=I, out_size=-1), ValueError, "out_size must be at least 0, got -1"),
        (lambda: ragged_dot(L, R, S, implementation="cuda"), ValueError, "implementation must be"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
