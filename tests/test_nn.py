"""Layers against Flax's own with the same parameters, decoding against whole sequences, Linen against NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx

import jaxops.nn
from jaxops.nn import linen

WIDTH = 24
BFLOAT16 = {"dtype": jnp.bfloat16}


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def twins(ours, theirs, *args, **kwargs):
    """The same layer of both libraries with the same random parameters."""
    layers = ours(*args, rngs=nnx.Rngs(0), **kwargs), theirs(*args, rngs=nnx.Rngs(1), **kwargs)
    state = nnx.state(layers[0], nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    state = jax.tree.unflatten(tree, [data(*leaf.shape, seed=i) * 0.3 for i, leaf in enumerate(leaves)])
    for layer in layers:
        nnx.update(layer, state)
    return layers


def agree(ours, theirs, *args, tolerance=2e-5, gradients=True, **call):
    """Value, and gradients by input and parameters, of two layers with equal parameters."""

    def results(layer):
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

        def value(parameters, *args):
            # Variables of this trace: batch norm changes its own.
            return nnx.merge(graph, parameters, jax.tree.map(lambda a: a, rest))(*args, **call)

        def loss(*args):
            y = value(*args)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y

        f = jax.grad(loss, argnums=(0, 1), has_aux=True) if gradients else value
        return jax.tree.leaves(jax.jit(f)(parameters, *args))

    found, expected = results(ours), results(theirs)
    # What is 0 but for rounding (the gradient by the bias of the keys) is judged by the size of the rest.
    atol = tolerance * max(float(jnp.abs(leaf).max()) for leaf in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=atol)


NORMS = {
    "plain": {},
    "bfloat16": BFLOAT16,
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "no scale": {"use_scale": False},
    "epsilon": {"epsilon": 0.1},
    "other axis, served by flax": {"reduction_axes": 1, "feature_axes": -1},
}


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("case", NORMS)
def test_norm_is_flax_norm(name, case):
    tolerance = 2e-2 if "bfloat16" in case else 2e-5
    agree(
        *twins(getattr(jaxops.nn, name), getattr(nnx, name), WIDTH, **NORMS[case]),
        data(3, 5, WIDTH),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norm_with_mask_and_offset(name):
    ours, theirs = twins(getattr(jaxops.nn, name), getattr(nnx, name), WIDTH)
    agree(ours, theirs, data(3, WIDTH), mask=jnp.arange(WIDTH) < 7)
    offset = getattr(jaxops.nn, name)(WIDTH, scale_offset=1.0, scale_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    one = getattr(nnx, name)(WIDTH, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(offset(data(3, WIDTH)), one(data(3, WIDTH)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="scale_offset must be 0"):
        offset(data(3, WIDTH), mask=jnp.ones(WIDTH, bool))


IN_ONE = {  # case of NORMS → the dtypes of a sum that is added up and normalised by one operator
    "plain": ("float32",),  # float32 parameters make the result float32
    "bfloat16": ("bfloat16",),
    "no scale": ("float32", "bfloat16"),
    "other axis, served by flax": None,
}


@pytest.mark.parametrize(("name", "operator"), [("RMSNorm", "rms_norm"), ("LayerNorm", "layer_norm")])
@pytest.mark.parametrize("case", IN_ONE)
def test_norm_of_a_sum(name, operator, case):
    options = NORMS[case] | ({"use_bias": False} if (name, case) == ("LayerNorm", "no scale") else {})
    ours, theirs = twins(getattr(jaxops.nn, name), getattr(nnx, name), WIDTH, **options)
    for dtype in ("float32", "bfloat16"):
        x, residual = (data(3, 5, WIDTH, seed=seed).astype(dtype) for seed in (0, 1))
        (y, total), want = ours(x, residual=residual), theirs(x + residual)
        assert (y.dtype, total.dtype) == (want.dtype, dtype) and jnp.array_equal(total, x + residual)
        tolerance = 2e-5 if y.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)
        called = [line.operator for line in jaxops.explain(lambda *o: ours(o[0], residual=o[1]), x, residual).lines]
        in_one = IN_ONE[case]
        assert called == ([] if in_one is None else [f"add_{operator}" if dtype in in_one else operator])


GROUP_NORMS = {
    "plain": ((WIDTH, 6), {}),
    "size of a group": ((WIDTH, None, 2), {"epsilon": 0.1}),
    "bfloat16": ((WIDTH, 6), BFLOAT16),
    "no bias": ((WIDTH, 1), {"use_bias": False}),
    "no scale": ((WIDTH, 3), {"use_scale": False}),
    "other axes, served by flax": ((WIDTH, 6), {"reduction_axes": (1, 3)}),
}


@pytest.mark.parametrize("case", GROUP_NORMS)
def test_group_norm_is_flax_group_norm(case):
    args, options = GROUP_NORMS[case]
    layers = twins(jaxops.nn.GroupNorm, nnx.GroupNorm, *args, **options)
    agree(*layers, data(2, 3, 5, WIDTH), tolerance=2e-2 if case == "bfloat16" else 2e-5)


def test_group_norm_with_a_mask_is_flax_group_norm():
    layers = twins(jaxops.nn.GroupNorm, nnx.GroupNorm, WIDTH, 6)
    agree(*layers, data(2, 5, WIDTH), mask=jnp.broadcast_to(jnp.arange(5)[:, None] < 3, (2, 5, WIDTH)))


@pytest.mark.parametrize(
    "case", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "other axis, by flax"))]
)
def test_instance_norm_is_flax_instance_norm(case):
    options = {"plain": {}, "bfloat16": BFLOAT16}.get(case, {"feature_axes": (2, 3)})
    layers = twins(jaxops.nn.InstanceNorm, nnx.InstanceNorm, 5 * WIDTH if "other" in case else WIDTH, **options)
    agree(*layers, data(2, 3, 5, WIDTH), tolerance=2e-2 if case == "bfloat16" else 2e-5)


BATCH_NORMS = {  # constructor, call
    "plain": ({"use_fast_variance": False}, {}),
    "bfloat16": (BFLOAT16, {}),
    "no scale": ({"use_scale": False, "momentum": 0.5, "epsilon": 0.1}, {}),
    "masked": ({"use_fast_variance": False}, {"mask": jnp.arange(5)[:, None] < 3}),
    "other axis, served by flax": ({"axis": 2}, {}),
}


@pytest.mark.parametrize(
    "case",
    [name if name in ("plain", "masked") else pytest.param(name, marks=pytest.mark.slow) for name in BATCH_NORMS],
)
def test_batch_norm_is_flax_batch_norm(case):
    """In training, with its gradients and running averages, and in evaluation."""
    options, call = BATCH_NORMS[case]
    tolerance = 2e-2 if case == "bfloat16" else 2e-5
    width = 5 if "axis" in case else WIDTH
    ours, theirs = twins(jaxops.nn.BatchNorm, nnx.BatchNorm, width, **options)
    x = data(2, 3, 5, WIDTH) + 1
    agree(ours, theirs, x, tolerance=tolerance, gradients=case in ("plain", "masked"), **call)
    for layer in (ours, theirs):
        layer(x, **call)
        layer.eval()
    for name in ("mean", "var"):
        want = getattr(theirs, name)[...]
        np.testing.assert_allclose(getattr(ours, name)[...], want, rtol=1e-5, atol=1e-6)
    agree(ours, theirs, x, tolerance=tolerance, gradients=False)


def test_batch_norm_of_a_layer_is_a_kernel_in_training_only():
    layer = jaxops.nn.BatchNorm(WIDTH, implementation="pallas", rngs=nnx.Rngs(0))
    x = data(4, WIDTH)
    told = jaxops.explain(lambda x: nnx.clone(layer)(x), x, target="v5e")
    assert [line.implementation for line in told.lines] == ["pallas"]
    layer.eval()
    assert layer(x).shape == x.shape
    with pytest.raises(ValueError, match="no kernel has a mask or axis_name"):
        layer(x, use_running_average=False, mask=jnp.ones((4, 1), bool))


def test_linen_batch_norm_is_flax_linen_batch_norm():
    x = data(2, 3, WIDTH) + 1
    ours, theirs = (
        library.BatchNorm(False, momentum=0.9, **options)
        for library, options in ((linen, {}), (flax_linen, {"use_fast_variance": False}))
    )
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)
    found, expected = (layer.apply(variables, x, mutable=["batch_stats"]) for layer in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    later = {**variables, **found[1]}
    found, expected = (library.BatchNorm(True).apply(later, x) for library in (linen, flax_linen))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


MASK = jnp.asarray(np.random.default_rng(5).random((2, 1, 7, 7)) < 0.6) | jnp.eye(7, dtype=bool)
ATTENTION = {  # constructor, input shape, call
    "plain": ({}, (2, 7, WIDTH), {}),
    "grouped heads": ({"num_kv_heads": 2}, (2, 7, WIDTH), {}),
    "one key head, no bias": ({"num_kv_heads": 1, "use_bias": False}, (2, 7, WIDTH), {"is_causal": True}),
    "causal": ({}, (2, 7, WIDTH), {"is_causal": True}),
    "mask": ({}, (2, 7, WIDTH), {"mask": MASK}),
    "mask of floats": ({}, (2, 7, WIDTH), {"mask": MASK.astype(jnp.float32)}),
    "mask and causal": ({"num_kv_heads": 2}, (2, 7, WIDTH), {"mask": MASK, "is_causal": True}),
    "normalised queries and keys": ({"normalize_qk": True}, (2, 7, WIDTH), {}),
    "other sizes": ({"qkv_features": 16, "out_features": 5}, (2, 7, WIDTH), {}),
    "no batch": ({}, (7, WIDTH), {"is_causal": True}),
    "two batch axes": ({"num_kv_heads": 2}, (2, 3, 7, WIDTH), {"is_causal": True}),
    "bfloat16": (BFLOAT16, (2, 7, WIDTH), {"is_causal": True}),
    "precision, served by flax": (
        {"precision": jax.lax.Precision.HIGHEST, "num_kv_heads": 2},
        (2, 7, WIDTH),
        {"is_causal": True},
    ),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_flax_attention(case):
    options, shape, call = ATTENTION[case]
    ours, theirs = twins(jaxops.nn.MultiHeadAttention, nnx.MultiHeadAttention, 4, WIDTH, decode=False, **options)
    gradients = case in ("grouped heads", "mask and causal")
    agree(ours, theirs, data(*shape), tolerance=5e-2 if case == "bfloat16" else 2e-5, gradients=gradients, **call)


def test_cross_attention_is_flax_cross_attention():
    layers = twins(jaxops.nn.MultiHeadAttention, nnx.MultiHeadAttention, 4, WIDTH, in_kv_features=10, decode=False)
    agree(*layers, data(2, 7, WIDTH), data(2, 9, 10), gradients=False)


def test_rope_is_flax_rope():
    hook = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(500.0))
    theirs = functools.partial(nnx.MultiHeadAttention, attention_fn=hook)
    ours = functools.partial(jaxops.nn.MultiHeadAttention, use_rope=True, rope_base=500.0)
    layers = twins(ours, theirs, 2, WIDTH, decode=False)
    x = data(2, 7, WIDTH)
    agree(*layers, x, is_causal=True, gradients=False)
    # Only differences of positions count, and they do count.
    here, shifted, spread = (
        layers[0](x, input_positions=p) for p in (None, jnp.arange(7) + 5, jnp.arange(14).reshape(2, 7) * 3)
    )
    np.testing.assert_allclose(here, shifted, rtol=1e-4, atol=1e-5)
    assert jnp.abs(here - spread).max() > 1e-3


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout(broadcast):
    query, key = data(2, 3, 40, 4, 8), data(2, 3, 50, 2, 8)
    weights_of = functools.partial(  # an identity as the values
        jaxops.nn.attention_fn, query, key, jnp.broadcast_to(jnp.eye(50)[:, None], (2, 3, 50, 2, 50))
    )
    dropped = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.3, "broadcast_dropout": broadcast}
    whole, some = weights_of(**dropped, deterministic=True), weights_of(**dropped)
    kept = some != 0
    assert abs(kept.mean() - 0.7) < 0.03
    np.testing.assert_allclose(some, jnp.where(kept, whole / 0.7, 0), rtol=1e-5, atol=1e-6)
    assert (kept == kept[:1, :1, :, :1]).all() == broadcast
    assert not jnp.array_equal(some, weights_of(**dropped | {"dropout_rng": jax.random.key(2)}))


def test_dropout_draws_from_its_stream_and_sown_weights_are_flax_ones():
    ours, theirs = twins(jaxops.nn.MultiHeadAttention, nnx.MultiHeadAttention, 4, WIDTH, dropout_rate=0.5, decode=False)
    x = data(2, 7, WIDTH)
    rngs = nnx.Rngs(dropout=3)
    first, second = (ours(x, deterministic=False, rngs=rngs) for _ in range(2))
    assert not jnp.allclose(first, second)
    assert jnp.array_equal(first, ours(x, deterministic=False, rngs=nnx.Rngs(dropout=3)))
    np.testing.assert_allclose(*[layer(x, deterministic=True) for layer in (ours, theirs)], rtol=1e-5, atol=1e-5)
    sown = []
    for layer in (ours, theirs):
        run = nnx.capture(lambda layer, x: layer(x, deterministic=True, sow_weights=True), nnx.Intermediate)
        sown.append(jax.tree.leaves(run(layer, x)[1])[0])
    np.testing.assert_allclose(*sown, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        ours(x)


def windowed(layer, x, window):
    """What a window means, as a mask of a layer that has none."""
    i = jnp.arange(x.shape[-2])
    near = (i[:, None] - i <= window) & (i[:, None] >= i)
    return layer(x, mask=near[None, None])


def test_window_segments_and_soft_cap():
    make = functools.partial(jaxops.nn.MultiHeadAttention, 4, WIDTH, num_kv_heads=2)
    x = data(2, 7, WIDTH)
    plain = make(rngs=nnx.Rngs(0))
    near = make(local_window_size=(2, 0), is_causal=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(near(x), windowed(plain, x, 2), rtol=1e-5, atol=1e-5)
    high = make(local_window_size=(2, 0), is_causal=True, precision="highest", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(near(x), high(x), rtol=1e-5, atol=1e-5)

    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    apart = jnp.concatenate([plain(x[:, :3]), plain(x[:, 3:])], axis=1)
    np.testing.assert_allclose(plain(x, query_segment_ids=segments), apart, rtol=1e-5, atol=1e-5)

    lengths = {"key_value_seq_lengths": jnp.array([3, 3])}
    np.testing.assert_allclose(plain(x, **lengths), plain(x, x[:, :3]), rtol=1e-5, atol=1e-5)
    capped = make(logits_soft_cap=1e4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(capped(x), plain(x), rtol=1e-3, atol=1e-4)
    assert jnp.abs(make(logits_soft_cap=0.1, rngs=nnx.Rngs(0))(x) - plain(x)).max() > 1e-3


DECODING = {
    "plain": {},
    "grouped heads": {"num_kv_heads": 2},
    "rope": {"num_kv_heads": 2, "use_rope": True},
    "window": {"num_kv_heads": 1, "use_rope": True, "local_window_size": (2, 0)},
    "bfloat16": {"num_kv_heads": 2, "use_rope": True, **BFLOAT16},
    "soft cap": {"logits_soft_cap": 2.0},
    "precision, served by flax": {"num_kv_heads": 2, "precision": "highest"},
}


@pytest.mark.parametrize("case", DECODING)
def test_decoding_is_the_whole_sequence(case):
    layer = jaxops.nn.MultiHeadAttention(4, WIDTH, is_causal=True, rngs=nnx.Rngs(0), **DECODING[case])
    x = data(2, 7, WIDTH)
    whole = layer(x)
    layer.init_cache((2, 7, WIDTH), layer.dtype or jnp.float32)
    assert layer.cached_key[...].shape == (2, 7, layer.num_kv_heads, layer.head_dim)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    parts, start = [], 0
    for size in (4, 1, 1, 1):
        parts.append(step(layer, x[:, start : start + size]))
        start += size
    tolerance = 5e-2 if case == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        jnp.concatenate(parts, axis=1).astype(jnp.float32), whole.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )
    assert int(layer.cache_index[...]) == 7
    assert jnp.isnan(step(layer, x[:, :1])).all(), "one token more than the cache holds must not pass for an answer"


def test_decoding_is_flax_decoding():
    ours, theirs = twins(jaxops.nn.MultiHeadAttention, nnx.MultiHeadAttention, 4, WIDTH, num_kv_heads=2, decode=True)
    for layer in (ours, theirs):
        layer.init_cache((2, 5, WIDTH))
    for t in range(5):
        token = data(2, 1, WIDTH, seed=t)
        np.testing.assert_allclose(ours(token), theirs(token), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.cached_key[...], theirs.cached_key[...], rtol=1e-6)


@pytest.mark.parametrize("call", [{"mask": MASK}, {"is_causal": True}], ids=["mask", "causal"])
def test_hook_of_nnx(call):
    ours, theirs = (
        nnx.MultiHeadAttention(4, WIDTH, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0), **hook)
        for hook in ({"attention_fn": jaxops.nn.attention_fn}, {})
    )
    agree(ours, theirs, data(2, 7, WIDTH), gradients=False, **call)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"force_fp32_for_softmax": True},
        {"precision": "highest"},
        {"precision": "highest", "dropout_rate": 0.3, "deterministic": False},
    ],
    ids=str,
)
def test_hook_of_linen(options):
    x = data(2, 7, WIDTH)
    theirs = flax_linen.MultiHeadDotProductAttention(4, **options)
    ours = theirs.clone(attention_fn=jaxops.nn.attention_fn)
    variables = theirs.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    rngs = {"dropout": jax.random.key(2)}
    results = [layer.apply(variables, x, mask=MASK, rngs=rngs) for layer in (ours, theirs)]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
    sown = [layer.apply(variables, x, sow_weights=True, rngs=rngs, mutable="intermediates") for layer in (ours, theirs)]
    np.testing.assert_allclose(*[jax.tree.leaves(one)[0] for one in sown], rtol=1e-5, atol=1e-5)


def test_gated_mlp_is_its_formula():
    x = data(2, 7, WIDTH)
    for activation in (jax.nn.silu, jax.nn.relu):
        for precision in (None, "highest"):
            layer = jaxops.nn.GatedMLP(WIDTH, 40, 9, activation=activation, precision=precision, rngs=nnx.Rngs(0))
            gate, up, down = (linear.kernel[...] for linear in (layer.gate, layer.up, layer.down))
            np.testing.assert_allclose(layer(x), (activation(x @ gate) * (x @ up)) @ down, rtol=1e-4, atol=1e-5)
            calls = [e.params["call"] for e in jax.make_jaxpr(layer)(x).eqns if e.primitive.name == "jaxops"]
            assert [call.operator.name for call in calls] == ["gated_linear_unit", "matmul"]
            assert all(("precision", precision) in call.static for call in calls)
    assert jaxops.nn.GatedMLP(WIDTH, 40, **BFLOAT16, rngs=nnx.Rngs(0))(x).dtype == jnp.bfloat16


def own_norm(features, *, implementation, **arguments):
    del implementation
    return nnx.RMSNorm(features, **arguments)


def test_block_is_its_formula_and_decodes():
    block = jaxops.nn.TransformerBlock(4, WIDTH, 40, num_kv_heads=2, is_causal=True, use_rope=True, rngs=nnx.Rngs(0))
    x = data(2, 7, WIDTH)
    h = x + block.attention(block.attention_norm(x))
    np.testing.assert_allclose(block(x), h + block.mlp(block.mlp_norm(h)), rtol=1e-5, atol=1e-5)
    block.init_cache((2, 7, WIDTH))
    tokens = [block(x[:, t : t + 1], decode=True) for t in range(7)]
    np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), block(x), rtol=1e-4, atol=1e-5)
    norm = jaxops.nn.TransformerBlock(
        4, WIDTH, 40, norm=jaxops.nn.LayerNorm, implementation=["pallas", "xla"], rngs=nnx.Rngs(0)
    )
    assert jax.jit(lambda x: norm(x))(x).shape == x.shape
    called = [line.operator for line in jaxops.explain(lambda x: norm(x), x).lines]
    assert called[:3] == ["layer_norm", "dot_product_attention", "add_layer_norm"]
    plain = jaxops.nn.TransformerBlock(4, WIDTH, 40, norm=own_norm, rngs=nnx.Rngs(0))  # knows of no residual
    h = x + plain.attention(plain.attention_norm(x))
    np.testing.assert_allclose(plain(x), h + plain.mlp(plain.mlp_norm(h)), rtol=1e-5, atol=1e-5)


GROUPED = {"num_kv_heads": 2, "is_causal": True, "use_rope": True}
LINEN = {
    "RMSNorm": ((WIDTH,), (), {"scale_offset": 1.0}),
    "LayerNorm": ((WIDTH,), (), {"epsilon": 1e-3}),
    "GroupNorm": ((WIDTH, 6), (6,), {"epsilon": 1e-3}),
    "InstanceNorm": ((WIDTH,), (), {"epsilon": 1e-3}),
    "MultiHeadAttention": (
        (4, WIDTH),
        (4,),
        {**GROUPED, "local_window_size": (3, 0), "normalize_qk": True, "out_features": 10},
    ),
    "GatedMLP": ((WIDTH, 40), (40,), {"out_features": 9}),
    "TransformerBlock": ((4, WIDTH, 40), (4, 40), GROUPED),
}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", LINEN)
def test_linen_twin(name, dtype):
    args, linen_args, options = LINEN[name]
    layer = getattr(jaxops.nn, name)(*args, dtype=dtype, rngs=nnx.Rngs(0), **options)
    if name == "TransformerBlock":
        own = {"num_kv_heads": options["num_kv_heads"]}
        options = own | {"attention_options": {k: v for k, v in options.items() if k not in own}}
    twin = getattr(linen, name)(*linen_args, dtype=dtype, **options)
    x = data(2, 7, WIDTH)
    parameters = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    shapes = jax.tree.map(jnp.shape, twin.init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(jnp.shape, parameters)
    found, expected = twin.apply({"params": parameters}, x), layer(x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-5, atol=1e-5)


FEW_BITS = {
    "int8": dict(weights="int8"),
    "int4, groups and zeros": dict(weights="int4", group_size=12, symmetric=False),
    "int8 activations": dict(weights="int8", activations="int8"),
}


@pytest.mark.parametrize("case", FEW_BITS)
@pytest.mark.parametrize("window", [False, True])
def test_linen_quantised_twin(window, case):
    """Of the same kernel they have the same variables and give the same."""
    options = dict(FEW_BITS[case])
    rngs, x = nnx.Rngs(params=0), data(2, 7, WIDTH)
    if window:
        trained = jaxops.nn.Conv(WIDTH, 10, 3, strides=2, activation=jaxops.relu, rngs=rngs)
        twin = linen.QuantizedConv(10, 3, strides=2, activation=jaxops.relu, **options)
        layer = jaxops.nn.QuantizedConv.of(trained, options.pop("weights"), **options)
    else:
        trained = nnx.Linear(WIDTH, 10, rngs=rngs)
        twin = linen.QuantizedLinear(10, **options)
        layer = jaxops.nn.QuantizedLinear.of(trained, options.pop("weights"), **options)
    variables = twin.of({"kernel": trained.kernel[...], "bias": trained.bias[...] + 1})
    layer.bias[...] += 1
    kept = nnx.to_pure_dict(nnx.state(layer, jaxops.nn.QuantizedWeight))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables["quantized"], kept))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(twin.init(jax.random.key(0), x)) == shapes(variables)
    np.testing.assert_allclose(twin.apply(variables, x), layer(x), rtol=1e-6, atol=1e-6)
    more = {"activation_scale": jnp.float32(0.1)} if "activations" in options else {}
    more |= {"input_scales": jnp.full(WIDTH, 0.5)}
    other = twin.apply({**variables, "quantized": variables["quantized"] | more}, x)
    for name, value in more.items():
        setattr(layer, name, nnx.data(jaxops.nn.QuantizedWeight(value)))
    np.testing.assert_allclose(other, layer(x), rtol=1e-6, atol=1e-6)


def test_linen_quantised_table():
    embed, tokens = nnx.Embed(20, WIDTH, rngs=nnx.Rngs(0)), jnp.asarray([[3, 19], [0, 3]])
    layer, twin = jaxops.nn.QuantizedEmbed.of(embed), linen.QuantizedEmbed(20, WIDTH)
    variables = twin.of({"embedding": embed.embedding[...]})
    assert jnp.array_equal(twin.apply(variables, tokens), layer(tokens))
    assert jnp.array_equal(twin.apply(variables, data(3, WIDTH), method="attend"), layer.attend(data(3, WIDTH)))
    assert twin.init(jax.random.key(0), tokens)["quantized"]["values"].shape == (20, WIDTH)


@pytest.mark.parametrize("window", [False, True])
def test_linen_training_that_knows_of_rounding(window):
    rngs, x, steps = nnx.Rngs(0), data(2, 5, WIDTH), dict(group_size=12, input_scale=0.05)
    if window:
        own = dict(strides=2, activation=jaxops.relu)
        layer = jaxops.nn.FakeQuantizedConv(jaxops.nn.Conv(WIDTH, 10, 3, **own, rngs=rngs), "int4", **steps)
        twin = linen.FakeQuantizedConv(10, 3, **own, weights="int4", **steps)
        kept = linen.QuantizedConv(10, 3, **own, weights="int4", activations="int8")
    else:
        layer = jaxops.nn.FakeQuantizedLinear(nnx.Linear(WIDTH, 10, rngs=rngs), "int4", **steps)
        twin = linen.FakeQuantizedLinear(10, "int4", **steps)
        kept = linen.QuantizedLinear(10, "int4", activations="int8")
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    fresh = twin.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    loss = lambda params: jnp.sum(twin.apply({"params": params}, x) ** 2)
    want = nnx.to_pure_dict(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.grad(loss)(params), want)
    np.testing.assert_allclose(kept.apply(kept.of(params), x), layer.converted()(x), rtol=1e-6)
    with pytest.raises(TypeError, match="weights must be one of int8, int4, got float8_e5m2"):
        twin.clone(weights="float8_e5m2").init(jax.random.key(0), x)


def test_linen_norm_of_a_sum():
    x, residual = data(2, 7, WIDTH), data(2, 7, WIDTH, seed=1)
    for name in ("RMSNorm", "LayerNorm"):
        layer = getattr(linen, name)()
        variables = layer.init(jax.random.key(0), x)
        y, total = layer.apply(variables, x, residual=residual)
        np.testing.assert_allclose(y, layer.apply(variables, x + residual), rtol=1e-5, atol=1e-5)
        assert jnp.array_equal(total, x + residual)


def test_linen_decoding_is_the_whole_sequence():
    x = data(2, 7, WIDTH)
    whole = linen.MultiHeadAttention(4, **GROUPED)
    decoding = whole.clone(decode=True)
    variables = decoding.init(jax.random.key(0), x)
    assert variables["cache"]["cached_key"].shape == (2, 7, 2, 6) and variables["cache"]["cache_index"] == 0
    expected = whole.apply({"params": variables["params"]}, x)
    cache, parts = variables["cache"], []
    for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
        y, changed = decoding.apply({"params": variables["params"], "cache": cache}, part, mutable="cache")
        cache = changed["cache"]
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_linen_dropout_draws_from_its_stream():
    x = data(2, 7, WIDTH)
    layer = linen.MultiHeadAttention(4, dropout_rate=0.5)
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    first, second = (
        layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(k)}) for k in (1, 2)
    )
    assert not np.allclose(first, second)


def decode_without_cache():
    jaxops.nn.MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(0))(data(2, 1, WIDTH), decode=True)


def decode_other_batch():
    layer = jaxops.nn.MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(0))
    layer.init_cache((2, 5, WIDTH))
    layer(data(3, 1, WIDTH), decode=True)


def soft_cap_with_precision():
    jaxops.nn.MultiHeadAttention(4, WIDTH, precision="highest", logits_soft_cap=2.0, rngs=nnx.Rngs(0))(
        data(2, 3, WIDTH)
    )


def decode_with_a_modifier():
    layer = jaxops.nn.MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(0))
    layer.init_cache((2, 5, WIDTH))
    layer(data(2, 1, WIDTH), decode=True, mask_mod=lambda batch, head, query, key: query >= key)


BAD = {
    "call `init_cache` first": decode_without_cache,
    "with a cache of shape": decode_other_batch,
    "logits_soft_cap cannot be had together with precision": soft_cap_with_precision,
    "mask_mod: expected none with a cache": decode_with_a_modifier,
    "dropout_rng: with a dropout_rate of 0.5": lambda: jaxops.nn.attention_fn(
        *[data(2, 3, 4, 8)] * 3, dropout_rate=0.5
    ),
    "inputs_q: expected 24 features": lambda: jaxops.nn.MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(0))(data(2, 3, 5)),
    "inputs_k: must be given": lambda: jaxops.nn.MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(0))(
        data(2, 3, WIDTH), None, data(2, 3, WIDTH)
    ),
    "num_heads: expected a divisor": lambda: linen.MultiHeadAttention(5).init(jax.random.key(0), data(2, 3, WIDTH)),
    "implementation must be None": lambda: jaxops.nn.RMSNorm(WIDTH, implementation="triton", rngs=nnx.Rngs(0))(
        data(2, WIDTH)
    ),
    "x must be float32 or bfloat16 on a TPU, got float16": lambda: jaxops.nn.GroupNorm(
        512, 1, implementation="pallas", dtype=jnp.float16, rngs=nnx.Rngs(0)
    )(data(2, 512)),
    "a divisor of the 24 channels of x, and the other None, got None and 5": lambda: linen.GroupNorm(None, 5).init(
        jax.random.key(0), data(2, WIDTH)
    ),
    "and the other None, got 6 and 4": lambda: linen.GroupNorm(6, 4).init(jax.random.key(0), data(2, WIDTH)),
    "residual must have shape": lambda: jaxops.nn.RMSNorm(WIDTH, rngs=nnx.Rngs(0))(
        data(2, WIDTH), residual=data(3, WIDTH)
    ),
    "implementation 'pallas' was asked for": lambda: jaxops.nn.RMSNorm(
        WIDTH, implementation="pallas", rngs=nnx.Rngs(0)
    )(data(2, WIDTH), jnp.ones(WIDTH, bool)),
    "key, value: expected the batch axes": lambda: jaxops.nn.attention_fn(
        data(2, 3, 4, 8), data(3, 4, 8), data(3, 4, 8)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
