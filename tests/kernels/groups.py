"""What the tests of the ragged_dot kernels share: problems, and the results of a matrix for each group of rows."""

import itertools

import jax.numpy as jnp
import numpy as np

f32 = jnp.float32
OPTIONAL = ("lhs_rows", "out_rows", "out_weights")


def dense(lhs, rhs, bounds, g, lhs_rows, out_rows, out_weights, out_size, xp):
    """out and the gradients by name, with the rows of each group multiplied on their own; float32 sums or wider."""
    wide = np.float64 if xp is np else f32
    dot = np.matmul if xp is np else lambda a, b: jnp.matmul(a, b, preferred_element_type=f32)
    put = lambda size, rows, x: xp.asarray(np.arange(size)[:, None] == rows, wide) @ x  # adds rows of x up
    if xp is np:
        lhs, rhs, g = (np.asarray(a, np.float64) for a in (lhs, rhs, g))
    m = lhs.shape[0] if lhs_rows is None else len(lhs_rows)
    take = lambda x, rows: x if rows is None else xp.asarray(rows[:, None] == np.arange(len(x)), x.dtype) @ x
    x, dy = take(lhs, lhs_rows), take(g, out_rows)
    y, u = xp.zeros((m, rhs.shape[2]), wide), xp.zeros((m, rhs.shape[1]), wide)
    w = 1 if out_weights is None else xp.asarray(out_weights, wide)[:, None]
    weighted = dy if out_weights is None else (xp.asarray(dy, wide) * w).astype(lhs.dtype)
    drhs = []
    for group, (low, high) in enumerate(itertools.pairwise(bounds)):
        inside = xp.asarray(((np.arange(m) >= low) & (np.arange(m) < high))[:, None])
        y = xp.where(inside, dot(x, rhs[group]), y)
        u = xp.where(inside, dot(dy, rhs[group].T), u)
        drhs.append(dot(xp.where(inside, x, 0).T, weighted))
    out = y * w
    out = out if out_rows is None else put(out_size, out_rows, out)
    found = {"out": out, "rhs": xp.stack(drhs)}
    found["lhs"] = u * w if lhs_rows is None else put(len(lhs), lhs_rows, u * w)
    if out_weights is not None:
        found["out_weights"] = (u * xp.asarray(x, wide)).sum(1)
    return found


def data(m, k, n, sizes, dtype, seed=0):
    random = np.random.default_rng(seed)
    lhs, g = random.standard_normal((m, k)), random.standard_normal((m, n))
    rhs = random.standard_normal((len(sizes), k, n)) / k**0.5
    bounds = np.minimum(np.cumsum([0, *sizes]), m)
    made = dict(lhs=jnp.asarray(lhs, dtype), rhs=jnp.asarray(rhs, dtype), bounds=jnp.asarray(bounds, jnp.int32))
    return made, jnp.asarray(g, dtype)


def check(got, operands, g, out_size=None):
    """The error of each result is at most twice the unfused one, plus four float32 roundings of its largest entry."""
    given = {name: None if name not in operands else np.asarray(operands[name]) for name in OPTIONAL}
    args = (operands["lhs"], operands["rhs"], np.asarray(operands["bounds"]), g, *given.values(), out_size)
    exact, plain = dense(*args, np), dense(*args, jnp)
    assert got.keys() <= exact.keys()
    for name in got:
        want = exact[name]
        dtype = operands[name].dtype if name in operands else operands["lhs"].dtype
        assert got[name].dtype == dtype and got[name].shape == want.shape, name
        unfused = np.asarray(plain[name].astype(dtype), np.float64)
        error, peer = (np.abs(a - want).max() for a in (np.asarray(got[name], np.float64), unfused))
        atol = 4 * float(jnp.finfo(f32).eps) * (1 + np.abs(want).max())
        assert error <= 2 * peer + atol, f"{name}: error {error:.3g}, unfused {peer:.3g}"
