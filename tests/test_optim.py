"""jaxops.optim against optax, step by step, and both against float64; its state, its transforms, its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops import optim

STEPS = 20
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, STEPS, 1e-3)
SHAPES = {"large": (300, 257), "matrices": [(17, 9)] * 2, "vectors": [(33,)] * 2, "scalar": (), "no": (0, 3)}


def is_shape(x):
    return isinstance(x, tuple)


def arrays(seed, dtype=np.float64):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: random.standard_normal(shape).astype(dtype), SHAPES, is_leaf=is_shape)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def clipped(optimizer, max_norm=30.0):
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


# ours, optax's: the same arguments, and clipping.
CASES = {
    "adamw": (
        optim.adamw(1e-2, 0.8, 0.95, 1e-6, weight_decay=0.1),
        optax.adamw(1e-2, 0.8, 0.95, 1e-6, weight_decay=0.1),
    ),
    "adamw, all options": (
        optim.adamw(SCHEDULE, eps_root=1e-6, weight_decay=0.1, mask=matrices, nesterov=True, max_norm=30.0),
        clipped(optax.adamw(SCHEDULE, eps_root=1e-6, weight_decay=0.1, mask=matrices, nesterov=True)),
    ),
    "adamw, nothing shared": (
        optim.adamw(SCHEDULE, mask={name: name == "large" for name in SHAPES}, small=0),
        optax.adamw(SCHEDULE, mask={name: name == "large" for name in SHAPES}),
    ),
    "adamw, b1 = 0": (optim.adamw(1e-2, b1=0.0), optax.adamw(1e-2, b1=0.0)),
    "lion": (optim.lion(1e-2, mask=matrices, max_norm=30.0), clipped(optax.lion(1e-2, mask=matrices))),
    "sgd": (optim.sgd(SCHEDULE, max_norm=30.0), clipped(optax.sgd(SCHEDULE))),
    "momentum": (optim.sgd(1e-2, 0.9), optax.sgd(1e-2, 0.9)),
    "nesterov": (optim.sgd(1e-2, 0.9, nesterov=True), optax.sgd(1e-2, 0.9, nesterov=True)),
}


def trained(params, step, state, gradients):
    """The parameters after every step."""
    found, step = [], jax.jit(step)
    for g in gradients:
        params, state = step(params, g, state)
        found.append(params)
    return found, state


def adding(optimizer):
    """`update` and `optax.apply_updates` as one function like `apply`."""

    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def error(got, exact):
    """The largest error of a leaf, relative to its norm."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    norms = [(np.linalg.norm(np.float64(a) - b), np.linalg.norm(b)) for a, b in pairs]
    return max(distance / norm for distance, norm in norms if norm)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in CASES),
        pytest.param("adamw, all options", "bfloat16", marks=pytest.mark.slow),
        ("lion", "bfloat16"),
    ],
)
def test_twenty_steps_against_float64_and_optax(name, dtype):
    ours, theirs = CASES[name]
    gradients = [arrays(seed, dtype) for seed in range(1, STEPS + 1)]
    params = arrays(0, dtype)
    wide = functools.partial(jax.tree.map, lambda x: np.float64(x))
    with jax.enable_x64(True):
        exact, _ = trained(wide(params), adding(theirs), theirs.init(wide(params)), map(wide, gradients))
    assert exact[-1]["large"].dtype == jnp.float64
    unfused, _ = trained(params, adding(theirs), theirs.init(params), gradients)
    slack = 1e-6 if dtype == "float32" else 4e-3
    if name == "lion":  # a sign that rounding flips is a step in the other direction: few do
        slack *= 10
    for step in (ours.apply, adding(ours)):
        fused, _ = trained(params, step, ours.init(params), gradients)
        for got, plain, true in zip(fused, unfused, exact, strict=True):
            assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
            assert error(got, true) <= 2 * error(plain, true) + slack


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_the_dtypes_of_the_state(mu_dtype):
    params, gradients = arrays(0, "bfloat16"), [arrays(seed, "float32") for seed in range(1, 6)]
    ours = optim.adamw(1e-2, mu_dtype=mu_dtype, nu_dtype="float32", small=0)
    found, state = trained(params, ours.apply, ours.init(params), gradients)
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype or "bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(found[-1])} == {jnp.dtype("bfloat16")}
    squares = [np.square(np.float64(g["large"])) for g in gradients]
    exact = sum(0.001 * 0.999 ** (4 - i) * g2 for i, g2 in enumerate(squares))
    assert error(state.nu["large"], exact) < 1e-6


