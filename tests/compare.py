"""One call that compares an operator with its reference: values, each gradient by name, each transform, with float64.

    check(operator, reference, operands, differentiable=("x", "scale"), sharded={"x": 0}, eps=1e-6)

`operator(**operands, **static)` gives the differentiable output (an array or a tuple that begins with it); so does
`reference`, in plain JAX, which serves twice: in float64 as the oracle, and in the operands' own dtype as the unfused
form whose error is the yardstick:

    error(operator) ≤ 2 · error(unfused) + slack,      error(a) = ‖a - oracle‖ / ‖oracle‖

and of the worst entry, which is more a matter of luck, max|a - oracle| / max|oracle| ≤ 4 · that of unfused + 2 · slack.
`slack` is what rounding the result alone may cost: half a unit in the last place of a 16-bit type, a few of float32,
where the order of a sum decides.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Arrays = dict[str, jax.Array]
DEVICES = 8


def check(
    operator: Callable,
    reference: Callable,
    operands: Mapping[str, np.ndarray],
    *,
    differentiable: Sequence[str],
    sharded: Mapping[str, int] | None = None,
    dtype: str = "float32",
    transforms: Sequence[str] | None = None,
    **static,
) -> None:
    """Raises AssertionError naming the output, the gradient or the transform that differs.

    operands: NumPy arrays; floating ones are cast to `dtype`.
    sharded: for the transforms over devices, the axis of each operand that is split over 8 devices (its size a multiple
      of 8); operands not named stay whole.
    transforms: names from `TRANSFORMS`, default all (those over devices only if `sharded` is given).
    """
    low = {name: _cast(x, dtype) for name, x in operands.items()}
    weights = _weights(jax.eval_shape(lambda: _first(reference(**low, **static))))
    problem = _Problem(
        functools.partial(_call, operator, static), low, tuple(differentiable), weights, dict(sharded or {})
    )
    plain = dataclasses.replace(problem, function=functools.partial(_call, reference, static))
    _first_order(problem, plain, operands, dtype)
    chosen = TRANSFORMS if transforms is None else {name: TRANSFORMS[name] for name in transforms}
    for name, transform in chosen.items():
        if name in OVER_DEVICES and not sharded:
            continue
        baseline = WITHOUT_DEVICES.get(name, transform)  # the reference on one device is what every mesh must reproduce
        got, want = transform(problem), baseline(plain)
        _close(f"transform {name}", got, want, 64 * float(jnp.finfo(dtype).eps))


def error(got, oracle, norm: float = np.inf) -> float:
    """‖got - oracle‖ / ‖oracle‖ in the maximum norm, or the Euclidean one (2). NaN counts as infinite.

    Entries of the test data are of size one: an oracle below a thousandth of that (a sum that cancels) counts as that
    thousandth.
    """
    got, oracle = np.asarray(got, np.float64).ravel(), np.asarray(oracle, np.float64).ravel()
    if got.size == 0:
        return 0.0
    distance, floor = np.linalg.norm(got - oracle, norm), 1e-3 * np.linalg.norm(np.ones(got.size), norm)
    return float(distance / max(np.linalg.norm(oracle, norm), floor)) if np.isfinite(distance) else float("inf")


def no_worse(name: str, got, unfused, oracle, dtype) -> None:
    """Raises AssertionError unless `got` is as near to `oracle` as the head of this file says."""
    eps = float(jnp.finfo(dtype).eps)
    slack = eps / 2 if jnp.dtype(dtype).itemsize == 2 else 4 * eps
    for norm, factor in ((2, 1), (np.inf, 2)):
        mine, yardstick = error(got, oracle, norm), error(unfused, oracle, norm)
        allowed = factor * (2 * yardstick + slack)
        assert mine <= allowed, (
            f"{name} ({dtype}), norm {norm}: error {mine:.2e}, allowed {allowed:.2e}, unfused {yardstick:.2e}"
        )


def _first_order(problem: "_Problem", plain: "_Problem", operands, dtype) -> None:
    """The value and each gradient against the float64 oracle."""
    with jax.enable_x64(True):
        exact = dataclasses.replace(
            plain, operands={name: _cast(np.asarray(x), "float64") for name, x in problem.operands.items()}
        )
        want = {"value": np.asarray(exact.value()), **{n: np.asarray(g) for n, g in exact.gradients().items()}}
    got = {"value": jax.jit(problem.value)(), **jax.jit(problem.gradients)()}
    unfused = {"value": plain.value(), **plain.gradients()}
    for name in want:
        like = unfused[name]
        assert got[name].shape == like.shape, f"{name}: expected shape {like.shape}, got {got[name].shape}"
        assert got[name].dtype == like.dtype, f"{name}: expected dtype {like.dtype}, got {got[name].dtype}"
        no_worse(name, got[name], like, want[name], dtype)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A scalar function of named operands: Σ weights · sin(first output)."""

    function: Callable
    operands: Arrays
    differentiable: tuple[str, ...]
    weights: np.ndarray
    sharded: dict[str, int]

    def value(self) -> jax.Array:
        return self.function(self.operands)

    def primals(self) -> Arrays:
        return {name: self.operands[name] for name in self.differentiable}

    def loss(self, primals: Arrays, others: Arrays | None = None, weights=None) -> jax.Array:
        out = self.function({**self.operands, **(others or {}), **primals})
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        weights = jnp.asarray(self.weights if weights is None else weights, wide.dtype)
        return jnp.sum(jnp.sin(wide) * weights)

    def gradients(self) -> Arrays:
        return jax.grad(self.loss)(self.primals())


