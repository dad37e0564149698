"""Optimizers: adamw, lion, sgd. One pass reads parameter, gradient and moments of a leaf and writes the new ones.

Drop-ins for the optax functions of the same names (`init` and `update`), and `apply`, which returns the new parameters
instead of updates to add. A large leaf is updated in its own layout, in place where its buffer is donated. The moments
of small leaves of one shape share an array: what a program costs per array it takes and returns is paid once for them.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxops.ops import checks
from jaxops.reference import optimizers

Schedule = Callable[[jax.Array], jax.typing.ArrayLike]
Mask = Any  # a tree of bool, or a function from the parameters to one

_SMALL = 1 << 16  # elements of a leaf whose moments may share an array
_TOGETHER = 1 << 19  # elements of such an array: 2 MiB in float32, so that the step stays in a core's cache


class AdamWState(NamedTuple):
    """The steps done, and for every parameter the means of its gradient and of its square."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    mu: Any
    nu: Any


class LionState(NamedTuple):
    """The steps done, and for every parameter the mean of its gradient."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    mu: Any


class SGDState(NamedTuple):
    """The steps done, and for every parameter the decaying sum of its gradients (None without momentum)."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    trace: Any


class Optimizer(optax.GradientTransformationExtraArgs):
    """What `adamw`, `lion` and `sgd` return: optax's pair (init, update), and `apply`.

    It goes where optax's transformations go: `optax.chain`, `nnx.Optimizer`, `TrainState`. The state is a named tuple
    of `count` and trees like the parameters. In these, small leaves of one shape share an array: it lies where the
    first of them is, with an axis for them in front, and the others are None.
    """

    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    recipe: "Recipe"  # for who lays the state out in another way, as `sharding.gradient_reduction` does

    def __new__(cls, recipe: "Recipe") -> "Optimizer":
        self = super().__new__(
            cls, recipe.init, lambda grads, state, params=None, **extra: recipe.step(params, grads, state, False)
        )
        self.apply = lambda params, grads, state: recipe.step(params, grads, state, True)
        self.recipe = recipe
        return self


def adamw(
    learning_rate: float | jax.Array | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    max_norm: float | None = None,
    small: int = _SMALL,
) -> Optimizer:
    """p ← p - learning_rate · (m̂ / (√(v̂ + eps_root) + eps) + weight_decay · p).

    m = b1·m + (1-b1)·g and v = b2·v + (1-b2)·g² are kept; m̂ = m / (1-b1ᵗ) and v̂ = v / (1-b2ᵗ) in step t = 1, 2, …
    A drop-in for `optax.adamw`.

    `init(params)` makes the state, `apply(params, grads, state)` gives (new params, new state), and
    `update(grads, state, params)` gives (updates, new state). `params` is a tree of floating arrays, `grads` one like
    it, whose dtypes may differ. Everything comes back in its shape and dtype; donate `params` and `state` to `jax.jit`
    and nothing is copied. Both can be differentiated and mapped.

    Args:
      learning_rate: a number, a scalar array, or a function of the steps done (an optax schedule).
      b1, b2: how much of the means is kept in a step, in [0, 1).
      eps, eps_root: at least 0.
      mu_dtype, nu_dtype: floating; how m and v are kept. None: as the parameter. Computed in float32 in any case.
      weight_decay: at least 0.
      mask: a tree of bool like the parameters (or a prefix of it), or a function from them to it: which are decayed.
      nesterov: m̂ = b1 · m / (1-b1ᵗ⁺¹) + (1-b1) · g / (1-b1ᵗ).
      max_norm: above 0; gradients whose norm, over all leaves together, is larger are scaled down to it.
      small: leaves of at most so many elements share arrays of the state with others of their shape. 0: none does, for
        a state that is sharded by the paths of the parameters or that has to look like optax's.

    Raises:
      TypeError: an option is not a Python number, or a dtype or a leaf is not floating.
      ValueError: an option is out of its range, or grads or state do not fit the parameters: the message names the
        leaf.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101.
    """
    rule = optimizers.Adam(
        b1=_fraction("adamw", "b1", b1),
        b2=_fraction("adamw", "b2", b2),
        eps=checks.number("adamw", "eps", eps),
        eps_root=checks.number("adamw", "eps_root", eps_root),
        nesterov=bool(nesterov),
    )
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    return _optimizer("adamw", AdamWState, rule, learning_rate, weight_decay, mask, max_norm, small, dtypes)