def test_the_state_is_a_tree_like_the_parameters():
    params = arrays(0, "float32")
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes(optim.adamw(1e-3, small=0).init(params).nu) == shapes(params)
    together = optim.lion(1e-3).init(params).mu
    assert shapes(together) == {
        "large": (300, 257),
        "matrices": [(2, 17, 9), None],
        "vectors": [(2, 33), None],
        "scalar": (),
        "no": (0, 3),
    }
    assert optim.sgd(1e-3).init(params).trace is None


def test_orbax_saves_the_state(tmp_path):
    params = {"a": [np.ones(8, np.float32)] * 3, "w": np.ones((4, 5), np.float32)}
    ours = optim.adamw(1e-2)
    step = jax.jit(ours.apply)
    params, state = step(params, params, ours.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(tmp_path / "state", ours.init(params))
    results = zip(*(jax.tree.leaves(step(params, params, s)) for s in (state, again)), strict=True)
    assert all(np.array_equal(a, b) for a, b in results)


def test_shared_arrays_have_a_largest_size(monkeypatch):
    monkeypatch.setattr(optim, "_TOGETHER", 100)
    params = {str(i): jnp.full((40,), float(i)) for i in range(5)}
    ours = optim.adamw(1e-2)
    state = ours.init(params)
    assert jax.tree.map(jnp.shape, state.mu) == {"0": (2, 40), "1": None, "2": (2, 40), "3": None, "4": (40,)}
    gradients = [jax.tree.map(lambda p: p - seed, params) for seed in range(3)]
    found, _ = trained(params, ours.apply, state, gradients)
    alone, _ = trained(params, optim.adamw(1e-2, small=0).apply, optim.adamw(1e-2, small=0).init(params), gradients)
    assert error(found[-1], jax.tree.map(np.float64, alone[-1])) < 1e-6


def test_where_optax_goes():
    params, grads = arrays(0, "float32"), arrays(1, "float32")
    ours, theirs = (optax.chain(optax.scale(2.0), make(1e-2)) for make in (optim.adamw, optax.adamw))
    got = jax.jit(ours.update)(grads, ours.init(params), params)[0]
    exact = jax.jit(theirs.update)(grads, theirs.init(params), params)[0]
    assert error(got, jax.tree.map(np.float64, exact)) < 1e-4

    injected = optax.inject_hyperparams(optim.sgd, static_args=("momentum", "nesterov", "max_norm", "small"))(
        learning_rate=0.5
    )
    updates, _ = jax.jit(injected.update)(grads, injected.init(params), params)
    assert error(updates, jax.tree.map(lambda g: -0.5 * np.float64(g), grads)) < 1e-6

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optim.lion(0.1, weight_decay=0.0), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3)))))(model))
    assert error(model.kernel[...], np.float64(before) - 0.1) < 1e-6


def test_transforms():
    params, grads = ({"a": [np.float32(arrays(i)["vectors"][j]) for j in range(2)]} for i in range(2))
    # eps of the size of the gradients: without it the first step is a sign, whose derivative is rounding.
    ours, theirs = optim.adamw(0.1, eps=1.0, max_norm=5.0), clipped(optax.adamw(0.1, eps=1.0), 5.0)

    def gradient(step, state):
        def after(grads):
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(step(params, grads, state)[0]))

        return jax.jit(jax.grad(after))(grads)

    exact = jax.tree.map(np.float64, gradient(adding(theirs), theirs.init(params)))
    assert error(gradient(ours.apply, ours.init(params)), exact) < 1e-4
    assert error(gradient(adding(ours), ours.init(params)), exact) < 1e-4

    several = jax.tree.map(lambda *xs: jnp.stack(xs), params, grads)  # two models at once
    got, _ = jax.jit(jax.vmap(ours.apply))(several, several, jax.vmap(ours.init)(several))
    for i, p in enumerate((params, grads)):
        alone, _ = jax.jit(ours.apply)(p, p, ours.init(p))
        # The norm that clips is that of one model.
        assert error(jax.tree.map(lambda x, i=i: x[i], got), jax.tree.map(np.float64, alone)) < 1e-6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("small", [0, 1 << 16])
