"""Conjugate pairs: what each sends forward and backward, and that the gradient is that of the whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import sharding
from tests.compare import error
from tests.sharding.traffic import compiled, sent

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16)), jnp.float32)
WHOLE, SHARD = X.size * 4, X.size // 4 * 4
# name: (function of the local x, spec of x, spec of y, the same of whole arrays, sent forward, sent backward).
# Each device multiplies by its number, so that what varies is not the same by accident.
NUMBER = lambda: 1.0 + lax.axis_index("tensor")
PAIRS = {
    "copy": (lambda x: sharding.copy(x, "tensor") * NUMBER(), P(), P("tensor"), lambda x: [x, 2 * x, 3 * x, 4 * x],
             {}, {"all-reduce": WHOLE}),
    "psum": (lambda x: lax.psum(x, "tensor"), P("tensor"), P(), lambda x: sum(jnp.split(x, 4)),
             {"all-reduce": SHARD}, {}),
    "all_gather": (lambda x: sharding.all_gather(x, "tensor", 0) * NUMBER(), P("tensor"), P("tensor"),
                   lambda x: [x, 2 * x, 3 * x, 4 * x], {"all-gather": WHOLE}, {"reduce-scatter": WHOLE}),
    "reduce_scatter": (lambda x: sharding.reduce_scatter(sharding.copy(x, "tensor") * NUMBER(), "tensor", 1), P(),
                       P(None, "tensor"), lambda x: 10 * x, {"reduce-scatter": WHOLE},
                       {"all-gather": WHOLE, "all-reduce": WHOLE}),
    "all_gather_same": (lambda x: sharding.all_gather_same(x, "tensor", -1), P(None, "tensor"), P(), lambda x: x,
                        {"all-gather": WHOLE}, {}),
    "all_to_all": (lambda x: sharding.all_to_all(x, "tensor", 1, 0), P("tensor"), P(None, "tensor"), lambda x: x,
                   {"all-to-all": SHARD}, {"all-to-all": SHARD}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_conjugate_pairs(name):
    function, spec, out_spec, plain, forward, backward = PAIRS[name]
    mesh = sharding.make_mesh(data=2, tensor=4)
    local = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec)
    whole = lambda x: jnp.concatenate(y) if isinstance(y := plain(x), list) else y
    y, pull = jax.vjp(whole, X)
    ct = jnp.cos(y)
    programs = compiled(local, X), compiled(lambda x, ct: jax.vjp(local, x)[1](ct)[0], X, ct)
    assert error(programs[0](X), y) < 1e-6 and error(programs[1](X, ct), pull(ct)[0]) < 1e-6
    for program, expected in zip(programs, (forward, backward), strict=True):
        assert sent(program, dict(mesh.shape)) == {(kind, "tensor"): count for kind, count in expected.items()}


def test_an_array_is_copied_once():
    """Two products that share a copy sum one gradient; two that copy for themselves would sum two."""
    mesh = sharding.make_mesh(tensor=8)

    def f(x):
        x = sharding.copy(sharding.copy(x, "tensor"), "tensor")
        return lax.psum(jnp.sin(x * lax.axis_index("tensor")) * jnp.cos(x), "tensor")

    gradient = jax.grad(lambda x: jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P())(x).sum())
    kinds = sent(compiled(gradient, X), dict(mesh.shape))
    assert kinds == {("all-reduce", "tensor"): WHOLE}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: sharding.reduce_scatter(x, "tensor", 1),
            r"x has shape \(8, 15\), its dimension 1 must be a .* of 8",
        ),
        (lambda x: sharding.all_to_all(x, "tensor", -1, 0), r"all_to_all: .*dimension 1 .* multiple of 8.*'tensor'"),
        (
            lambda x: sharding.copy(x, "heads"),
            "copy: axis must be a mesh axis of an enclosing .*got 'heads', with axes",
        ),
        (lambda x: sharding.all_gather(x, "heads", 0), "all_gather: axis must be a mesh axis"),
    ],
    ids=["reduce_scatter", "all_to_all", "copy", "all_gather"],
)
def test_bad_input(function, message):
    mesh = sharding.make_mesh(tensor=8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P("tensor")), X[:, :15])
    with pytest.raises(ValueError, match="with no shard_map there"):
        function(X)
