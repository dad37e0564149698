"""Pipeline parallelism: one program for all stages, in which a table says what each does when.

`pipeline_value_and_grad` runs a `Table` of `sharding.schedules` by `jax.lax.scan` over its ticks. In a tick every
device takes the branch of its phase and passes one activation, or its gradient, to its neighbours:

    F   y, residuals = forward of the stage            the residuals go to a slot of a buffer
    B   dx (, dw)    = backward from the residuals     no forward is done again
    W   dw           = what B left of it               the products of weight gradients only

There is no differentiation through the scan: forward and backward of one stage are traced once, and the backward is
cut in two where the table has the phase W. What a residual is, is JAX's to say, so that `jax.checkpoint` inside (or
around) a stage keeps less and does more in B, as everywhere. The number of slots is the memory law of the schedule.

Source: Huang et al., "GPipe", arXiv:1811.06965; Narayanan et al., arXiv:2104.04473; Qi et al., "Zero Bubble Pipeline
Parallelism", arXiv:2401.10241.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, jaxprs_in_params
from jax.interpreters import partial_eval

from sharding import collectives, schedules

Tree = Any
Value = Callable[[Tree, Tree, Tree, Tree], jax.Array]
ValueAndGrad = Callable[[Tree, Tree, Tree, Tree], tuple[jax.Array, tuple[Tree, Tree]]]


class Place(NamedTuple):
    """Which virtual stage works on which micro-batch: int32 scalars, for masks and the keys of random numbers."""

    stage: jax.Array
    micro_batch: jax.Array


def pipeline_value_and_grad(
    stage_fn: Callable[[Tree, Tree, Place], Tree],
    loss_fn: Callable[[Tree, Tree, Tree], jax.Array],
    table: schedules.Table,
    *,
    embed_fn: Callable[[Tree, Tree], Tree] | None = None,
    axis: str = "pipeline",
) -> ValueAndGrad:
    """loss = mean over i of loss_fn(shared, stage_K(… stage_1(embed_fn(shared, inputs_i))), targets_i), and gradients.

    i are the micro-batches and, where inputs or targets vary over further mesh axes (data), the devices along these.
    To be used inside `jax.shard_map(check_vma=True)`, as any function of local shards:

        value_and_grad(stages, shared, inputs, targets) -> loss, (gradient of stages, gradient of shared)

    Args:
      stage_fn: (parameters of a virtual stage, x, `Place`) ↦ y, of x's shapes and dtypes. It may use collectives over
        other axes than `axis`, but `ppermute`, in which the devices of other stages would take part (they are in other
        phases): no `overlap=True`. `Layers` makes one of layers.
      loss_fn: (shared, y of the last stage, targets of a micro-batch) ↦ scalar, the mean over the micro-batch.
      table: what `schedules.schedule` gives; its stages are the devices along `axis`.
      embed_fn: (shared, inputs of a micro-batch) ↦ x, a tree of floating arrays; None: inputs are x. It runs in the
        first stage, `loss_fn` in the last; both use `shared`: a tied embedding gets the sum of both gradients.
      axis: the mesh axis of the stages.

    Arguments of the function, and where they lie:
      stages: leaves [chunks, 1, …], the local part of [chunks, stages, …] under `PartitionSpec(None, axis, …)`: index
        [c, s] is virtual stage c · stages + s. `Layers.split` makes it.
      shared: the same on every device of `axis`, `PartitionSpec()`.
      inputs, targets: leaves [batch, …], the same on every device of `axis`; the batch is cut into table.micro_batches.

    Gradients have the places and dtypes of the parameters. They are summed over the micro-batches in float32 at least;
    those of parameters that are the same along a data axis are summed over it once, at the end.

    Raises, while tracing, `ValueError` if no `jax.shard_map` is over `axis`, its size is not the table's stages, leaves
    do not begin with [chunks, 1], the micro-batches do not divide the batch, y is not like x, a function sends by
    `ppermute`, or the loss is no scalar or differs along an axis that is not of the data; `TypeError` if parameters or
    x are not floating.
    """

    def value_and_grad(stages: Tree, shared: Tree, inputs: Tree, targets: Tree) -> tuple[jax.Array, tuple[Tree, Tree]]:
        places = jax.tree.map(_varying, (stages, shared))
        work = _Work.of(stage_fn, loss_fn, embed_fn, table, axis, stages, shared, inputs, targets)
        loss, d_stages, d_shared = _run(work)

        def total(gradient: jax.Array, like: jax.Array, place: frozenset) -> jax.Array:
            # One that differs along a data axis was gathered by the stage, whose gradient is summed already.
            missing = tuple(name for name in work.axes if name not in place)
            return ((lax.psum(gradient, missing) if missing else gradient) / work.terms).astype(like.dtype)

        d_stages = jax.tree.map(lambda g: g[:, None], d_stages)
        d_stages = jax.tree.map(total, d_stages, stages, places[0])
        d_shared = jax.tree.map(total, d_shared, shared, places[1])
        return lax.psum(loss, work.axes) / work.terms, (d_stages, d_shared)

    return value_and_grad


def pipeline_value(
    stage_fn: Callable[[Tree, Tree, Place], Tree],
    loss_fn: Callable[[Tree, Tree, Tree], jax.Array],
    table: schedules.Table,
    *,
    embed_fn: Callable[[Tree, Tree], Tree] | None = None,
    axis: str = "pipeline",
) -> Value:
    """loss = mean over i of loss_fn(shared, stage_K(… stage_1(embed_fn(shared, inputs_i))), targets_i), alone.

    For what is held out: the forwards of the table, which keep nothing and have no gradient.

        value(stages, shared, inputs, targets) -> loss

    Arguments, what it raises, and the source are those of `pipeline_value_and_grad`.
    """

    def value(stages: Tree, shared: Tree, inputs: Tree, targets: Tree) -> jax.Array:
        work = _Work.of(stage_fn, loss_fn, embed_fn, table, axis, stages, shared, inputs, targets)
        return lax.psum(_run_forwards(work), work.axes) / work.terms

    return value


# ---- layers of a stage ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layers:
    """x ↦ layer_n(… layer_1(x)): a `stage_fn` made of layers, and how the layers are dealt out to the stages.

    The layers are written out one after another: a loop would be one operation, of which the phase W would do the
    gradients of inputs again. A stage with fewer layers than the deepest computes its padding layers and leaves their
    result out: the deepest stage sets the pace in any case.

    Args:
      layer_fn: (parameters of a layer, x) ↦ x. Wrap it in `jax.checkpoint` to keep only x of every layer.
      table: of the schedule.
      counts: layers of each virtual stage, in their order, each at least 1; None: as many in each.
    """

    layer_fn: Callable[[Tree, Tree], Tree]
    table: schedules.Table
    counts: Sequence[int] | None = None

    def __call__(self, parameters: Tree, x: Tree, place: Place) -> Tree:
        """The layers of a virtual stage, of leaves [depth, …]."""
        depth = jax.tree.leaves(parameters)[0].shape[0]
        for n in range(depth):
            y = self.layer_fn(jax.tree.map(lambda w: w[n], parameters), x)
            if self.counts is None or n < min(self.counts):
                x = y
            else:
                there = n < jnp.asarray(self.counts)[place.stage]
                x = jax.tree.map(lambda y, x: jnp.where(there, y, x), y, x)
        return x

    def split(self, parameters: Tree) -> Tree:
        """Leaves [layers, …] ↦ [chunks, stages, depth, …], consecutive layers in a virtual stage.

        A stage with fewer layers than the most is filled up with copies of its last one.

        Raises `ValueError` if leaves differ in the number of layers, the virtual stages do not divide it and no counts
        are given, or if counts are not one for each virtual stage, at least 1, and in sum the layers.
        """
        totals = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(parameters)})
        if len(totals) != 1:
            raise ValueError(f"Layers: leaves of parameters must begin with one number of layers, got {totals}")
        counts = self._counts(totals[0])
        starts = itertools.accumulate(counts, initial=0)
        depth = range(max(counts))
        rows = [[start + min(n, count - 1) for n in depth] for start, count in zip(starts, counts, strict=False)]
        index = np.reshape(rows, (self.table.chunks, self.table.stages, len(depth)))
        return jax.tree.map(lambda leaf: leaf[index], parameters)

    def join(self, parameters: Tree) -> Tree:
        """[chunks, stages, depth, …] ↦ [layers, …]: the inverse of `split`, also for gradients."""
        K = self.table.stages * self.table.chunks

        def join(leaf: jax.Array) -> jax.Array:
            flat = leaf.reshape(K, *leaf.shape[2:])
            return jnp.concatenate([flat[k, :n] for k, n in enumerate(self.counts or [leaf.shape[2]] * K)])

        return jax.tree.map(join, parameters)

    def _counts(self, total: int) -> Sequence[int]:
        S, v = self.table.stages, self.table.chunks
        virtual = f"{S * v} virtual stages ({v} chunks of {S} stages)" if v > 1 else f"{S} stages"
        if self.counts is None:
            if total % (S * v):
                raise ValueError(
                    f"Layers: the {virtual} must divide the layers, got {total}; counts says how many each has"
                )
            return [total // (S * v)] * (S * v)
        if len(self.counts) != S * v or min(self.counts) < 1 or sum(self.counts) != total:
            raise ValueError(
                f"Layers: counts must be at least 1 for each of {virtual}, {total} in sum, got {tuple(self.counts)}"
            )
        return self.counts


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_axis(axis: str, table: schedules.Table) -> None:
    size = collectives.axis_size("pipeline_value_and_grad", axis)
    if axis not in _varying(lax.axis_index(axis)):
        raise ValueError("pipeline_value_and_grad: check_vma of the enclosing jax.shard_map must be True, got False")
    if size != table.stages:
        raise ValueError(
            f"pipeline_value_and_grad: table must have as many stages as there are devices along {axis!r}, "
            f"{size}, got {table.stages}"
        )


def _check_parameters(stages: Tree, shared: Tree, table: schedules.Table, axis: str) -> None:
    for name, tree in (("stages", stages), ("shared", shared)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            where = f"pipeline_value_and_grad: {name}{jax.tree_util.keystr(path)}"
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"{where} must be floating, got {leaf.dtype}")
            if name == "stages" and (leaf.shape[:2] != (table.chunks, 1) or axis not in _varying(leaf)):
                raise ValueError(
                    f"{where} must have the local shape ({table.chunks}, 1, …): [chunks, stages, …] split by "
                    f"PartitionSpec(None, {axis!r}), got {leaf.shape}"
                )
            if name == "shared" and axis in _varying(leaf):
                raise ValueError(f"{where} must be the same on every device of {axis!r}, got one that varies")


def _micro_batches(name: str, tree: Tree, table: schedules.Table, axis: str) -> Tree:
    """Leaves [batch, …] ↦ [micro-batches, batch / micro-batches, …]."""
    m = table.micro_batches

    def split(path: tuple, leaf: jax.Array) -> jax.Array:
        where = f"pipeline_value_and_grad: {name}{jax.tree_util.keystr(path)}"
        if leaf.ndim == 0 or leaf.shape[0] % m or leaf.shape[0] == 0:
            raise ValueError(
                f"{where} must have a batch on each device that is a multiple of the {m} micro-batches, got shape "
                f"{leaf.shape}"
            )
        if axis in _varying(leaf):
            raise ValueError(f"{where} must be the same on every device of {axis!r}, got one that varies")
        return leaf.reshape(m, leaf.shape[0] // m, *leaf.shape[1:])

    return jax.tree.map_with_path(split, tree)


# ---- which axes an array varies over -------------------------------------------------------------------------------


def _varying(x: Any) -> frozenset:
    return frozenset(jax.typeof(x).mat.varying)


def _vary(tree: Tree, axes: Iterable[str]) -> Tree:
    """Every leaf known to vary over `axes` too. Nothing is sent."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(name for name in sorted(axes) if name not in _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _zeros(shape: tuple[int, ...], dtype: Any, axes: Iterable[str]) -> jax.Array:
    return _vary(jnp.zeros(shape, dtype), axes)