def _call(function, static, operands):
    return _first(function(**operands, **static))


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _cast(x, dtype):
    return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)


def _weights(shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape.shape)


def _close(what: str, got, want, tolerance: float) -> None:
    flat_got, flat_want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert len(flat_got) == len(flat_want), f"{what}: {len(flat_got)} results, expected {len(flat_want)}"
    for (path, a), (_, b) in zip(flat_got, flat_want, strict=True):
        assert a.shape == b.shape, f"{what}{jax.tree_util.keystr(path)}: shape {a.shape}, expected {b.shape}"
        difference = error(jax.device_get(a), jax.device_get(b))
        assert difference <= tolerance, (
            f"{what}{jax.tree_util.keystr(path)}: differs by {difference:.2e}, allowed {tolerance:.1e}"
        )


# ---- transforms: each takes a problem and gives a tree of arrays ---------------------------------------------------


def _direction(p: _Problem) -> Arrays:
    return {name: jnp.cos(3 * x.astype(jnp.float32)).astype(x.dtype) for name, x in p.primals().items()}


def _two_directions(p: _Problem) -> Arrays:
    return jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), p.primals())


def _hessian_vector(p: _Problem):
    return jax.jit(lambda x: jax.jvp(jax.grad(p.loss), (x,), (_direction(p),))[1])(p.primals())


def _grad_of_grad(p: _Problem):
    def norm(x):
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(jax.grad(p.loss)(x)))

    return jax.jit(jax.grad(norm))(p.primals())


def _vmap_first_only(p: _Problem):
    first = p.differentiable[0]
    rest = {n: x for n, x in p.primals().items() if n != first}
    mapped = jax.vmap(jax.grad(lambda x: p.loss({first: x, **rest})))
    return jax.jit(mapped)(_two_directions(p)[first])


def _grad_of_vmap(p: _Problem):
    first = p.differentiable[0]

    def total(x, xs):
        return jax.vmap(lambda one: p.loss({**x, first: one}))(xs).sum()

    return jax.jit(jax.grad(total, (0, 1)))(p.primals(), _two_directions(p)[first])


def _scan(p: _Problem):
    def step(x, _):
        return jax.tree.map(lambda x, g: (x - 0.01 * g).astype(x.dtype), x, jax.grad(p.loss)(x)), p.loss(x)

    return jax.jit(lambda x: lax.scan(step, x, None, length=2))(p.primals())