def lion(
    learning_rate: float | jax.Array | Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any = None,
    weight_decay: float = 1e-3,
    mask: Mask | None = None,
    *,
    max_norm: float | None = None,
    small: int = _SMALL,
) -> Optimizer:
    """p ← p - learning_rate · (sign(b1·m + (1-b1)·g) + weight_decay · p), then m ← b2·m + (1-b2)·g.

    A drop-in for `optax.lion`. Arguments, results and errors as for `adamw`.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    rule = optimizers.Lion(_fraction("lion", "b1", b1), _fraction("lion", "b2", b2))
    dtypes = {"mu_dtype": mu_dtype}
    return _optimizer("lion", LionState, rule, learning_rate, weight_decay, mask, max_norm, small, dtypes)


def sgd(
    learning_rate: float | jax.Array | Schedule,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    max_norm: float | None = None,
    small: int = _SMALL,
) -> Optimizer:
    """t ← g + momentum · t, p ← p - learning_rate · t; with `nesterov` p ← p - learning_rate · (g + momentum · t).

    A drop-in for `optax.sgd`. Without `momentum` (in [0, 1)) nothing but the count is kept. `accumulator_dtype` is that
    of t; the other arguments, results and errors as for `adamw`.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """
    rule = optimizers.Momentum(None if momentum is None else _fraction("sgd", "momentum", momentum), bool(nesterov))
    dtypes = {} if momentum is None else {"accumulator_dtype": accumulator_dtype}
    return _optimizer("sgd", SGDState, rule, learning_rate, 0.0, None, max_norm, small, dtypes)


def _fraction(name: str, argument: str, value: float) -> float:
    value = checks.number(name, argument, value)
    if value >= 1:
        raise ValueError(f"{name}: {argument} must be below 1, got {value}")
    return value


def _optimizer(name, state, rule, learning_rate, weight_decay, mask, max_norm, small, dtypes) -> Optimizer:
    """`dtypes` are those of the moments by their arguments, None for that of the parameter."""
    for argument, dtype in dtypes.items():
        if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise TypeError(f"{name}: {argument} must be a floating dtype, got {jnp.dtype(dtype)}")
    if not callable(learning_rate) and not hasattr(learning_rate, "dtype"):
        checks.finite(name, "learning_rate", learning_rate)
    checks.number(name, "weight_decay", weight_decay)
    checks.number(name, "small", small)
    if max_norm is not None:
        checks.number(name, "max_norm", max_norm, positive=True)
    return Optimizer(
        Recipe(name, state, rule, learning_rate, weight_decay, mask, max_norm, small, tuple(dtypes.values()))
    )


class Recipe(NamedTuple):
    """What an optimizer is made of: the checked arguments that all of them share, and a step on one array.

    `fields` names the trees of moments in its state, `scalars` are the numbers of a step, the same for all parameters,
    and `changed` updates a parameter, or any part of one.
    """

    name: str
    state: Any  # the class of the state
    rule: optimizers.Rule
    learning_rate: Any
    weight_decay: float
    mask: Mask | None
    max_norm: float | None
    small: int
    dtypes: tuple[Any, ...]  # of the moments; None: as the parameter

    @property
    def fields(self) -> tuple[str, ...]:
        return self.state._fields[1 : 1 + self.rule.moments]

    def state_of(self, count: Any, trees: Sequence[Any]) -> Any:
        """The state of `count` and the trees of moments; what there is none of is None."""
        return self.state(count, *trees, *[None] * (len(self.state._fields) - 1 - len(trees)))

    def scalars(self, count: jax.Array, factor: Any, wide: Any) -> tuple[jax.Array, jax.Array]:
        """(the count after this step, [learning rate, factor of the gradients, the rule's own]) in the dtype `wide`."""
        after = count + (count < jnp.iinfo(jnp.int32).max)  # it does not overflow
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        numbers = (rate, factor, *self.rule.factors(after.astype(wide)))
        return after, jnp.stack([jnp.asarray(x, wide) for x in numbers])

    def changed(self, p: jax.Array, g: jax.Array, moments: Sequence[jax.Array], scalars: jax.Array, decay: float):
        """(what is added to p, the new moments), of a gradient and moments like p, elementwise."""
        scalars, old = _wide(p, scalars, moments)
        rate, factor, *factors = scalars
        g = factor * g.astype(rate.dtype)
        new = self.rule.new(g, old)
        return _change(p, self.rule.direction(g, old, new, factors), rate, decay), _kept(new, moments)

    def decays(self, params: Any, leaves: "Leaves") -> list[float]:
        """The weight decay of each leaf. Raises `ValueError` if there is one but no parameters, or for another mask."""
        if not self.weight_decay:
            return [0.0] * len(leaves.arrays)
        if params is None:
            raise ValueError(f"{self.name}: params must be given, as weight_decay is {self.weight_decay}, got None")
        if self.mask is None:
            return [self.weight_decay] * len(leaves.arrays)
        chosen = self.mask(params) if callable(self.mask) else self.mask
        try:
            spread = jax.tree.map(lambda decayed, part: jax.tree.map(lambda _: bool(decayed), part), chosen, params)
        except ValueError as error:
            raise ValueError(f"{self.name}: mask must be a tree like params or a prefix of it: {error}") from None
        return [self.weight_decay * decayed for decayed in jax.tree.leaves(spread)]

    def init(self, params: Any):
        leaves = leaves_of(self.name, "params", params)
        trees = []
        for dtype in self.dtypes:
            moments: list[Any] = [None] * len(leaves.arrays)
            for members in _groups(leaves.arrays, self.small):
                alike = [leaves.arrays[i] for i in members]
                like = alike[0] if len(alike) == 1 else jnp.stack(alike)  # its sharding too
                moments[members[0]] = jnp.zeros_like(like, dtype=dtype)
            trees.append(jax.tree.unflatten(leaves.structure, moments))
        return self.state_of(jnp.zeros((), jnp.int32), trees)

    def step(self, params: Any, grads: Any, state: Any, in_place: bool):
        """(new parameters if `in_place`, else updates; the new state)."""
        leaves = leaves_of(self.name, *(("grads", grads) if params is None else ("params", params)))
        gradients = gradients_of(self.name, grads, leaves)
        groups = _groups(leaves.arrays, self.small)
        shapes: list[tuple[int, ...] | None] = [None] * len(leaves.arrays)
        for members in groups:
            of_one = leaves.arrays[members[0]].shape
            shapes[members[0]] = of_one if len(members) == 1 else (len(members), *of_one)
        moments = moments_of(self.name, self.fields, state, leaves, shapes, "another `small`")
        decays = self.decays(params, leaves)

        wide = widest(leaves.arrays)
        factor: Any = 1.0 if self.max_norm is None else clipping(jnp.sqrt(sum(map(squares, gradients))), self.max_norm)
        count, scalars = self.scalars(state.count, factor, wide)

        results: list[Any] = [None] * len(gradients)
        previous = scalars
        for members in groups:
            first = members[0]
            kept = [moment[first] for moment in moments]
            ps, gs = ([xs[i] for i in members] for xs in (leaves.arrays, gradients))
            ds = [decays[i] for i in members]
            if len(members) == 1:
                change, kept = self.changed(ps[0], gs[0], kept, scalars, ds[0])
                changes = [change]
            else:
                changes, kept, previous = _together(ps, gs, kept, scalars, previous, self.rule, ds)
            for i, p, change in zip(members, ps, changes, strict=True):
                results[i] = (p.astype(change.dtype) + change if in_place else change).astype(p.dtype)
            for moment, new in zip(moments, kept, strict=True):
                moment[first] = new
        new = self.state_of(count, [jax.tree.unflatten(leaves.structure, moment) for moment in moments])
        return jax.tree.unflatten(leaves.structure, results), new


def _together(ps, gs, moments, scalars, previous, rule, decays):
    """([what is added to each parameter], the new moments of all, what the next call has to wait for)."""
    scalars, old = _wide(ps[0], scalars, moments)
    rate, clip, *factors = scalars
    # One group after the other, by barriers: the copy of its gradients stays in the cache, and its memory serves the
    # next group. Fused into what reads it, the copy would look for its source at every element.
    gs, _ = lax.optimization_barrier((gs, previous))
    g = lax.optimization_barrier(jnp.stack(gs))
    new = lax.optimization_barrier(rule.new(clip * g.astype(rate.dtype), old))
    changes = []
    for i, (p, g, decay) in enumerate(zip(ps, gs, decays, strict=True)):
        before, after = ([lax.index_in_dim(x, i, keepdims=False) for x in xs] for xs in (old, new))
        direction = rule.direction(clip * g.astype(rate.dtype), before, after, factors)
        changes.append(_change(p, direction, rate, decay))
    return changes, _kept(new, moments), new


def _wide(p, scalars, moments):
    """Scalars and moments in the dtype that p is computed in."""
    wide = jnp.promote_types(p.dtype, jnp.float32)
    return [x.astype(wide) for x in scalars], [x.astype(wide) for x in moments]


def _change(p, direction, rate, decay: float):
    return -rate * (direction + decay * p.astype(rate.dtype) if decay else direction)


def _kept(new, old):
    return [x.astype(like.dtype) for x, like in zip(new, old, strict=True)]


# ---- trees ---------------------------------------------------------------------------------------------------------


class Leaves(NamedTuple):
    """The leaves of a tree of parameters or gradients, and what they are called in messages."""

    of: str  # "params" or "grads"
    paths: list[str]
    arrays: list[jax.Array]
    structure: Any


def leaves_of(name: str, of: str, tree: Any) -> Leaves:
    """The leaves of a tree. Raises `TypeError` for one that is not a floating array."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [of + jax.tree_util.keystr(path) for path, _ in found]
    arrays = [checks.array(name, path, leaf) for path, (_, leaf) in zip(paths, found, strict=True)]
    for path, x in zip(paths, arrays, strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: {path} must be of a floating dtype, got {x.dtype}")
    return Leaves(of, paths, arrays, structure)


def _groups(leaves: Sequence[jax.Array], small: int) -> list[list[int]]:
    """The leaves, each alone or with others of its shape, dtype and sharding, in the order of the first of each."""
    alike: dict[Any, list[list[int]]] = collections.defaultdict(list)
    for i, x in enumerate(leaves):
        most = _TOGETHER // max(x.size, 1) if x.size <= small else 1
        groups = alike[x.shape, x.dtype, jax.typeof(x).sharding.spec]
        if groups and len(groups[-1]) < most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(group for groups in alike.values() for group in groups)


def gradients_of(name: str, grads: Any, leaves: Leaves) -> list[jax.Array]:
    """The gradients of the leaves. Raises `ValueError` or `TypeError` with the name of the first that does not fit."""
    given = leaves_of(name, "grads", grads)
    if given.structure != leaves.structure:
        paths = [[path.partition(leaf.of)[2] for path in leaf.paths] for leaf in (leaves, given)]
        odd = next((p for p in [*paths[0], *paths[1]] if (p in paths[0]) != (p in paths[1])), None)
        where = f": only one of them has {odd}" if odd else f", {leaves.structure}, got {given.structure}"
        raise ValueError(f"{name}: grads must be a tree like params{where}")
    for path, p, g in zip(given.paths, leaves.arrays, given.arrays, strict=True):
        if g.shape != p.shape:
            raise ValueError(f"{name}: {path} must have the shape {p.shape} of its parameter, got {g.shape}")
    return given.arrays


def moments_of(
    name: str,
    fields: Sequence[str],
    state: Any,
    leaves: Leaves,
    shapes: Sequence[tuple[int, ...] | None],
    otherwise: str,
) -> list[list[Any]]:
    """The moments in the fields of a state, which have `shapes`, None where those of another leaf hold them too.

    Raises `ValueError` naming one that does not fit; `otherwise`: what it was made for, if not for other parameters.
    """
    return [_moments(name, field, getattr(state, field), leaves, shapes, otherwise) for field in fields]


def _moments(name, field, tree, leaves, shapes, otherwise) -> list[Any]:
    found = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    if len(found) != len(leaves.paths):
        raise ValueError(
            f"{name}: state.{field} must be a tree like params, of {len(leaves.paths)} leaves, got {len(found)}: it "
            "was made for other parameters"
        )
    for path, p, shape, x in zip(leaves.paths, leaves.arrays, shapes, found, strict=True):
        if (None if x is None else jnp.shape(x)) != shape:
            leaf = f"state.{field}{path.removeprefix(leaves.of)}"
            raise ValueError(
                f"{name}: {leaf} must be {_described(shape)} for a parameter {p.shape}, got "
                f"{_described(None if x is None else jnp.shape(x))}: the state was made for other parameters or "
                f"{otherwise}"
            )
    return found


def _described(shape: tuple[int, ...] | None) -> str:
    return "None (its moments lie with those of another leaf)" if shape is None else f"of shape {shape}"


def widest(arrays: Sequence[jax.Array]) -> Any:
    """float32, or float64 if one of the arrays is."""
    return functools.reduce(jnp.promote_types, (x.dtype for x in arrays), jnp.dtype(jnp.float32))


def squares(g: jax.Array) -> jax.Array:
    """Σ g², in float32 at least."""
    return jnp.sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))))


def clipping(norm: jax.Array, max_norm: float) -> jax.Array:
    """What gradients of that norm are multiplied by so that it is at most `max_norm`."""
    return jnp.where(norm < max_norm, 1.0, max_norm / norm)