def _zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: _zeros(x.shape, x.dtype, _varying(x)), tree)


# ---- forward and backward of a stage, cut into phases --------------------------------------------------------------


class _Phases:
    """F, B and W of a stage: y, dx and dw of (parameters, x, place, dy), traced once and cut by what needs what.

    F has the equations that y needs, B those that dx needs (without W: dx and dw), W the rest of what dw needs. What
    one phase makes and a later one reads is stored: `saved` by F for B, `deferred` by F for W (B may read it too),
    `between` by B for W. What depends on parameters and place alone is made again instead:
    the weights would be stored once for every micro-batch.
    """

    def __init__(self, stage_fn: Callable, parameters: Tree, x: Tree, place: Place, split: bool):
        leaves_w, tree_w = jax.tree.flatten(parameters)
        leaves_x, tree_x = jax.tree.flatten(x)

        def joint(w: list, x: list, place: Place, dy: list) -> tuple[list, list, list]:
            call = lambda w, x: jax.tree.leaves(
                stage_fn(jax.tree.unflatten(tree_w, w), jax.tree.unflatten(tree_x, x), place)
            )
            y, pull = jax.vjp(call, w, x)
            dw, dx = pull(dy)
            return y, dx, dw

        traced = jax.make_jaxpr(joint)(leaves_w, leaves_x, place, leaves_x)
        flat = [*leaves_w, *leaves_x, *place, *leaves_x]
        jaxpr = jax.make_jaxpr(lambda *a: _inlined(traced.jaxpr, traced.consts, a))(*flat)
        self.constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        n, m = len(leaves_w), len(leaves_x)
        take = lambda items, *counts: [items[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
        self.w, self.x, self.place, self.dy = take(jaxpr.jaxpr.invars, n, m, len(place), m)
        self.y, self.dx, self.dw = take(jaxpr.jaxpr.outvars, m, m, n)

        equations, _ = _needed(jaxpr.jaxpr.eqns, [*self.y, *self.dx, *self.dw])
        moving = _reached(equations, [*self.x, *self.dy])
        # Whole equations: a forward that also makes what only its backward reads is not run twice.
        self.f, _ = _needed(equations, self.y, whole=True)
        made = {v for eqn in self.f for v in eqn.outvars} & moving
        # A kernel that makes the gradients of inputs and weights in one makes both in B. Weights whose gradient such a
        # kernel has a part in are done in B altogether: a part stored for W would be of the size of the weights.
        kernels, inner = _needed(equations, self.dx, made)
        inner |= dict.fromkeys(v for eqn in kernels for v in eqn.invars if not isinstance(v, Literal))
        beside = {v for eqn in kernels for v in eqn.outvars if v not in inner and v not in self.dx}
        early = lambda w: not split or not beside.isdisjoint(_needed(equations, [w], beside)[1])
        self.early = [i for i, w in enumerate(self.dw) if early(w)]
        self.late = [i for i in range(n) if i not in self.early]
        dw_b, dw_w = ([self.dw[i] for i in chosen] for chosen in (self.early, self.late))
        self.b, reads_b = _needed(equations, [*self.dx, *dw_b], made)
        made_b = {v for eqn in self.b for v in eqn.outvars} & moving
        self.v, reads_w = _needed(equations, dw_w, made | made_b)
        from_f = made | set(self.x)
        self.deferred = [v for v in reads_w if v in from_f]
        self.saved = [v for v in reads_b if v in from_f and v not in reads_w]
        self.between = [v for v in reads_w if v in made_b or v in self.dy]

    def _values(self, parameters: list, place: Place, *more: tuple[list, list]) -> dict:
        values = dict(self.constants)
        for variables, arrays in ((self.w, parameters), (self.place, place), *more):
            values |= dict(zip(variables, arrays, strict=True))
        return values

    def forward(self, parameters: list, place: Place, x: list) -> tuple[list, ...]:
        """y, saved, deferred."""
        return _evaluate(self.f, self._values(parameters, place, (self.x, x)), self.y, self.saved, self.deferred)

    def backward(self, parameters: list, place: Place, saved: list, deferred: list, dy: list) -> tuple[list, ...]:
        """dx, dw of `early`, between."""
        stored = (self.saved, saved), (self.deferred, deferred), (self.dy, dy)
        values = self._values(parameters, place, *stored)
        return _evaluate(self.b, values, self.dx, [self.dw[i] for i in self.early], self.between)

    def weights(self, parameters: list, place: Place, deferred: list, between: list) -> list:
        """dw of `late`."""
        values = self._values(parameters, place, (self.deferred, deferred), (self.between, between))
        return _evaluate(self.v, values, [self.dw[i] for i in self.late])[0]


_CALLS = ("jit", "closed_call", "core_call", "remat2", "checkpoint")


def _inlined(jaxpr: Any, constants: Sequence, arguments: Sequence) -> list:
    """The outputs, with the equations of inner calls in the place of the calls, so that they can be told apart."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CALLS:
            inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            results = _inlined(inner, getattr(inner, "consts", ()), [_read(values, v) for v in eqn.invars])
            values |= dict(zip(eqn.outvars, results, strict=True))
        else:
            _evaluate([eqn], values)
    return [_read(values, v) for v in jaxpr.outvars]


def _read(values: Mapping, variable: Any) -> Any:
    return variable.val if isinstance(variable, Literal) else values[variable]


def _evaluate(equations: Iterable, values: dict, *wanted: list) -> tuple[list, ...]:
    """Runs equations, adding to `values`; the values of the wanted variables."""
    for eqn in equations:
        with eqn.ctx.manager:
            results = eqn.primitive.bind(
                *(_read(values, v) for v in eqn.invars), **eqn.primitive.get_bind_params(eqn.params)
            )
        values |= zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True)
    return tuple([_read(values, v) for v in variables] for variables in wanted)


def _needed(equations: Sequence, wanted: Iterable, made: Iterable = (), *, whole: bool = False) -> tuple[list, dict]:
    """The equations that `wanted` needs where `made` is there already, and the variables read that these do not make.

    Of an equation with several results only those that are needed are made, where JAX knows how to, unless `whole`.
    """
    made = set(made)
    kept: list = []
    reads = dict.fromkeys(v for v in wanted if not isinstance(v, Literal))  # a set that keeps the order
    for eqn in reversed(equations):
        used = [v in reads and v not in made for v in eqn.outvars]
        if not any(used):
            continue
        new, takes = eqn, [True] * len(eqn.invars)
        if not whole and eqn.primitive in partial_eval.dce_rules:
            takes, new = partial_eval.dce_rules[eqn.primitive](used, [True] * len(eqn.invars), eqn)
        kept.append(new)
        reads |= dict.fromkeys(v for v, t in zip(eqn.invars, takes, strict=True) if t and not isinstance(v, Literal))
    own = {v for eqn in kept for v in eqn.outvars}
    return kept[::-1], {v: None for v in reads if v not in own}


def _reached(equations: Iterable, start: Iterable) -> set:
    """The variables that depend on those of `start`."""
    reached = set(start)
    for eqn in equations:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached |= set(eqn.outvars)
    return reached


# ---- the program ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Work:
    """One call, its arguments checked: parameters [chunks, …] and micro-batches, all varying over `axes`, the axes that
    the loss is summed over; the first is the pipeline's."""

    stage_fn: Callable
    loss_fn: Callable
    embed_fn: Callable
    table: schedules.Table
    axes: tuple[str, ...]
    stages: Tree
    shared: Tree
    inputs: Tree
    targets: Tree

    @staticmethod
    def of(
        stage_fn: Callable,
        loss_fn: Callable,
        embed_fn: Callable | None,
        table: schedules.Table,
        axis: str,
        stages: Tree,
        shared: Tree,
        inputs: Tree,
        targets: Tree,
    ) -> "_Work":
        _check_axis(axis, table)
        _check_parameters(stages, shared, table, axis)
        inputs, targets = (_micro_batches(n, t, table, axis) for n, t in (("inputs", inputs), ("targets", targets)))
        over = {name for leaf in jax.tree.leaves((inputs, targets)) for name in _varying(leaf)} - {axis}
        axes = (axis, *sorted(over))
        # What is differentiated varies before it is: the transpose of an implicit cast is a sum over the axis, which
        # would stand inside a branch that not all devices take, and there they would wait for each other for ever.
        stages, shared, inputs, targets = (_vary(tree, axes) for tree in (stages, shared, inputs, targets))
        stages = jax.tree.map(lambda w: w[:, 0], stages)
        return _Work(stage_fn, loss_fn, embed_fn or (lambda _, x: x), table, axes, stages, shared, inputs, targets)

    @property
    def terms(self) -> int:
        """Of how many losses the loss is the mean: micro-batches on the devices along every axis but the first."""
        return self.table.micro_batches * int(np.prod([lax.axis_size(name) for name in self.axes[1:]], dtype=int))

    def mine(self, table: schedules.Table) -> dict[str, jax.Array]:
        """What this device does in every tick of a table."""
        me = lax.axis_index(self.axes[0])
        columns = {name: jnp.asarray(np.asarray(rows, np.int32)) for name, rows in schedules.columns(table).items()}
        return {name: jnp.take(column, me, axis=1) for name, column in columns.items()}

    def place(self, r: Mapping) -> Place:
        return Place(r["chunk"] * self.table.stages + lax.axis_index(self.axes[0]), r["micro_batch"])

    @property
    def down(self) -> list[tuple[int, int]]:
        """From which device to which an activation goes."""
        S = self.table.stages
        return [(s, (s + 1) % S) for s in range(S if self.table.chunks > 1 else S - 1)]

    def activation(self) -> tuple[Tree, list[frozenset]]:
        """Zeros like what goes from stage to stage, and the axes over which each leaf varies."""
        where = "pipeline_value_and_grad: "
        x = _types("embed_fn", lambda: self.embed_fn(self.shared, _at(self.inputs, 0)), self.axes[0])
        for leaf in jax.tree.leaves(x):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"{where}what embed_fn returns (inputs without it) must be floating, got {leaf.dtype}")
        places = jax.tree.map(lambda a: frozenset(a.mat.varying) | set(self.axes), x)
        for _ in range(2):  # a stage may give what varies over more axes, as shards of a sequence do
            zeros = jax.tree.map(lambda a, place: _zeros(a.shape, a.dtype, place), x, places)
            place = Place(*[lax.axis_index(self.axes[0])] * 2)
            y = _types("stage_fn", lambda: self.stage_fn(_at(self.stages, 0), zeros, place), self.axes[0])
            described = [
                (jax.tree.structure(t), [f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(t)]) for t in (x, y)
            ]
            if described[0] != described[1]:
                raise ValueError(
                    f"{where}stage_fn must return what it takes, {described[0][1]} in {described[0][0]}, got "
                    f"{described[1][1]} in {described[1][0]}"
                )
            places = jax.tree.map(lambda place, a: place | set(a.mat.varying), places, y)
        zeros = jax.tree.map(lambda a, place: _zeros(a.shape, a.dtype, place), x, places)
        return zeros, [_varying(a) for a in jax.tree.leaves(zeros)]

    def loss_type(self, x: Tree) -> Any:
        """The dtype of sums of the loss, which is checked."""
        value = _types("loss_fn", lambda: self.loss_fn(self.shared, x, _at(self.targets, 0)), self.axes[0])
        if not hasattr(value, "shape") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"pipeline_value_and_grad: loss_fn must return a floating scalar, got {value}")
        if more := sorted(set(value.mat.varying) - set(self.axes)):
            raise ValueError(
                "pipeline_value_and_grad: loss_fn must return the same on every device of axes over which neither "
                "inputs nor targets vary (jax.lax.psum or pmean it), got one that varies over "
                f"{', '.join(map(repr, more))}"
            )
        return _wide(value.dtype)


