"""linear_cross_entropy against its reference and optax; that the logits are never held; bad labels and arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops.ops.linear_cross_entropy import linear_cross_entropy, loss_and_lse
from jaxops.reference.linear_cross_entropy import linear_cross_entropy as reference
from tests.compare import check, error, some_and_all

per_token = functools.partial(linear_cross_entropy, reduction="none")
PLAIN = dict(label_smoothing=0.0, z_loss=0.0, logits_soft_cap=None)
ALL = dict(label_smoothing=0.1, z_loss=1e-2, logits_soft_cap=5.0)
# tokens, hidden, vocab, bias, dtype, options. The larger ones take several chunks of the vocabulary and a remainder.
CASES = [
    (1, 1, 1, False, "float32", PLAIN),
    (127, 16, 129, False, "float32", PLAIN),
    (128, 128, 1000, True, "float32", ALL),
    (129, 33, 127, True, "bfloat16", PLAIN),
    (1000, 7, 128, True, "float16", dict(PLAIN, label_smoothing=0.2)),
    (5, 8, 50, True, "float32", dict(PLAIN, logits_soft_cap=2.0)),
    (5, 8, 50, False, "float32", dict(PLAIN, z_loss=0.1)),
    (8200, 4, 1100, True, "float32", ALL),
    (127, 8, 70000, False, "bfloat16", PLAIN),
    (0, 8, 50, True, "float32", PLAIN),
    (3, 0, 50, True, "float32", PLAIN),
]


def operands_of(tokens, hidden, vocab, bias):
    random = np.random.default_rng(0)
    made = dict(
        x=random.standard_normal((tokens, hidden)),
        weight=random.standard_normal((hidden, vocab)),
        labels=random.integers(0, vocab, tokens, dtype=np.int32),
        bias=random.standard_normal(vocab),
    )
    return made if bias else {name: x for name, x in made.items() if name != "bias"}


def differentiable(operands):
    return tuple(name for name in operands if name != "labels")


@pytest.mark.optimized
@pytest.mark.parametrize(("tokens", "hidden", "vocab", "bias", "dtype", "static"), CASES)
def test_values_and_gradients(tokens, hidden, vocab, bias, dtype, static):
    operands = operands_of(tokens, hidden, vocab, bias)
    check(per_token, reference, operands, differentiable=differentiable(operands), dtype=dtype, transforms=(), **static)


@some_and_all
def test_transforms(transforms):
    operands = operands_of(16, 12, 40, True)
    options = dict(differentiable=differentiable(operands), sharded={"x": 0, "labels": 0}, transforms=transforms)
    check(per_token, reference, operands, **options, **ALL)


def scaled_loss_and_lse(x, weight, labels, bias=None, *, function=loss_and_lse, **static):
    """One output of both: the gradient of each depends on the other."""
    more = {} if function is reference else {"implementation": None}
    loss, lse = function(x, weight, labels, bias, **static, **more)
    return loss * jnp.sin(lse)


@pytest.mark.parametrize("static", [PLAIN, ALL], ids=["plain", "all"])
def test_lse_has_a_gradient_and_a_label_may_be_none(static):
    operands = operands_of(300, 12, 1100, True)
    operands["labels"][::3] = -1
    check(
        scaled_loss_and_lse,
        functools.partial(scaled_loss_and_lse, function=reference),
        operands,
        differentiable=differentiable(operands),
        transforms=("hessian-vector product", "vmap of grad") if static is ALL else (),
        **static,
    )


def small(dtype=jnp.float32):
    operands = operands_of(12, 6, 20, True)
    return {name: jnp.asarray(x, dtype if name != "labels" else None) for name, x in operands.items()}


def test_against_optax():
    o = small()
    theirs = optax.softmax_cross_entropy_with_integer_labels(o["x"] @ o["weight"] + o["bias"], o["labels"])
    assert error(per_token(**o), theirs) < 1e-5
    assert error(linear_cross_entropy(**o), theirs.mean()) < 1e-5
    assert error(linear_cross_entropy(**o, reduction="sum"), theirs.sum()) < 1e-5


def test_ignored_tokens_count_nowhere():
    o = small()
    loss = lambda x, labels, **options: linear_cross_entropy(x, o["weight"], labels, **options)
    labels = o["labels"].at[jnp.array([1, 5])].set(-100)
    kept = np.delete(np.arange(12), [1, 5])
    mean, gradient = jax.value_and_grad(loss)(o["x"], labels, ignore_index=-100)
    assert error(mean, loss(o["x"][kept], labels[kept])) < 1e-6
    assert not gradient[1].any() and not gradient[5].any() and gradient[0].any()
    mean, gradient = jax.value_and_grad(loss)(o["x"], jnp.full(12, 3), ignore_index=3)
    assert mean == 0 and not gradient.any()


def test_token_weights_count_in_the_loss_its_mean_and_have_a_gradient():
    o, u = small(), jnp.linspace(0, 2, 12).at[3].set(0)
    plain = per_token(**o)
    assert error(per_token(**o, token_weights=u), u * plain) < 1e-6
    assert error(linear_cross_entropy(**o, token_weights=u), (u * plain).sum() / u.sum()) < 1e-6
    labels = o["labels"].at[5].set(-1)
    ignored = {**o, "labels": labels, "ignore_index": -1}
    kept = u.at[5].set(0)
    assert error(linear_cross_entropy(**ignored, token_weights=u), (kept * plain).sum() / kept.sum()) < 1e-6
    assert linear_cross_entropy(**o, token_weights=jnp.zeros(12)) == 0
    of_u = jax.grad(lambda u: linear_cross_entropy(**ignored, token_weights=u, reduction="sum"))(u)
    assert error(of_u, plain.at[5].set(0)) < 1e-6
    of_x = jax.grad(lambda x: linear_cross_entropy(**{**o, "x": x}, token_weights=u, reduction="sum"))(o["x"])
    plain_of_x = jax.grad(lambda x: linear_cross_entropy(**{**o, "x": x}, reduction="sum"))(o["x"])
    assert error(of_x, u[:, None] * plain_of_x) < 1e-6 and not of_x[3].any()


def test_float16_gradients_of_a_mean_do_not_underflow():
    random = np.random.default_rng(743)
    x, weight = (jnp.asarray(random.standard_normal(shape), "float16") for shape in ((4096, 16), (16, 1000)))
    labels = jnp.asarray(random.integers(0, 1000, 4096))
    with jax.enable_x64(True):
        exact = jax.grad(lambda *wide: reference(*wide, labels, **ALL)[0].mean(), (0, 1))
        exact = exact(x.astype("float64"), weight.astype("float64"))
    loss = functools.partial(linear_cross_entropy, labels=labels, **ALL)
    gradients = lambda scale: jax.grad(lambda x, w: scale * loss(x, w), (0, 1))(x, weight)
    for got, oracle, of_nothing in zip(gradients(1), exact, gradients(0), strict=True):
        assert error(got, np.asarray(oracle)) < 1e-3  # rounded as they are, they are wrong by 5e-3 and 9e-3
        assert not jnp.any(of_nothing)


def test_leading_axes_and_label_dtypes():
    o = small()
    flat = per_token(**o)
    shaped = {**o, "x": o["x"].reshape(2, 3, 2, 6), "labels": o["labels"].reshape(2, 3, 2).astype(jnp.uint8)}
    np.testing.assert_array_equal(per_token(**shaped).reshape(-1), flat)
    one = per_token(o["x"][0], o["weight"], o["labels"][0], bias=o["bias"])
    assert one.shape == () and error(one, flat[0]) < 1e-6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_and_sequence_over_devices(kind):
    o = small()
    x, labels = jnp.tile(o["x"], (8, 1)).reshape(8, 12, 6), jnp.tile(o["labels"], 8).reshape(8, 12)
    loss = jax.value_and_grad(lambda x, weight, labels: linear_cross_entropy(x, weight, labels), (0, 1))
    want = loss(x, o["weight"], labels)
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("d"))
        got = jax.jit(loss)(
            jax.device_put(x, split),
            jax.device_put(o["weight"], NamedSharding(mesh, PartitionSpec())),
            jax.device_put(labels, split),
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(jax.device_get(a), b) < 1e-5


@pytest.mark.parametrize("label", [-1, 20, 2**31 - 1])
def test_a_label_out_of_range_gives_nan(label):
    o = small()
    loss = per_token(**{**o, "labels": o["labels"].at[2].set(label)})
    assert np.isnan(loss[2]) and np.isfinite(np.delete(loss, 2)).all()


SIZES = [(4096, 256, 128_000), (4096, 1024, 128_000), (2048, 512, 50_257)]


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SIZES)
def test_logits_are_never_held(tokens, hidden, vocab):
    shapes = dict(x=(tokens, hidden), weight=(hidden, vocab))
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    loss = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))
    compiled = loss.lower(x, weight, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64e6
    assert not re.findall(rf"\[(?:{tokens},{vocab}|{vocab},{tokens})\]", compiled.as_text())


X, W, L = jnp.ones((4, 3)), jnp.ones((3, 7)), jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: linear_cross_entropy(X, W.T, L), ValueError, r"weight must have shape \(3, n\).*is it transposed"),
        (lambda: linear_cross_entropy(X, W[:, :0], L), ValueError, "weight must have at least one column"),
        (lambda: linear_cross_entropy(X, W, L[:3]), ValueError, r"labels must have shape \(4,\).*got \(3,\)"),
        (lambda: linear_cross_entropy(X, W, X[:, 0]), TypeError, "labels must be of an integer dtype, got float32"),
        (lambda: linear_cross_entropy(X, W, L, bias=X[0]), ValueError, r"bias must have shape \(7,\)"),
        (lambda: linear_cross_entropy(X, W, L, token_weights=X), ValueError, r"token_weights must have shape \(4,\)"),
        (lambda: linear_cross_entropy(X, W, L, token_weights=L), TypeError, "token_weights must be of a floating"),
        (lambda: linear_cross_entropy(L[:, None], W[:1], L), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: linear_cross_entropy(X, W, L, label_smoothing=1.0), ValueError, r"must be in \[0, 1\), got 1"),
        (lambda: linear_cross_entropy(X, W, L, z_loss=-1), ValueError, "z_loss must be at least 0"),
        (lambda: linear_cross_entropy(X, W, L, logits_soft_cap=0), ValueError, "logits_soft_cap must be above 0"),
        (lambda: linear_cross_entropy(X, W, L, ignore_index=1.5), TypeError, "ignore_index must be None or a"),
        (lambda: linear_cross_entropy(X, W, L, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda: linear_cross_entropy(X, W, L, implementation="cuda"), ValueError, "implementation must be"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
