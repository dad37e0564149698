"""Pruned layers and models: rules, masks through training, what is stored in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxops
from jaxops.nn import BlockSparseLinear, PrunedLinear, Pruning, Sparse24Linear, convert, prune_model, update_masks

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 16)), jnp.float32)


def model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(16, 32, rngs=rngs),
        nnx.relu,
        nnx.LinearGeneral(32, (4, 8), rngs=rngs),
        nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs),
        nnx.Linear(16, 3, rngs=rngs),
    )


RULES = [
    ("layers/0", Pruning(0.75, "blocks", (4, 8))),
    ("layers/2", Pruning(pattern="2:4")),
    ("layers/3", Pruning(0.5)),
    ("", None),
]


def test_pruned_trained_and_converted():
    dense = model()
    pruned, report = prune_model(dense, RULES)
    assert [layer.path for layer in report.layers] == ["layers/0", "layers/2", "layers/3"]
    assert "blocks of 4 × 8, 75% zero" in str(report) and "2:4" in str(report)
    optimizer = nnx.Optimizer(pruned, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(pruned, optimizer):
        optimizer.update(pruned, nnx.grad(lambda m: jnp.square(m(X) - 1).mean())(pruned))

    masks = [np.asarray(pruned.layers[i].mask[...]) for i in (0, 2, 3)]
    for _ in range(3):
        step(pruned, optimizer)
    small = convert(pruned)
    kinds = [type(layer) for layer in small.layers if isinstance(layer, nnx.Module)]
    assert kinds == [BlockSparseLinear, Sparse24Linear, nnx.LinearGeneral, nnx.Linear]
    np.testing.assert_allclose(jax.jit(lambda x: small(x))(X), pruned(X), rtol=1e-5, atol=1e-5)
    for i, mask in zip((0, 2, 3), masks, strict=True):
        np.testing.assert_array_equal(pruned.layers[i].mask[...], mask)
        np.testing.assert_array_equal(np.asarray(pruned.layers[i].kernel()) != 0, mask)
    assert not np.array_equal(pruned.layers[0].kernel(), np.where(masks[0], dense.layers[0].kernel[...], 0))
    stored = sum(x.nbytes for x in jax.tree.leaves(nnx.state(small)))
    assert stored == report.bytes_after < report.bytes_before
    # what is stored can be trained on
    gradient = nnx.grad(lambda m: jnp.square(m(X)).mean())(small)
    assert gradient["layers"][0]["blocks"][...].shape == (4, 4, 8)


def test_masks_follow_a_schedule():
    pruned, _ = prune_model(model(), RULES)
    share = lambda i: 1 - float(pruned.layers[i].mask[...].mean())
    sparsity = jaxops.pruning_schedule(0.75, 0, 10)
    at = nnx.jit(lambda pruned, number: update_masks(pruned, sparsity(number)))
    for number, blocks, numbers in ((0, 0, 0), (2, 6 / 16, 0.366), (10, 0.75, 0.5)):
        at(pruned, number)
        assert share(0) == blocks and share(2) == 0.5 and abs(share(3) - numbers) < 1e-3
    pruned.layers[3].layer.kernel.set_value(pruned.layers[3].layer.kernel[...].at[0].set(0))
    update_masks(pruned)
    assert not pruned.layers[3].mask[0].any() and share(3) == 0.5


def test_bad_input():
    wrong = [
        (
            lambda: prune_model(model(), [("", Pruning(0.5, "blocks", (5, 5)))]),
            r"layers/0: .*blocks of 5 × 5 must divide",
        ),
        (lambda: prune_model(model(), [("head", Pruning(0.5))]), "prune_model: the rules find no layer; those of the"),
        (lambda: update_masks(model()), "must hold layers of `prune_model`, got none"),
        (lambda: convert(model()), "must hold layers of `quantization_aware` or `prune_model`, got none"),
        (lambda: Pruning(0.5, "2:4"), "Pruning: sparsity must be given, but for pattern='2:4'"),
        (lambda: Pruning(1.5), "Pruning: sparsity must be from 0 to 1, got 1.5"),
        (lambda: Pruning(0.5, "blocks"), "Pruning: block must be given"),
    ]
    for make, message in wrong:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"linear must be an nnx\.Linear"):
        PrunedLinear(nnx.relu, Pruning(0.5))