def _run(work: _Work) -> tuple[jax.Array, Tree, Tree]:
    """Sums over this device's micro-batches: the loss and the gradients of stages [chunks, …] and shared."""
    table, axes, stages, shared = work.table, work.axes, work.stages, work.shared
    x, places = work.activation()
    like_x = jax.tree.structure(x)
    widened = lambda tree: [_vary(a, over) for a, over in zip(jax.tree.leaves(tree), places, strict=True)]
    embed = lambda shared, i: widened(work.embed_fn(shared, _at(work.inputs, i)))
    me = lax.axis_index(axes[0])
    phases = _Phases(
        lambda w, x, place: widened(work.stage_fn(w, x, place)), _at(stages, 0), x, Place(me, me), table.has_weights
    )
    loss_type = work.loss_type(x)

    def loss_of(shared: Tree, y: list, i: jax.Array) -> jax.Array:
        loss = work.loss_fn(shared, jax.tree.unflatten(like_x, y), _at(work.targets, i))
        return _vary(loss.astype(loss_type), axes)

    nothing = lambda: _zeros_like(jax.tree.leaves(x))
    down, up = work.down, [(b, a) for a, b in work.down]

    def forward(r: Mapping, store: dict) -> tuple[list, dict]:
        arrived = lambda: _at(store["arriving"], r["arriving"])
        x = lax.cond(r["first"] == 1, lambda: embed(shared, r["micro_batch"]), arrived)
        w = jax.tree.leaves(_at(stages, r["chunk"]))
        y, saved, deferred = phases.forward(w, work.place(r), x)
        store = store | {
            "saved": _put(store["saved"], saved, r["saved"]),
            "deferred": _put(store["deferred"], deferred, r["deferred"]),
        }

        def with_loss() -> tuple[list, jax.Array, Tree]:  # what the last stage hands on is the gradient of its own y
            loss, (d_shared, dy) = jax.value_and_grad(loss_of, argnums=(0, 1))(shared, y, r["micro_batch"])
            return dy, store["loss"] + loss, _add(store["shared"], d_shared)

        message, loss, d_shared = lax.cond(r["last"] == 1, with_loss, lambda: (y, store["loss"], store["shared"]))
        return message, store | {"loss": loss, "shared": d_shared}

    def backward(r: Mapping, store: dict) -> tuple[list, dict]:
        w = jax.tree.leaves(_at(stages, r["chunk"]))
        dx, dw, between = phases.backward(
            w,
            work.place(r),
            _at(store["saved"], r["saved"]),
            _at(store["deferred"], r["deferred"]),
            _at(store["gradients"], r["gradients"]),
        )

        def into_embedding() -> Tree:
            _, pull = jax.vjp(lambda shared: embed(shared, r["micro_batch"]), shared)
            return _add(store["shared"], pull(dx)[0])

        d_shared = lax.cond(r["first"] == 1, into_embedding, lambda: store["shared"])
        store = store | {"shared": d_shared, "between": _put(store["between"], between, r["between"])}
        return dx, store | {"stages": _add_at(store["stages"], dict(zip(phases.early, dw, strict=True)), r["chunk"])}

    def weights(r: Mapping, store: dict) -> tuple[list, dict]:
        w = jax.tree.leaves(_at(stages, r["chunk"]))
        deferred, between = _at(store["deferred"], r["deferred"]), _at(store["between"], r["between"])
        dw = phases.weights(w, work.place(r), deferred, between)
        return nothing(), store | {
            "stages": _add_at(store["stages"], dict(zip(phases.late, dw, strict=True)), r["chunk"])
        }

    branches = [lambda r, store: (nothing(), store), forward, backward, *([weights] if table.has_weights else [])]

    def tick(carry: tuple[dict, list], r: Mapping) -> tuple[tuple[dict, list], None]:
        store, message = carry
        exchange = lambda message: [jax.tree.map(lambda a: lax.ppermute(a, axes[0], to), message) for to in (down, up)]
        # Every device takes part, whatever its branch. With overlap what the last tick made travels while this one's
        # branch runs, which does not read it.
        arriving = exchange(message) if table.overlap else None
        message, store = lax.switch(r["phase"], branches, r, store)
        activation, gradient = arriving or exchange(message)
        gradients = _put(store["gradients"], message, r["keep_gradient"])
        return (
            store
            | {
                "arriving": _put(store["arriving"], activation, r["receive_activation"]),
                "gradients": _put(gradients, gradient, r["receive_gradient"]),
            },
            message,
        ), None

    counts = table.buffers.counts
    slots = lambda count, types: [_zeros((count, *a.shape), a.dtype, a.mat.varying) for a in types]
    passed = [jax.typeof(a) for a in jax.tree.leaves(x)]
    sums = lambda tree: jax.tree.map(lambda w: _zeros(w.shape, _wide(w.dtype), _varying(w)), tree)
    store = {
        "arriving": slots(counts["arriving"] + 1, passed),  # the last slot is for what nobody reads
        "gradients": slots(counts["gradients"] + 1, passed),
        "saved": slots(counts["saved"], [v.aval for v in phases.saved]),
        "deferred": slots(counts["deferred"], [v.aval for v in phases.deferred]),
        "between": slots(counts["between"], [v.aval for v in phases.between]),
        "stages": sums(jax.tree.leaves(stages)),
        "shared": sums(shared),
        "loss": _zeros((), loss_type, axes),
    }
    (store, _), _ = lax.scan(tick, (store, nothing()), work.mine(table))
    return store["loss"], jax.tree.unflatten(jax.tree.structure(stages), store["stages"]), store["shared"]


