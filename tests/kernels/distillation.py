"""Distillation by kernels, by the reference, and by the reference in float64: outputs and gradients by name."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.reference.linear_distillation import linear_distillation as reference


def data(tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, dtype):
    """(operands by name, the cotangent of the loss)."""
    random = np.random.default_rng(0)
    shapes = {
        "x": (tokens, hidden),
        "weight": (hidden, vocab),
        "teacher_x": (tokens, teacher_hidden),
        "teacher_weight": (teacher_hidden, vocab),
    } | {name: (vocab,) for name, there in (("bias", bias), ("teacher_bias", teacher_bias)) if there}
    made = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    scale = lambda name: shapes[name][0] ** -0.5 if name.endswith("weight") else 1
    operands = {name: jnp.asarray(x * scale(name), dtype) for name, x in made.items()}
    return operands, jnp.asarray(random.standard_normal(tokens), jnp.float32)


def fused(kernel, operands, g, temperature, tiles):
    """By the module of kernels `kernel`."""
    assert kernel.unsupported(**operands, temperature=temperature) is None
    outputs, residuals = kernel.forward(**operands, temperature=temperature, tiles=tiles)
    passed = dict(outputs=outputs, residuals=residuals, cotangents=(g, None, None))
    gradients = kernel.backward(**operands, **passed, temperature=temperature, tiles=tiles)
    return dict(zip(("loss", "lse", "teacher_lse"), outputs, strict=True)) | gradients


def plain(operands, g, temperature):
    """By the reference, in the dtype of the operands, g in that of its loss."""
    moving = {name: x for name, x in operands.items() if name in ("x", "weight", "bias")}
    f = lambda moving: reference(**(operands | moving), temperature=temperature)
    (loss, *lses), pull = jax.vjp(f, moving)
    zeros = [jnp.zeros_like(lse) for lse in lses]
    named = dict(zip(("loss", "lse", "teacher_lse"), (loss, *lses), strict=True))
    return named | pull((g.astype(loss.dtype), *zeros))[0]


def exact(operands, g, temperature):
    """By the reference in float64."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in operands.items()}
        return jax.tree.map(np.asarray, plain(wide, g, temperature))