def _grad_of_scan(p: _Problem):
    def total(x):
        return lax.scan(lambda c, _: (c + p.loss(x), None), jnp.zeros(()), None, length=2)[0]

    return jax.jit(jax.grad(total))(p.primals())


def _specs(p: _Problem, axes: tuple[str, ...] = ("d",)) -> dict[str, PartitionSpec]:
    return {
        name: PartitionSpec(*[axes if i == p.sharded.get(name) else None for i in range(x.ndim)])
        for name, x in p.operands.items()
    }


def _by_hand(p: _Problem, kind: AxisType):
    """shard_map over all devices, every operand split or replicated; the local losses are summed."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    specs = _specs(p)
    axis = p.sharded[p.differentiable[0]]
    split_weights = PartitionSpec(*["d" if i == axis else None for i in range(p.weights.ndim)])

    def local(primals, others, weights):
        return lax.psum(p.loss(primals, others, weights), "d")

    others = {name: x for name, x in p.operands.items() if name not in p.differentiable}
    pick = lambda names: {name: specs[name] for name in names}
    f = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(pick(p.differentiable), pick(others), split_weights),
        out_specs=PartitionSpec(),
        check_vma=True,
    )
    place = lambda tree: {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}
    weights = jax.device_put(jnp.asarray(p.weights, jnp.float32), NamedSharding(mesh, split_weights))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(f))(place(p.primals()), place(others), weights)


def _partitioned(p: _Problem, kind: AxisType):
    """jit over a mesh that JAX partitions itself (Auto) or whose shardings are in the types (Explicit)."""
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(kind, kind))
    specs = _specs(p, ("d", "e"))
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in p.operands.items()}
        split = {n: placed[n] for n in p.differentiable}
        others = {n: x for n, x in placed.items() if n not in p.differentiable}
        shape = jax.eval_shape(lambda x, o: p.function({**x, **o}), split, others)
        spec = shape.sharding.spec if kind == AxisType.Explicit else PartitionSpec()
        weights = jax.device_put(jnp.asarray(p.weights, jnp.float32), NamedSharding(mesh, spec))
        return jax.jit(jax.value_and_grad(p.loss))(split, others, weights)


TRANSFORMS: dict[str, Callable[[_Problem], object]] = {
    "jit": lambda p: jax.jit(p.value)(),
    "grad": lambda p: jax.grad(p.loss)(p.primals()),
    "linearize": lambda p: jax.linearize(p.loss, p.primals())[1](_direction(p)),
    "jvp": lambda p: jax.jit(lambda x, t: jax.jvp(p.loss, (x,), (t,)))(p.primals(), _direction(p)),
    "vmap": lambda p: jax.jit(jax.vmap(p.loss))(_two_directions(p)),
    "vmap of grad": lambda p: jax.jit(jax.vmap(jax.grad(p.loss)))(_two_directions(p)),
    "vmap of grad, first operand only": _vmap_first_only,
    "grad of vmap": _grad_of_vmap,
    "grad of grad": _grad_of_grad,
    "hessian-vector product": _hessian_vector,
    "checkpoint": lambda p: jax.jit(jax.grad(jax.checkpoint(p.loss)))(p.primals()),
    "scan": _scan,
    "grad of scan": _grad_of_scan,
    "shard_map, Auto mesh": lambda p: _by_hand(p, AxisType.Auto),
    "shard_map, Explicit mesh": lambda p: _by_hand(p, AxisType.Explicit),
    "jit, Auto mesh": lambda p: _partitioned(p, AxisType.Auto),
    "jit, Explicit mesh": lambda p: _partitioned(p, AxisType.Explicit),
}
OVER_DEVICES = tuple(name for name in TRANSFORMS if "mesh" in name)
WITHOUT_DEVICES = {name: lambda p: jax.jit(jax.value_and_grad(p.loss))(p.primals()) for name in OVER_DEVICES}
