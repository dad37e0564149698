"""How a function of arrays is compared with what it means: output, each gradient by name, each transform, in float64.

    check(operator, reference, operands, differentiable=("x", "scale"), sharded={"x": 0}, eps=1e-6)
    against_float64(function_that_calls_operators, operands)

Both need three functions of the same operands: the one in question; the *oracle*, its meaning in float64; and the
*unfused form*, the same meaning in plain JAX in the operands' own dtype, whose error is the yardstick:

    error(function) ≤ 2 · error(unfused) + slack,      error(a) = ‖a - oracle‖ / ‖oracle‖

and of the worst entry, which is more a matter of luck, max|a - oracle| / max|oracle| ≤ 4 · that of unfused + 2 · slack.
`slack` is what rounding the result alone may cost: half a unit in the last place of a 16-bit type, a few of float32,
where the order of a sum decides.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops import autodiff, inspection

Arrays = dict[str, jax.Array]
DEVICES = 8
NEIGHBOURS = 15


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: of an output, of a gradient, or of everything under a transform.

    `error` and `unfused` are relative, `allowed` is what `error` may be; `why` says what is wrong where that is not a
    matter of errors (a shape, a dtype, an exception).
    """

    name: str
    error: float
    unfused: float
    allowed: float
    why: str = ""

    @property
    def holds(self) -> bool:
        return not self.why and self.error <= self.allowed

    def __str__(self) -> str:
        if self.why:
            return f"{self.name}: {self.why}"
        return f"{self.name}: error {self.error:.2e}, allowed {self.allowed:.2e}, unfused {self.unfused:.2e}"


def check(
    operator: Callable,
    reference: Callable,
    operands: Mapping[str, np.ndarray],
    *,
    differentiable: Sequence[str],
    sharded: Mapping[str, int] | None = None,
    dtype: str = "float32",
    transforms: Sequence[str] | None = None,
    outputs: int = 1,
    **static: Any,
) -> None:
    """Raises AssertionError naming the output, the gradient or the transform that differs.

    `operator(**operands, **static)` gives the differentiable output (an array or a tuple that begins with it), or
    so many `outputs`; so does `reference`, in plain JAX, which serves as the oracle and as the unfused form.

    operands: NumPy arrays; floating ones are cast to `dtype`.
    sharded: for the transforms over devices, the axis of each operand that is split over 8 devices (its size a multiple
      of 8); operands not named stay whole.
    transforms: names from `TRANSFORMS`, default all (those over devices only if `sharded` is given).
    """
    low = {name: _cast(x, dtype) for name, x in operands.items()}
    plain = Problem.of(_leading(outputs, reference, static), low, differentiable, sharded)
    problem = dataclasses.replace(plain, function=_leading(outputs, operator, static))
    for row in first_order(problem, plain, dtype=dtype):
        assert row.holds, f"{row} ({dtype})"
    chosen = TRANSFORMS if transforms is None else transforms
    for name in chosen:
        if name not in OVER_DEVICES or sharded:
            row = transformed(name, problem, plain, dtype)
            assert row.holds, str(row)


def against_float64(
    function: Callable,
    operands: Mapping[str, Any],
    differentiable: Sequence[str] | None = None,
    within: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> list[Row]:
    """Every floating output of `function(**operands)`, and every gradient by name, against float64.

    The oracle is `function` with each operator replaced by its reference (`autodiff.by_reference`), in float64; the
    unfused form is the same in the operands' own dtypes. A function that calls no operator has none but itself: its
    yardstick is itself in float32, rounded once, so that float32 operands prove only what float64 shows.

    differentiable: the operands to take gradients of; None: all floating ones.
    within: makes a context in which `function` runs outside `jax.jit`, for kernels in the interpreter.
    """
    given, plain = problems(function, operands, differentiable)
    return first_order(given, plain, neighbours=NEIGHBOURS, within=within)


def problems(
    function: Callable,
    operands: Mapping[str, Any],
    differentiable: Sequence[str] | None = None,
    sharded: Mapping[str, int] | None = None,
) -> tuple["Problem", "Problem"]:
    """(the problem that `function` poses, the same by reference)."""
    arrays = {name: jnp.asarray(x) for name, x in operands.items()}
    floating = tuple(name for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating))
    chosen = floating if differentiable is None else tuple(differentiable)

    def plain(operands: Arrays) -> Arrays:
        with autodiff.by_reference():
            return outputs_of(function(**operands))

    by_reference = Problem.of(plain, arrays, chosen, sharded)
    given = dataclasses.replace(by_reference, function=lambda operands: outputs_of(function(**operands)))
    if not calls_operators(function, arrays):
        by_reference = dataclasses.replace(by_reference, in_float32=True)
    return given, by_reference