def test_sharded_leaves(kind, small):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    random = np.random.default_rng(0)
    shapes = {"a": (64, 24), "b": (64, 24), "c": (24, 64), "d": [(16,)] * 3}
    specs = {"a": ("d",), "b": ("d",), "c": (None, "d"), "d": [("d",), (), ()]}
    params, grads = (
        jax.tree.map(lambda shape: random.standard_normal(shape, np.float32), shapes, is_leaf=is_shape) for _ in "pg"
    )
    ours = optim.adamw(1e-2, max_norm=3.0, small=small)
    alone, _ = jax.jit(ours.apply)(params, grads, ours.init(params))
    with jax.set_mesh(mesh):
        at = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec(*spec)), specs, is_leaf=is_shape)
        p, g = jax.device_put((params, grads), (at, at))
        got, _ = jax.jit(ours.apply)(p, g, ours.init(p))
    assert error(got, jax.tree.map(np.float64, alone)) < 1e-6


PARAMS = {"w": np.ones((3, 4), np.float32), "b": [np.ones(4, np.float32)] * 2}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: optim.adamw(1e-3, b1=1.0), ValueError, "adamw: b1 must be below 1, got 1.0"),
        (lambda: optim.adamw(1e-3, eps=-1.0), ValueError, "adamw: eps must be at least 0"),
        (lambda: optim.adamw("fast"), TypeError, "adamw: learning_rate must be a Python number, got str"),
        (lambda: optim.lion(1e-3, mu_dtype="int8"), TypeError, "lion: mu_dtype must be a floating dtype, got int8"),
        (lambda: optim.sgd(1e-3, max_norm=0.0), ValueError, "sgd: max_norm must be above 0, got 0.0"),
        (lambda: optim.adamw(1e-3, small=-1), ValueError, "adamw: small must be at least 0"),
        (lambda: optim.lion(1e-3).init({"w": np.arange(3)}), TypeError, r"params\['w'\] must be of a floating dtype"),
        (
            lambda: optim.sgd(1e-3).apply(PARAMS, {**PARAMS, "w": np.ones((4, 3))}, optim.sgd(1e-3).init(PARAMS)),
            ValueError,
            r"sgd: grads\['w'\] must have the shape \(3, 4\) of its parameter, got \(4, 3\)",
        ),
        (
            lambda: optim.sgd(1e-3).apply(PARAMS, {"w": PARAMS["w"]}, optim.sgd(1e-3).init(PARAMS)),
            ValueError,
            r"sgd: grads must be a tree like params: only one of them has \['b'\]\[0\]",
        ),
        (
            lambda: optim.adamw(1e-3).apply(PARAMS, PARAMS, optim.adamw(1e-3).init({**PARAMS, "w": np.ones((3, 5))})),
            ValueError,
            r"adamw: state.mu\['w'\] must be of shape \(3, 4\) for a parameter \(3, 4\), got of shape \(3, 5\)",
        ),
        (
            lambda: optim.adamw(1e-3).apply(PARAMS, PARAMS, optim.adamw(1e-3, small=0).init(PARAMS)),
            ValueError,
            r"adamw: state.mu\['b'\]\[0\] must be of shape \(2, 4\) .* another `small`",
        ),
        (
            lambda: optim.lion(1e-3).apply(PARAMS, PARAMS, optim.lion(1e-3).init({"w": PARAMS["w"]})),
            ValueError,
            "lion: state.mu must be a tree like params, of 3 leaves, got 1",
        ),
        (
            lambda: optim.adamw(1e-3).update(PARAMS, optim.adamw(1e-3).init(PARAMS)),
            ValueError,
            "adamw: params must be given, as weight_decay is 0.0001, got None",
        ),
        (
            lambda: optim.adamw(1e-3, mask={"v": True}).apply(PARAMS, PARAMS, optim.adamw(1e-3).init(PARAMS)),
            ValueError,
            "adamw: mask must be a tree like params or a prefix of it",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