def _run_forwards(work: _Work) -> jax.Array:
    """The sum of the loss over this device's micro-batches, by the table's forwards."""
    table, axes = work.table.forwards, work.axes
    x, places = work.activation()
    widened = lambda tree: jax.tree.map(_vary, tree, jax.tree.unflatten(jax.tree.structure(x), places))
    loss_type = work.loss_type(x)

    def forward(r: Mapping, arriving: Tree, loss: jax.Array) -> tuple[Tree, jax.Array]:
        i = r["micro_batch"]
        arrived = lambda: _at(arriving, r["arriving"])
        embedded = lambda: widened(work.embed_fn(work.shared, _at(work.inputs, i)))
        now = lax.cond(r["first"] == 1, embedded, arrived)
        y = widened(work.stage_fn(_at(work.stages, r["chunk"]), now, work.place(r)))
        of_y = lambda: work.loss_fn(work.shared, y, _at(work.targets, i)).astype(loss_type)
        return y, lax.cond(r["last"] == 1, lambda: loss + _vary(of_y(), axes), lambda: loss)

    def tick(carry: tuple[Tree, Tree, jax.Array], r: Mapping) -> tuple[tuple[Tree, Tree, jax.Array], None]:
        arriving, message, loss = carry
        send = lambda message: jax.tree.map(lambda a: lax.ppermute(a, axes[0], work.down), message)
        sent = send(message) if table.overlap else None
        idle = lambda r, arriving, loss: (_zeros_like(x), loss)
        message, loss = lax.switch(r["phase"], [idle, forward], r, arriving, loss)
        put = lambda b, a: lax.dynamic_update_index_in_dim(b, a, r["receive_activation"], 0)
        return (jax.tree.map(put, arriving, send(message) if sent is None else sent), message, loss), None

    slots = table.buffers.counts["arriving"] + 1  # the last slot is for what nobody reads
    arriving = jax.tree.map(lambda a: _zeros((slots, *a.shape), a.dtype, _varying(a)), x)
    (_, _, loss), _ = lax.scan(tick, (arriving, _zeros_like(x), _zeros((), loss_type, axes)), work.mine(table))
    return loss


