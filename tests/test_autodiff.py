"""The lifting of a pair of rules to every order and every nesting of transforms, on an operator one can see through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops.autodiff import Operator, Rules
from tests.compare import error

CALLS: list[str] = []


def _reference(x, scale, shift, *, power):
    """(scale · sin(x)ᵖ + shift[index-free], row maxima): the second output is not differentiable."""
    return scale * jnp.sin(x) ** power + shift, jnp.max(x, -1)


def _forward(x, scale, shift, *, power):
    CALLS.append("forward")
    return _reference(x, scale, shift, power=power), (jnp.sin(x),)


def _backward(x, scale, shift, *, outputs, residuals, cotangents, power):
    CALLS.append("backward")
    del outputs, shift
    (ct, none), (sin,) = cotangents, residuals
    assert none is None
    dx = ct * scale * power * sin ** (power - 1) * jnp.cos(x)
    return {"x": dx, "scale": jnp.sum(ct * sin**power, range(ct.ndim - 1))}


_OPERATOR = Operator(
    "wave",
    ("x", "scale"),
    _reference,
    Rules(_forward, _backward),
    "no TPU kernel",
    "no GPU kernel",
    partition=lambda spec: (spec, PartitionSpec(*spec[:-1])),
)


def wave(x, scale, shift):
    return _OPERATOR(dict(x=x, scale=scale, shift=shift), power=3)[0]


def plain(x, scale, shift):
    return _reference(x, scale, shift, power=3)[0]


def _two_reference(x, scale, shift, *, power):
    """Two differentiable outputs, and one that is not."""
    y, top = _reference(x, scale, shift, power=power)
    return y, x * jnp.cos(scale), top


def _two_forward(x, scale, shift, *, power):
    return _two_reference(x, scale, shift, power=power), (jnp.sin(x),)


def _two_backward(x, scale, shift, *, outputs, residuals, cotangents, power):
    ct, other, none = cotangents
    rest = dict(outputs=outputs, residuals=residuals, cotangents=(ct, none), power=power)
    found = _backward(x, scale, shift, **rest)
    if other is None:
        CALLS.append("without the other")
        return found
    dscale = jnp.sum(-other * x * jnp.sin(scale), range(x.ndim - 1))
    return {"x": found["x"] + other * jnp.cos(scale), "scale": found["scale"] + dscale}


_TWO = Operator(
    "waves",
    ("x", "scale"),
    _two_reference,
    Rules(_two_forward, _two_backward),
    "no TPU kernel",
    "no GPU kernel",
    partition=lambda spec: (spec, spec, PartitionSpec(*spec[:-1])),
    differentiable_outputs=2,
)


def waves(x, scale, shift):
    y, z, _ = _TWO(dict(x=x, scale=scale, shift=shift), power=3)
    return y + z * z


def second_wave(x, scale, shift):
    return _TWO(dict(x=x, scale=scale, shift=shift), power=3)[1]


def plain_waves(x, scale, shift):
    y, z, _ = _two_reference(x, scale, shift, power=3)
    return y + z * z


def plain_second_wave(x, scale, shift):
    return x * jnp.cos(scale)


_R = np.random.default_rng(0)
X = jnp.asarray(_R.standard_normal((8, 6)), jnp.float32)
S = jnp.asarray(_R.standard_normal(6), jnp.float32)
H = jnp.arange(6)  # an integer operand: it takes no gradient


def _total(f, x, s):
    return jnp.sum(jnp.sin(f(x, s, H)))


def _replicated_sum(f, mesh_axes, **kwargs):
    def local(x, s):
        return lax.psum(_total(f, x, s), mesh_axes)

    return jax.shard_map(local, in_specs=(PartitionSpec("d"), PartitionSpec()), out_specs=PartitionSpec(), **kwargs)


def _mesh(kinds=(AxisType.Auto,), shape=(8,), names=("d",)):
    return jax.make_mesh(shape, names, axis_types=kinds)


def _placed(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def _explicit(f, kinds, order):
    mesh = _mesh(kinds, (4, 2), ("d", "e"))
    g = jax.grad(lambda x, s: _total(f, x, s), (0, 1))
    if order == 2:
        first = g
        g = lambda x, s: jax.jvp(first, (x, s), (x, s))[1]
    with jax.set_mesh(mesh):
        return jax.jit(g)(_placed(mesh, X, PartitionSpec("d", None)), _placed(mesh, S, PartitionSpec()))


CASES = {
    "gradient of one operand": lambda f: jax.grad(lambda s: _total(f, X, s))(S),
    "hessian": lambda f: jax.hessian(lambda x, s: _total(f, x, s), (0, 1))(X[0], S),
    "reverse over forward": lambda f: jax.grad(lambda x: jax.jvp(lambda x: _total(f, x, S), (x,), (x,))[1])(X),
    "forward over forward": lambda f: jax.jvp(lambda x: jax.jvp(lambda x: f(x, S, H), (x,), (x,))[1], (X,), (X,)),
    "third order": lambda f: jax.grad(jax.grad(jax.grad(lambda a: _total(f, a * X, S))))(1.3),
    "fourth order": lambda f: jax.jvp(jax.grad(jax.grad(jax.grad(lambda a: _total(f, a * X, S)))), (1.3,), (1.0,)),
    "nested vmap, different operands": lambda f: jax.vmap(
        jax.vmap(jax.grad(lambda x, s: _total(f, x, s), (0, 1)), (0, None)), (None, 0)
    )(X, jnp.stack([S, 2 * S])),
    "vmap over an inner axis": lambda f: jax.vmap(lambda x: f(x, 1.5 * S[:8], H), in_axes=1, out_axes=1)(
        jnp.stack([X, 2 * X], 1)
    ),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(lambda x, s: _total(f, x, s)), (0, None))(X[:2], S),
    "grad of nested vmap": lambda f: jax.grad(
        lambda x, s: jax.vmap(lambda x: jax.vmap(lambda a: _total(f, a * x, s))(jnp.arange(3.0)).sum(), 0)(x).sum(),
        (0, 1),
    )(X, S),
    "jacobian of the mapped": lambda f: jax.jacrev(lambda s: jax.vmap(f, (0, None, None))(X[:2], s, H))(S),
    "checkpoint in scan": lambda f: jax.grad(
        lambda x: lax.scan(jax.checkpoint(lambda c, _: (c + 0.1 * f(c, S, H), None)), x, None, length=3)[0].sum()
    )(X),
    "second order in scan": lambda f: lax.scan(
        lambda c, _: (c - 0.1 * jax.grad(lambda x: jnp.sum(jax.grad(lambda y: _total(f, y, S))(x) ** 2))(c), None),
        X,
        None,
        length=2,
    )[0],
    "cond": lambda f: jax.grad(lambda x: lax.cond(x[0, 0] > 9, lambda x: x.sum(), lambda x: _total(f, x, S), x))(X),
    "shard_map": lambda f: jax.jit(jax.grad(_replicated_sum(f, "d", mesh=_mesh()), (0, 1)))(X, S),
    "shard_map, eager": lambda f: jax.grad(_replicated_sum(f, "d", mesh=_mesh()), (0, 1))(X, S),
    "shard_map, unchecked": lambda f: jax.jit(jax.grad(_replicated_sum(f, "d", mesh=_mesh(), check_vma=False), (0, 1)))(
        X, S
    ),
    "shard_map, second order": lambda f: jax.jit(
        lambda x, s: jax.jvp(jax.grad(_replicated_sum(f, "d", mesh=_mesh()), (0, 1)), (x, s), (x, s))
    )(X, S),
    "shard_map over one of two axes": lambda f: jax.jit(
        jax.grad(
            _replicated_sum(f, "d", mesh=_mesh((AxisType.Auto,) * 2, (4, 2), ("d", "e")), axis_names={"d"}), (0, 1)
        )
    )(X, S),
    "vmap of shard_map": lambda f: jax.jit(
        jax.vmap(jax.grad(_replicated_sum(f, "d", mesh=_mesh()), (0, 1)), (0, None))
    )(jnp.stack([X, 2 * X]), S),
    "explicit": lambda f: _explicit(f, (AxisType.Explicit, AxisType.Explicit), 1),
    "explicit, second order": lambda f: _explicit(f, (AxisType.Explicit, AxisType.Explicit), 2),
    "explicit and automatic": lambda f: _explicit(f, (AxisType.Explicit, AxisType.Auto), 1),
}


OF_TWO_OUTPUTS = (
    "gradient of one operand",
    "hessian",
    "fourth order",
    "nested vmap, different operands",
    "grad of nested vmap",
    "second order in scan",
    "shard_map, second order",
    "explicit, second order",
)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        *(pytest.param(name, wave, plain, id=name) for name in CASES),
        *(pytest.param(name, waves, plain_waves, id=f"two outputs: {name}") for name in OF_TWO_OUTPUTS),
        *(pytest.param(name, second_wave, plain_second_wave, id=f"the second: {name}") for name in OF_TWO_OUTPUTS[:3]),
    ],
)
def test_equals_jax_own(name, ours, theirs):
    meshes = name.startswith(("shard_map", "explicit"))
    got, want = ((CASES[name](f) if meshes else jax.jit(lambda f=f: CASES[name](f))()) for f in (ours, theirs))
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want), strict=True):
        assert a.shape == b.shape
        assert error(jax.device_get(a), jax.device_get(b)) < 1e-5, f"{name}{jax.tree_util.keystr(path)}"


def test_reverse_mode_meets_only_the_two_rules():
    jax.clear_caches()
    CALLS.clear()
    traced = jax.jit(jax.grad(lambda x, s: _total(wave, x, s), (0, 1))).trace(X, S)
    phases = [e.params["call"].phase for e in _operators(traced.jaxpr.jaxpr)]
    assert sorted(phases) == ["backward", "forward"]
    traced.lower()
    assert {"forward", "backward"} <= set(CALLS)


def test_forward_mode_meets_no_backward_rule():
    traced = jax.jit(lambda x: jax.jvp(lambda x: wave(x, S, H), (x,), (x,))).trace(X)
    assert {e.params["call"].phase for e in _operators(traced.jaxpr.jaxpr)} == {"forward", "tangent"}


def test_an_output_without_a_cotangent_is_left_out():
    CALLS.clear()
    first = lambda f: lambda x, s: jnp.sum(jnp.sin(f(x, s)))
    ours, theirs = first(lambda x, s: _TWO(dict(x=x, scale=s, shift=H), power=3)[0]), first(lambda x, s: plain(x, s, H))
    for transform in (
        lambda g: jax.grad(g, (0, 1))(X, S),
        lambda g: jax.grad(lambda x: jnp.sum(jax.grad(g)(x, S) ** 2))(X),
        lambda g: jax.jvp(lambda x: jax.grad(g)(x, S), (X,), (X,)),
        lambda g: jax.vmap(jax.grad(g), (0, None))(jnp.stack([X, 2 * X]), S),
    ):
        got, want = (jax.jit(lambda f=f, transform=transform: transform(f))() for f in (ours, theirs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert error(a, b) < 1e-5
    assert "without the other" in CALLS


def test_the_second_output_is_a_constant_to_every_derivative():
    g = jax.grad(lambda x: _OPERATOR(dict(x=x, scale=S, shift=H), power=3)[1].sum())(X)
    np.testing.assert_array_equal(g, 0)


def test_an_unmapped_operand_is_not_copied_by_vmap():
    traced = jax.jit(jax.vmap(wave, (0, None, None))).trace(jnp.stack([X, X]), S, H)
    (call,) = _operators(traced.jaxpr.jaxpr)
    assert [v.aval.shape for v in call.invars] == [(2, 8, 6), (6,), (6,)]


def test_empty_operands_give_empty_results_and_zero_gradients():
    empty = X[:0]
    assert wave(empty, S, H).shape == (0, 6)
    dx, ds = jax.grad(lambda x, s: _total(wave, x, s), (0, 1))(empty, S)
    assert dx.shape == (0, 6)
    np.testing.assert_array_equal(ds, 0)


def test_equal_calls_compile_once():
    f = functools.partial(wave, X, S)
    f(H)
    before = len(CALLS)
    for _ in range(3):
        f(H)
    assert len(CALLS) == before


def _operators(jaxpr):
    from jaxops.inspection import operator_calls

    return list(operator_calls(jaxpr))