def calls_operators(function: Callable, operands: Mapping[str, Any]) -> bool:
    """Whether an `Operator` is anywhere in the trace of `function(**operands)`."""
    traced = jax.make_jaxpr(lambda operands: outputs_of(function(**operands)))(dict(operands))
    return any(True for _ in inspection.operator_calls(traced.jaxpr))


def outputs_of(tree: Any) -> Arrays:
    """The floating arrays of what a function returned, by name: "output", or "output[0]" where there are several."""
    leaves = [
        (path, jnp.asarray(x))
        for path, x in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    return {f"output{jax.tree_util.keystr(path)}": x for path, x in leaves}


def error(got: Any, oracle: Any, norm: float = np.inf, natural: float = 0.0) -> float:
    """‖got - oracle‖ / ‖oracle‖ in the maximum norm, or the Euclidean one (2). NaN counts as infinite.

    Entries of the test data are of size one: an oracle below a thousandth of that (a sum that cancels) counts as that
    thousandth. One below a thousandth of `natural`, the norm that its terms would have, counts as `natural`.
    """
    got, oracle = np.asarray(got, np.float64).ravel(), np.asarray(oracle, np.float64).ravel()
    if got.size == 0:
        return 0.0
    same = got == oracle  # also an infinity that is due
    distance = np.linalg.norm(np.where(same, 0, got - np.where(same, 0, oracle)), norm)
    floor = 1e-3 * np.linalg.norm(np.ones(got.size), norm)
    length = float(np.linalg.norm(np.where(np.isinf(oracle), 0, oracle), norm))
    if length < 1e-3 * natural:
        length = natural
    return float(distance / max(length, floor)) if np.isfinite(distance) else float("inf")


def no_worse(name: str, got: Any, unfused: Any, oracle: Any, dtype: Any) -> None:
    """Raises AssertionError unless `got` is as near to `oracle` as the head of this file says."""
    row = judge(name, got, [(unfused, oracle)], dtype)
    assert row.holds, f"{row} ({dtype})"


def judge(name: str, got: Any, yardsticks: Sequence[tuple[Any, Any]], dtype: Any, natural: float = 0.0) -> Row:
    """The comparison of `got` with the oracle in the norm in which it does worse.

    yardsticks: pairs of an unfused form and its oracle; the first is of the same operands as `got`, and the worst
      counts. natural: the Euclidean norm that the terms of the result would have, as in `error`.
    """
    like, oracle = yardsticks[0]
    if got.shape != like.shape:
        return Row(name, math.inf, 0, 0, f"expected shape {like.shape}, got {got.shape}")
    if got.dtype != like.dtype:
        return Row(name, math.inf, 0, 0, f"expected dtype {like.dtype}, got {got.dtype}")
    eps = float(jnp.finfo(dtype).eps)
    slack = eps / 2 if jnp.dtype(dtype).itemsize == 2 else 4 * eps
    rows = []
    for norm, factor in ((2, 1), (np.inf, 2)):
        scale = natural if norm == 2 else natural / max(got.size, 1) ** 0.5
        unfused = max(error(plain, exact, norm, scale) for plain, exact in yardsticks)
        mine = error(got, oracle, norm, scale)
        rows.append(Row(name, mine, unfused, factor * (2 * unfused + slack)))
    return max(rows, key=lambda row: row.error / row.allowed if row.allowed < math.inf else 0.0)


def first_order(
    problem: "Problem",
    plain: "Problem",
    dtype: Any = None,
    neighbours: int = 0,
    within: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> list[Row]:
    """The outputs and each gradient against the float64 oracle.

    dtype: whose rounding is the slack; None: the narrowest of the floating operands.
    neighbours: how many more operands, a hundredth from these, the unfused form is tried on where the comparison fails:
      its error on a few numbers is a matter of luck, and where all terms of a gradient cancel it may be none.
    within: as in `against_float64`.
    """
    dtype = dtype or narrowest(problem.operands)
    if within is None:
        got = problem.compiled(problem.operands)
    else:
        with within():
            got = problem.results()
    yardsticks = [(plain.unfused(), plain.exact())]
    missing = [name for name in yardsticks[0][1] if name not in got]
    assert not missing, f"the function gives no {missing[0]}"
    rows = [judge(name, got[name], [(u[name], e[name]) for u, e in yardsticks], dtype) for name in yardsticks[0][1]]
    if all(row.holds or row.why for row in rows):
        return rows
    for seed in range(neighbours):
        near = dataclasses.replace(plain, operands=_nudged(plain.operands, seed))
        yardsticks.append((near.unfused(), near.exact()))
    natural = plain.natural(yardsticks[0][1]) if neighbours else {}
    return [
        judge(name, got[name], [(u[name], e[name]) for u, e in yardsticks], dtype, natural.get(name, 0.0))
        for name in yardsticks[0][1]
    ]


def narrowest(operands: Arrays) -> Any:
    """The floating dtype that rounds most among the operands; float32 where none is floating."""
    floating = [x.dtype for x in operands.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    return max(floating, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.dtype("float32"))


def transformed(name: str, problem: "Problem", plain: "Problem", dtype: Any) -> Row:
    """`problem` under the transform `name` against `plain` under the same."""
    from jaxops import interpreter  # a slow import

    transform = TRANSFORMS[name]
    # A transform is about the program, of which there are many; `first_order` has compared optimised numbers.
    with interpreter.unoptimized():
        got = transform(problem)
        # The reference on one device is what every mesh must reproduce.
        want = plain.value_and_gradients if name in OVER_DEVICES else transform(plain)
    return _close(f"transform {name}", got, want, 64 * float(jnp.finfo(dtype).eps))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Named outputs of named operands, some of them differentiable; and the scalar Σ weights · sin(outputs).

    `sharded` is as in `check`; `in_float32` makes the function in float32, rounded once, its own unfused form.
    `programs` are those that were compiled; a problem of other operands, by `dataclasses.replace`, uses them again.
    """

    function: Callable[[Arrays], Arrays]
    operands: Arrays
    differentiable: tuple[str, ...]
    weights: dict[str, np.ndarray]
    sharded: dict[str, int]
    in_float32: bool = False
    programs: dict[Any, Callable] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        function: Callable[[Arrays], Arrays],
        operands: Arrays,
        differentiable: Iterable[str],
        sharded: Mapping[str, int] | None = None,
    ) -> "Problem":
        """The problem with random weights, the same for every function of the same outputs."""
        random = np.random.default_rng(0)
        shapes = jax.eval_shape(function, operands)
        weights = {name: random.standard_normal(shape.shape) for name, shape in shapes.items()}
        return Problem(function, operands, tuple(differentiable), weights, dict(sharded or {}))

    def primals(self) -> Arrays:
        return {name: self.operands[name] for name in self.differentiable}

    def value(self) -> Arrays:
        return self.function(self.operands)

    def results(self) -> Arrays:
        """The outputs by name and, of the scalar, "gradient of x" for every differentiable x."""

        def scalar_and_outputs(primals: Arrays) -> tuple[jax.Array, Arrays]:
            outputs = self.function({**self.operands, **primals})
            return self.scalar(outputs), outputs

        gradients, outputs = jax.grad(scalar_and_outputs, has_aux=True)(self.primals())
        return {**outputs, **{f"gradient of {name}": g for name, g in gradients.items()}}

    def compiled(self, operands: Arrays, **compiler_options: Any) -> Arrays:
        """The results of other operands of the same shapes, under `jax.jit`."""
        key = (self.function, *compiler_options.items())
        if key not in self.programs:
            results = lambda operands: dataclasses.replace(self, operands=operands).results()
            self.programs[key] = jax.jit(results, compiler_options=compiler_options)
        found = self.programs[key](operands)  # sorted by name
        order = (*self.weights, *(f"gradient of {name}" for name in self.differentiable))
        return {name: found[name] for name in order if name in found}

    def unfused(self) -> Arrays:
        """The results with every rounding to the operands' dtypes that is written: XLA would leave some out."""
        from jaxops import interpreter  # a slow import

        with interpreter.unoptimized():
            return self._unfused({"xla_allow_excess_precision": False})

    def _unfused(self, options: Mapping[str, Any]) -> Arrays:
        if not self.in_float32:
            return self.compiled(self.operands, **options)
        shapes = jax.eval_shape(self.results)

        def rounded(operands: Arrays) -> Arrays:
            return {name: y.astype(shapes[name].dtype) for name, y in self.function(operands).items()}

        wide = {name: _cast(x, _at_least_float32(x.dtype)) for name, x in self.operands.items()}
        found = dataclasses.replace(self, function=rounded).compiled(wide, **options)
        return {name: x.astype(shapes[name].dtype) for name, x in found.items()}

    def exact(self) -> dict[str, np.ndarray]:
        """The results in float64."""
        from jaxops import interpreter  # a slow import

        # Accelerators have no float64, or not all of it.
        with interpreter.unoptimized(), jax.enable_x64(True), jax.default_device("cpu"):
            wide = {name: _cast(np.asarray(x), "float64") for name, x in self.operands.items()}
            return {name: np.asarray(x) for name, x in self.compiled(wide).items()}

    def natural(self, exact: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The Euclidean norm of each gradient if a change of x changed the outputs in the same proportion."""
        count = lambda x: max(x.size, 1) ** 0.5
        names = self.weights
        outputs = [np.where(np.isfinite(exact[name]), exact[name], 0) for name in names]
        total = math.hypot(*(np.linalg.norm(y) for y in outputs))
        typical = total / max(math.hypot(*(count(y) for y in outputs)), 1)
        cotangent = math.hypot(*(np.linalg.norm(w) for w in self.weights.values()))
        found = {}
        for name, x in self.primals().items():
            length = float(np.linalg.norm(np.asarray(x, np.float64))) or 1.0
            found[f"gradient of {name}"] = cotangent * min(typical * count(x) / length, total / length)
        return found

    def scalar(self, outputs: Arrays, weights: Any = None) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for name, y in outputs.items():
            wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
            wide = jnp.where(jnp.isinf(wide), 0, wide)  # where infinity is the value (an empty sum's logarithm)
            total = total + jnp.sum(jnp.sin(wide) * jnp.asarray((weights or self.weights)[name], wide.dtype))
        return total

    @functools.cached_property
    def value_and_gradients(self) -> tuple[jax.Array, Arrays]:
        """Of the scalar."""
        return jax.jit(jax.value_and_grad(self.loss))(self.primals())

    def loss(self, primals: Arrays, others: Arrays | None = None, weights: Any = None) -> jax.Array:
        return self.scalar(self.function({**self.operands, **(others or {}), **primals}), weights)


def _leading(count: int, function: Callable, static: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    def leading(operands: Arrays) -> Arrays:
        out = function(**operands, **static)
        if isinstance(out, tuple):
            out = out[0] if count == 1 else out[:count]
        return outputs_of(out)

    return leading


def _cast(x: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)


def _at_least_float32(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _nudged(operands: Arrays, seed: int) -> Arrays:
    """Operands a hundredth from these."""
    random = np.random.default_rng(seed)
    moved = {}
    for name, x in operands.items():
        factor = 1 + 0.01 * random.uniform(-1, 1, x.shape)
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        moved[name] = jnp.asarray(np.asarray(x, np.float64) * factor, x.dtype) if floating else x
    return moved


def _close(what: str, got: Any, want: Any, tolerance: float) -> Row:
    """The worst of two trees of arrays."""
    flat_got, flat_want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    if len(flat_got) != len(flat_want):
        return Row(what, math.inf, 0, tolerance, f"{len(flat_got)} results, expected {len(flat_want)}")
    worst = Row(what, 0.0, 0, tolerance)
    for (path, a), (_, b) in zip(flat_got, flat_want, strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        if a.shape != b.shape:
            return Row(name, math.inf, 0, tolerance, f"expected shape {b.shape}, got {a.shape}")
        difference = error(jax.device_get(a), jax.device_get(b))
        if difference > worst.error:
            worst = Row(name if difference > tolerance else what, difference, 0, tolerance)
    return worst


# ---- transforms: each takes a problem and gives a tree of arrays ---------------------------------------------------


def _direction(p: Problem) -> Arrays:
    return {name: jnp.cos(3 * x.astype(jnp.float32)).astype(x.dtype) for name, x in p.primals().items()}


def _two_directions(p: Problem) -> Arrays:
    return jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), p.primals())


def _hessian_vector(p: Problem):
    return jax.jit(lambda x: jax.jvp(jax.grad(p.loss), (x,), (_direction(p),))[1])(p.primals())


def _grad_of_grad(p: Problem):
    def norm(x):
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(jax.grad(p.loss)(x)))

    return jax.jit(jax.grad(norm))(p.primals())


def _vmap_first_only(p: Problem):
    first = p.differentiable[0]
    rest = {n: x for n, x in p.primals().items() if n != first}
    mapped = jax.vmap(jax.grad(lambda x: p.loss({first: x, **rest})))
    return jax.jit(mapped)(_two_directions(p)[first])


def _grad_of_vmap(p: Problem):
    first = p.differentiable[0]

    def total(x, xs):
        return jax.vmap(lambda one: p.loss({**x, first: one}))(xs).sum()

    return jax.jit(jax.grad(total, (0, 1)))(p.primals(), _two_directions(p)[first])


def _scan(p: Problem):
    def step(x, _):
        return jax.tree.map(lambda x, g: (x - 0.01 * g).astype(x.dtype), x, jax.grad(p.loss)(x)), p.loss(x)

    return jax.jit(lambda x: lax.scan(step, x, None, length=2))(p.primals())


def _grad_of_scan(p: Problem):
    def total(x):
        return lax.scan(lambda c, _: (c + p.loss(x), None), jnp.zeros(()), None, length=2)[0]

    return jax.jit(jax.grad(total))(p.primals())


def _specs(p: Problem, axes: tuple[str, ...] = ("d",)) -> dict[str, PartitionSpec]:
    return {
        name: PartitionSpec(*[axes if i == p.sharded.get(name) else None for i in range(x.ndim)])
        for name, x in p.operands.items()
    }


def _by_hand(p: Problem, kind: AxisType) -> Any:
    """shard_map over all devices, every operand split or replicated; the local losses are summed."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    specs = _specs(p)
    axis = p.sharded[p.differentiable[0]]
    split_weights = {
        name: PartitionSpec(*["d" if i == axis else None for i in range(w.ndim)]) for name, w in p.weights.items()
    }

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
    weights = {
        name: jax.device_put(jnp.asarray(w, jnp.float32), NamedSharding(mesh, split_weights[name]))
        for name, w in p.weights.items()
    }
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(f))(place(p.primals()), place(others), weights)


def _partitioned(p: Problem, kind: AxisType) -> Any:
    """jit over a mesh that JAX partitions itself (Auto) or whose shardings are in the types (Explicit)."""
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(kind, kind))
    specs = _specs(p, ("d", "e"))
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in p.operands.items()}
        split = {n: placed[n] for n in p.differentiable}
        others = {n: x for n, x in placed.items() if n not in p.differentiable}
        shapes = jax.eval_shape(lambda x, o: p.function({**x, **o}), split, others)
        weights = {}
        for name, w in p.weights.items():
            spec = shapes[name].sharding.spec if kind == AxisType.Explicit else PartitionSpec()
            weights[name] = jax.device_put(jnp.asarray(w, jnp.float32), NamedSharding(mesh, spec))
        return jax.jit(jax.value_and_grad(p.loss))(split, others, weights)


TRANSFORMS: dict[str, Callable[[Problem], object]] = {
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
