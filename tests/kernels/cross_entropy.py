"""Calls of the linear_cross_entropy kernels in small, and what they are compared with: float64, and plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np

f32 = jnp.float32
STATIC = ("label_smoothing", "z_loss", "logits_soft_cap")
PLAIN, SMOOTH, Z_LOSS, CAP = (0.0, 0.0, None), (0.1, 0.0, None), (0.0, 1e-2, None), (0.0, 0.0, 2.0)
ALL = (0.1, 1e-2, 2.0)


def oracle(x, weight, labels, g, bias, label_smoothing, z_loss, logits_soft_cap, dlse=0.0):
    """float64: loss, lse and the gradients by name."""
    x, weight, g = (np.asarray(a, np.float64) for a in (x, weight, g))
    labels, vocab = np.asarray(labels), weight.shape[1]
    z = x @ weight + (0 if bias is None else np.asarray(bias, np.float64))
    bend = 1.0
    if logits_soft_cap is not None:
        z = np.tanh(z / logits_soft_cap)
        z, bend = logits_soft_cap * z, 1 - z * z
    top = z.max(1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0]
    picked = np.arange(vocab) == labels[:, None]
    target = (1 - label_smoothing) * picked + label_smoothing / vocab
    loss = lse - (target * z).sum(1) + z_loss * lse**2
    p = np.exp(z - lse[:, None])
    dz = (
        g[:, None] * ((1 + 2 * z_loss * lse[:, None]) * p - target) + np.asarray(dlse, np.float64)[..., None] * p
    ) * bend
    out = {"loss": loss, "lse": lse, "x": dz @ weight.T, "weight": x.T @ dz}
    return out if bias is None else out | {"bias": dz.sum(0)}


def unfused(x, weight, labels, g, bias, label_smoothing, z_loss, logits_soft_cap, dlse=0.0):
    """XLA's own, with the logits in memory, in the operands' dtype as a product gives them."""
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})

    def f(named):
        z = (named["x"] @ named["weight"]).astype(f32)
        if bias is not None:
            z = z + named["bias"].astype(f32)
        if logits_soft_cap is not None:
            z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
        lse = jax.nn.logsumexp(z, axis=1)
        picked = jnp.where(labels < 0, 0, jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], 1)[:, 0])
        loss = lse - (1 - label_smoothing) * picked - label_smoothing * z.mean(1) + z_loss * lse**2
        return loss, lse

    (loss, lse), pull = jax.vjp(f, named)
    return {"loss": loss, "lse": lse} | pull((g, jnp.broadcast_to(jnp.asarray(dlse, f32), lse.shape)))[0]


def data(tokens, hidden, vocab, dtype, bias_dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), dtype)
    weight = jnp.asarray(rng.standard_normal((hidden, vocab)) / np.sqrt(hidden), dtype)
    labels = jnp.asarray(rng.integers(0, vocab, tokens).clip(0, vocab - 1), jnp.int32).at[-1].set(vocab - 1)
    g = jnp.asarray(rng.standard_normal(tokens), f32)
    bias = None if bias_dtype is None else jnp.asarray(rng.standard_normal(vocab), bias_dtype)
    return x, weight, labels, g, bias


def check(got, want, plain, dtypes):
    """The error of each result is at most twice the unfused one, plus four float32 roundings of its largest entry."""
    for name, exact in want.items():
        assert got[name].dtype == dtypes[name] and got[name].shape == exact.shape, name
        error, peer = (np.abs(np.asarray(a[name], np.float64) - exact).max() for a in (got, plain))
        atol = 4 * float(jnp.finfo(f32).eps) * (1 + np.abs(exact).max())
        assert error <= 2 * peer + atol, f"{name}: error {error:.3g}, unfused {peer:.3g}"