def _wide(dtype: Any) -> Any:
    """What a sum over micro-batches is made in: a sum of bfloat16 stalls after 256 terms."""
    return jnp.promote_types(dtype, jnp.float32)


def _types(name: str, function: Callable, axis: str) -> Tree:
    """The types of what the function returns, with the axes over which it varies. Refuses what a phase cannot send."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)()
    if lax.axis_size(axis) > 1 and "ppermute" in _primitives(jaxpr.jaxpr):
        raise ValueError(
            f"pipeline_value_and_grad: {name} must send by collectives of groups (psum, all_gather, psum_scatter, "
            "all_to_all), got jax.lax.ppermute, as overlap=True of the tensor-parallel functions makes it: all devices "
            "of the mesh take part in one, and those of other stages are in other phases"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def _primitives(jaxpr: Any) -> set[str]:
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return names.union(*(_primitives(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def _at(tree: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)


def _put(buffers: list, arrays: list, slot: jax.Array) -> list:
    return [lax.dynamic_update_index_in_dim(b, a, slot, 0) for b, a in zip(buffers, arrays, strict=True)]


def _add(total: Tree, terms: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, terms)


def _add_at(total: list, terms: Mapping[int, jax.Array], slot: jax.Array) -> list:
    """The terms of some of the arrays, added to a slot of these."""
    total = list(total)
    for i, term in terms.items():
        total[i] = lax.dynamic_update_index_in_dim(total[i], _add(_at(total[i], slot), term), slot, 0)
    return total
