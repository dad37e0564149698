"""linear_distillation against its reference and optax; the teacher's part; that no logits are held; bad arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxops.ops.linear_distillation import linear_distillation
from jaxops.reference.linear_distillation import linear_distillation as reference
from tests.compare import check, error

per_token = functools.partial(linear_distillation, reduction="none")
DIFFERENTIABLE = ("x", "weight", "bias")
# tokens, hidden, teacher's hidden, vocab, dtype, temperature. The larger take several chunks and a remainder.
CASES = [
    (1, 1, 1, 1, "float32", 1.0),
    (127, 16, 33, 129, "float32", 3.0),
    (129, 33, 16, 127, "bfloat16", 1.0),
    (100, 7, 5, 128, "float16", 2.0),
    (4100, 4, 3, 1100, "float32", 0.5),
    (0, 8, 8, 50, "float32", 1.0),
]


def operands_of(tokens, hidden, teacher_hidden, vocab):
    random = np.random.default_rng(0)
    shapes = dict(
        x=(tokens, hidden),
        weight=(hidden, vocab),
        teacher_x=(tokens, teacher_hidden),
        teacher_weight=(teacher_hidden, vocab),
        bias=(vocab,),
        teacher_bias=(vocab,),
    )
    made = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    scale = lambda name: shapes[name][0] ** -0.5 if name.endswith("weight") else 1  # logits of the size of the bias
    return {name: x * scale(name) for name, x in made.items()}


@pytest.mark.optimized
@pytest.mark.parametrize(("tokens", "hidden", "teacher_hidden", "vocab", "dtype", "temperature"), CASES)
def test_values_and_gradients(tokens, hidden, teacher_hidden, vocab, dtype, temperature):
    operands = operands_of(tokens, hidden, teacher_hidden, vocab)
    static = dict(differentiable=DIFFERENTIABLE, dtype=dtype, transforms=(), temperature=temperature)
    check(per_token, reference, operands, **static)


@pytest.mark.slow
def test_transforms():
    operands = operands_of(16, 12, 9, 40)
    sharded = {"x": 0, "teacher_x": 0}
    check(per_token, reference, operands, differentiable=DIFFERENTIABLE, sharded=sharded, temperature=2.0)


def small():
    return {name: jnp.asarray(x, jnp.float32) for name, x in operands_of(12, 6, 8, 20).items()}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_optax(reduction):
    o = small()
    for temperature in (1.0, 4.0):
        student, teacher = o["x"] @ o["weight"] + o["bias"], o["teacher_x"] @ o["teacher_weight"] + o["teacher_bias"]
        log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (student, teacher))
        theirs = temperature**2 * optax.losses.kl_divergence_with_log_targets(log_p, log_q)
        reduce = {"mean": jnp.mean, "sum": jnp.sum, "none": lambda x: x}[reduction]
        assert error(linear_distillation(**o, temperature=temperature, reduction=reduction), reduce(theirs)) < 1e-5


def test_the_teacher_is_fixed_and_equal_to_itself():
    o = small()
    loss = lambda o: linear_distillation(**o, temperature=2.0)
    gradients = jax.grad(loss)(o)
    assert all(gradients[name].any() for name in DIFFERENTIABLE)
    assert not any(gradients[name].any() for name in o if name not in DIFFERENTIABLE)
    same = dict(x=o["teacher_x"], weight=o["teacher_weight"], bias=o["teacher_bias"])
    itself, of_itself = jax.value_and_grad(loss)({**o, **same})
    assert 0 <= itself < 1e-5 and all(abs(of_itself[name]).max() < 1e-6 for name in DIFFERENTIABLE)


def test_token_weights():
    o, u = small(), jnp.linspace(0, 2, 12)
    plain = per_token(**o)
    assert error(per_token(**o, token_weights=u), u * plain) < 1e-6
    assert error(linear_distillation(**o, token_weights=u), (u * plain).sum() / u.sum()) < 1e-6
    assert linear_distillation(**o, token_weights=jnp.zeros(12)) == 0
    shaped = {n: x.reshape(3, 4, -1) if n in ("x", "teacher_x") else x for n, x in o.items()}
    assert error(per_token(**shaped, token_weights=u.reshape(3, 4)).ravel(), u * plain) < 1e-6


def test_logits_are_never_held():
    tokens, vocab = 4096, 128_000
    shapes = dict(x=(tokens, 256), weight=(256, vocab), teacher_x=(tokens, 256), teacher_weight=(256, vocab))
    loss = jax.jit(jax.value_and_grad(linear_distillation, (0, 1)))
    compiled = loss.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64e6
    assert not re.findall(rf"\[(?:{tokens},{vocab}|{vocab},{tokens})\]", compiled.as_text())


X, W, TX, TW = jnp.ones((4, 3)), jnp.ones((3, 7)), jnp.ones((4, 5)), jnp.ones((5, 7))


@pytest.mark.parametrize(
    ("operands", "options", "kind", "message"),
    [
        ((X, W.T, TX, TW), {}, ValueError, r"weight must have shape \(3, n\).*is it transposed"),
        ((X, W, TX[:2], TW), {}, ValueError, r"teacher_x must have the leading axes of x, \(4,\)"),
        ((X, W, TX, TW[:, :6]), {}, ValueError, "teacher_weight must have as many columns as weight, 7"),
        ((X, W[:, :0], TX, TW), {}, ValueError, "weight must have at least one column"),
        ((X.astype(int), W, TX, TW), {}, TypeError, "x must be of a floating dtype"),
        ((X, W, TX, TW), dict(bias=X[0]), ValueError, r"bias must have shape \(7,\)"),
        ((X, W, TX, TW), dict(teacher_bias=X[0]), ValueError, r"teacher_bias must have shape \(7,\)"),
        ((X, W, TX, TW), dict(temperature=0), ValueError, "temperature must be above 0"),
        ((X, W, TX, TW), dict(token_weights=X), ValueError, r"token_weights must have shape \(4,\)"),
        ((X, W, TX, TW), dict(reduction="avg"), ValueError, "reduction must be one of"),
        ((X.astype("float16"), W, TX, TW), dict(implementation="pallas"), ValueError, "float32 or bfloat16 on a TPU"),
    ],
)
def test_bad_input(operands, options, kind, message):
    with pytest.raises(kind, match=message):
        linear_distillation(*operands, **options)
