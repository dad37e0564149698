"""A whole model in few bits: observers, rounding for outputs, rules, reports, and training that knows of it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxops.nn
from jaxops.calibration import BINS, OBSERVERS, Statistics, balance, round_for_outputs
from jaxops.nn import Scheme


def gathered(*batches, **options):
    statistics = Statistics.of(batches[0].shape[-1], **options)
    for batch in batches:
        statistics.add(batch)
    return statistics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Model(nnx.Module):
    """Every layer that can be quantised: a table, attention's general layers, a gated MLP's and a plain one, twice."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.blocks = nnx.List([jaxops.nn.TransformerBlock(4, 32, 64, num_kv_heads=2, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 7, rngs=rngs)
        self.same = self.head

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (3, 4, 12))


@pytest.fixture(scope="module")
def calibration(model, tokens):
    return jaxops.nn.calibrate(model, tokens, hessian=True)


def error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


# ---- observers -------------------------------------------------------------------------------------------------------


def test_the_simple_observers_are_their_definitions():
    first, second = normal(40, 16), 3 * normal(30, 16, seed=1)
    statistics = gathered(first, second)
    sizes = np.abs(np.concatenate([first, second]))
    assert statistics.rows == 70 and (statistics.channels == sizes.max(0)).all()
    assert statistics.threshold("min_max", 127) == sizes.max()
    moving = 0.9 * float(np.abs(first).max()) + 0.1 * float(np.abs(second).max())
    assert statistics.threshold("moving_average", 127) == pytest.approx(moving)
    width = statistics.top / BINS
    assert abs(statistics.threshold("percentile", 127) - np.quantile(sizes, 0.9999, method="inverted_cdf")) <= width


def test_a_histogram_that_grows_keeps_every_number():
    batches = [normal(20, 8) * scale for scale in (0.01, 1.0, 30.0, 0.1)]
    statistics = gathered(*batches)
    assert statistics.counts.sum() == 4 * 20 * 8
    whole = np.histogram(np.abs(np.stack(batches)), BINS, (0, statistics.top))[0]
    # a number at the edge of a bin may be counted beside it
    assert np.abs(np.cumsum(statistics.counts) - np.cumsum(whole)).max() <= 3


def test_clipping_observers_cut_an_outlier_and_keep_a_normal_range():
    x = normal(4000, 8)
    plain = gathered(x)
    x[0, 0] = 60.0
    outlier = gathered(x)
    for observer in ("percentile", "entropy", "mean_squared_error"):
        assert observer == "mean_squared_error" or outlier.threshold(observer, 127) < 30, observer
        assert 2.5 < plain.threshold(observer, 127) <= plain.top, observer
    quantised = lambda t: np.clip(np.round(x / (t / 127)), -127, 127) * (t / 127)
    loss = lambda t: np.square(quantised(t) - x).sum()
    best = outlier.threshold("mean_squared_error", 127)
    assert loss(best) <= min(loss(t) for t in (10, 30, 45, 60)) * 1.05


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_of_nothing_but_zeros(observer):
    assert gathered(np.zeros((5, 3), np.float32)).threshold(observer, 127) == 0


def test_statistics_of_divided_rows():
    x, factors = normal(50, 6), np.array([1, 2, 4, 0.5, 1, 8], np.float32)
    divided, direct = gathered(x, hessian=True).divided(factors), gathered(x / factors, hessian=True)
    assert np.allclose(divided.channels, direct.channels) and np.allclose(divided.hessian, direct.hessian)
    assert divided.rows == 50 and (divided.counts == direct.counts).all()


# ---- rounding --------------------------------------------------------------------------------------------------------


MORE = (("int4", None, True), ("int8", 96, True))
ROUNDED = [("int4", 32, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("dtype", "group", "symmetric"), ROUNDED)
def test_rounding_for_outputs_errs_less_than_nearest(dtype, group, symmetric):
    k, n = 192, 20
    kernel, x = normal(k, n), normal(500, k, seed=1) @ normal(k, k, seed=2) / k**0.5
    hessian = x.T.astype(np.float64) @ x
    best = round_for_outputs(kernel, hessian, dtype, group_size=group, symmetric=symmetric)
    near = jaxops.quantize(kernel, dtype, axis=0, group_size=group, symmetric=symmetric)
    assert best.values.dtype == near.values.dtype and best.scales.shape == near.scales.shape
    outputs = lambda q: x @ np.asarray(jaxops.dequantize(q))
    assert np.linalg.norm(outputs(best) - x @ kernel) < 0.8 * np.linalg.norm(outputs(near) - x @ kernel)


def test_rounding_with_uncorrelated_inputs_is_the_nearest():
    kernel = normal(64, 5)
    best = round_for_outputs(kernel, np.eye(64), "int8")
    near = jaxops.quantize(kernel, axis=0)
    assert (best.values == near.values).all() and np.allclose(best.scales, near.scales)


def test_inputs_that_are_always_zero_do_no_harm():
    hessian = np.diag([1.0, 0, 2, 0])
    found = round_for_outputs(normal(4, 3), hessian, "int4")
    assert np.isfinite(np.asarray(jaxops.dequantize(found))).all()


def test_balance_keeps_the_product_and_evens_the_ranges():
    x, kernel = normal(100, 32) * np.where(np.arange(32) == 3, 50, 1), normal(32, 8, seed=1)
    kernel[5] = 0
    factors = balance(np.abs(x).max(0), kernel, 0.5)
    assert factors[5] == 1 and np.allclose((x / factors) @ (factors[:, None] * kernel), x @ kernel, atol=1e-2)
    assert np.abs(x / factors).max() < 0.3 * np.abs(x).max()


# ---- fake_quantize ---------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.booleans(), st.integers(0, 1000))
def test_fake_quantisation_is_a_round_trip_with_the_gradients_of_its_definition(dtype, asymmetric, seed):
    x, dy = normal(6, 8, seed=seed), normal(6, 8, seed=seed + 1)
    scales = np.abs(normal(2, 8, seed=seed + 2)) / (40 if dtype == "int8" else 4) + 1e-3
    low, high = (-128, 127) if dtype == "int8" else (-8, 7)
    zeros = np.round(normal(2, 8, seed=seed + 3) * 3) if asymmetric else None
    low = low if asymmetric else -high
    spread = lambda a: np.repeat(a, 3, 0)
    y, pull = jax.vjp(lambda x, s: jaxops.fake_quantize(x, s, dtype, zeros=zeros), x, scales)
    zero = spread(zeros) if asymmetric else 0
    value = x / spread(scales)
    clipped = np.clip(np.round(value), low - zero, high - zero)
    assert np.allclose(y, clipped * spread(scales), rtol=1e-5, atol=1e-6)
    inside = (value >= low - zero) & (value <= high - zero)
    dx, ds = pull(dy)
    assert np.allclose(dx, np.where(inside, dy, 0), rtol=1e-5, atol=1e-6)
    each = dy * np.where(inside, np.round(value) - value, np.clip(value, low - zero, high - zero))
    assert np.allclose(ds, each.reshape(2, 3, 8).sum(1), rtol=1e-4, atol=1e-4)


def test_fake_quantisation_of_quantised_numbers_changes_nothing():
    found = jaxops.quantize(normal(64, 8), axis=0, group_size=16)
    exact = jaxops.dequantize(found)
    assert np.allclose(jaxops.fake_quantize(exact, found.scales), exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jaxops.fake_quantize(jnp.ones(4), jnp.zeros(1)), ValueError, "scales must be positive, got 0"),
        (lambda: jaxops.fake_quantize(jnp.ones(4), jnp.ones(3)), ValueError, "each axis of scales must divide"),
        (lambda: jaxops.fake_quantize(jnp.ones(4), jnp.ones(1), "float8_e5m2"), TypeError, "one of int8, int4"),
        (lambda: jaxops.fake_quantize(jnp.ones(4, jnp.int32), jnp.ones(1)), TypeError, "x must be"),
        (lambda: Scheme(weights="int2"), ValueError, "weights must be one of"),
        (lambda: Scheme(observer="entropy"), ValueError, "observer is of activations='int8'"),
        (lambda: Scheme(activations="int8", observer="best"), ValueError, "observer must be one of"),
        (lambda: Scheme(balance=1.5), ValueError, "balance must be from 0 to 1, got 1.5"),
        (lambda: Scheme(weights="float8_e4m3fn", rounding="outputs"), ValueError, "is for integers"),
        (lambda: Scheme(symmetric=False, activations="int8"), ValueError, "symmetric=False is for"),
        (lambda: gathered(normal(3, 4)).threshold("best", 127), ValueError, "observer must be one of"),
        (lambda: jaxops.nn.FakeQuantizedLinear(nnx.Embed(3, 4, rngs=nnx.Rngs(0))), TypeError, "got Embed"),
        (lambda: jaxops.nn.QuantizedEmbed.of(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), TypeError, "got Linear"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- models ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_observed_and_the_model_is_left_alone(model, calibration, tokens):
    parts = ["attention/key", "attention/out", "attention/query", "attention/value", "mlp/down", "mlp/gate", "mlp/up"]
    assert sorted(calibration) == sorted([*(f"blocks/{i}/{part}" for i in range(2) for part in parts), "head"])
    assert all(s.rows == tokens.size for s in calibration.values())
    x = model.blocks[0].attention_norm(model.embed(tokens.reshape(-1, 12)))
    assert np.allclose(calibration["blocks/0/attention/query"].channels, np.abs(x).max((0, 1)), rtol=1e-4)
    assert isinstance(model.head, nnx.Linear) and not hasattr(model.head, "inputs")


SCHEMES = {
    "W8A16": (Scheme(), 0.02),
    "W8A8, rows": (Scheme(activations="int8"), 0.03),
    "W8A8, one scale": (Scheme(activations="int8", observer="min_max", balance=0.5), 0.06),
    "W4A16": (Scheme("int4", group_size=16, rounding="outputs"), 0.3),
    "W4A16, zeros": (Scheme("int4", group_size=16, symmetric=False), 0.3),
    "float8": (Scheme("float8_e4m3fn"), 0.1),
}


FAST = ("W8A8, one scale",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SCHEMES])
def test_a_model_in_few_bits(name, model, calibration, tokens):
    scheme, allowed = SCHEMES[name]
    rules = [("embed", None), ("", scheme)]
    small, report = jaxops.nn.quantize_model(model, rules, calibration)
    assert isinstance(small.head, jaxops.nn.QuantizedLinear) and small.same is small.head
    assert isinstance(small.embed, nnx.Embed) and isinstance(model.head, nnx.Linear)
    assert error(jax.jit(nnx.merge)(*nnx.split(small)).__call__(tokens[0]), model(tokens[0])) < allowed
    assert [row.path for row in report.layers] == [*(p for p in sorted(calibration) if p != "head"), "head"]
    for row in report.layers:
        bits = 4 if "int4" in scheme.weights else 8
        assert row.bytes_before == 4 * math.prod(row.shape) and row.bytes_after > bits * math.prod(row.shape) / 8
        assert 0 < row.weight_error < allowed and 0 < row.output_error < allowed
    saved = sum(row.bytes_before - row.bytes_after for row in report.layers)
    assert report.bytes_before - report.bytes_after <= saved  # factors and steps are a little more


class Images(nnx.Module):
    """Convolutions of all kinds: a stem, in groups, strided, with a border around, of one axis."""

    def __init__(self, rngs):
        self.stem = jaxops.nn.Conv(3, 16, (3, 3), activation=jaxops.relu, rngs=rngs)
        self.grouped = nnx.Conv(16, 16, (3, 2), feature_group_count=4, kernel_dilation=2, rngs=rngs)
        self.strided = nnx.Conv(16, 24, (3, 3), strides=2, padding="CIRCULAR", use_bias=False, rngs=rngs)
        self.line = nnx.Conv(24, 8, 3, padding="CAUSAL", rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        y = self.stem(x)
        y = jaxops.relu(self.strided(y + jaxops.relu(self.grouped(y))))
        return self.head(self.line(y).mean((1, 2)))


@pytest.fixture(scope="module")
def images():
    model, x = Images(nnx.Rngs(0)), jnp.asarray(normal(24, 8, 6, 3))
    return model, x, jaxops.nn.calibrate(model, [x[:12], x[12:]], hessian=True)


OF_IMAGES = {
    "W8A16": ([("", Scheme())], 0.02),
    "W8A8, images": ([("", Scheme(activations="int8"))], 0.05),
    "W8A8, one scale": (
        [("grouped", Scheme(activations="int8", observer="mean_squared_error")), ("", SCHEMES["W8A8, one scale"][0])],
        0.06,
    ),
    "W4A16": ([("stem|grouped", Scheme("int4")), ("", Scheme("int4", group_size=8, rounding="outputs"))], 0.3),
    "W4A16, zeros": ([("stem", Scheme()), ("", Scheme("int4", group_size=4, symmetric=False))], 0.3),
}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OF_IMAGES])
def test_convolutions_in_few_bits(name, images):
    model, x, calibration = images
    rules, allowed = OF_IMAGES[name]
    small, report = jaxops.nn.quantize_model(model, rules, calibration)
    assert [row.path for row in report.layers] == ["grouped", "head", "line", "stem", "strided"]
    assert isinstance(small.stem, jaxops.nn.QuantizedConv) and small.stem.activation is jaxops.relu
    assert error(nnx.jit(lambda model, x: model(x))(small, x), model(x)) < allowed
    for row in report.layers:
        assert 0 < row.weight_error < allowed and row.bytes_after < row.bytes_before
        # of the pixels before a convolution with groups no output is made
        assert row.output_error is None if row.path == "grouped" else 0 < row.output_error < allowed, row
    alone = jaxops.nn.QuantizedConv.of(model.stem, activations="int8")
    residual = jnp.asarray(normal(24, 8, 6, 16))
    assert error(alone(x, residual=residual), model.stem(x, residual=residual)) < 0.02
    assert error(alone(x[0]), model.stem(x[0])) < 0.02 and alone(x[None]).shape == (1, 24, 8, 6, 16)


def test_what_a_convolution_was_given_are_its_windows(images):
    model, x, calibration = images
    assert calibration["stem"].rows == 24 * 8 * 6 and calibration["grouped"].rows == 24 * 8 * 6
    assert calibration["stem"].channels.shape == (27,) and calibration["grouped"].channels.shape == (16,)
    kernel = np.asarray(model.strided.kernel[...]).reshape(-1, 24)
    y = jaxops.relu(model.grouped(model.stem(x[:12]))) + model.stem(x[:12])
    want = np.asarray(model.strided(y)).reshape(-1, 24)
    np.testing.assert_allclose(calibration["strided"].samples[:144] @ kernel, want, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_a_convolution_is_said(images):
    model, _, calibration = images
    quantize = jaxops.nn.quantize_model
    with pytest.raises(ValueError, match="strided: group_size must divide the 16 input channels of a window, got 24"):
        quantize(model, [("strided", Scheme(group_size=24))])
    with pytest.raises(ValueError, match="grouped: a convolution with groups takes no balance and no rounding"):
        quantize(model, [("grouped", Scheme(rounding="outputs"))], calibration)
    with pytest.raises(TypeError, match=r"conv must be an nnx\.Conv, got Linear"):
        jaxops.nn.QuantizedConv.of(model.head)
    with pytest.raises(ValueError, match="QuantizedConv: activations must be None or 'int8', got 'int4'"):
        jaxops.nn.QuantizedConv.of(model.stem, activations="int4")
    aware = jaxops.nn.quantization_aware
    with pytest.raises(ValueError, match="quantization_aware: strided: balance, rounding and zero points are not trai"):
        aware(model, [("strided", Scheme(rounding="outputs"))])
    with pytest.raises(ValueError, match="quantization_aware: strided: group_size must divide the 16 input channels"):
        aware(model, [("strided", Scheme(group_size=24))])
    with pytest.raises(ValueError, match="quantization_aware: stem: its scheme needs calibration"):
        aware(model, [("stem", Scheme(activations="int8"))])
    with pytest.raises(TypeError, match=r"FakeQuantizedConv: conv must be an nnx\.Conv, got Linear"):
        jaxops.nn.FakeQuantizedConv(model.head)
    with pytest.raises(TypeError, match="FakeQuantizedConv: dtype must be one of int8, int4, got float8_e5m2"):
        jaxops.nn.FakeQuantizedConv(model.stem, "float8_e5m2")
    with pytest.raises(ValueError, match="FakeQuantizedConv: out_sharding must be None, got 1"):
        jaxops.nn.FakeQuantizedConv(model.stem)(jnp.ones((1, 4, 4, 3)), 1)
    with pytest.raises(ValueError, match="must end in 2 spatial axes and 3 channels"):
        jaxops.nn.FakeQuantizedConv(model.stem)(jnp.ones((1, 4, 4, 2)))
    bad = np.full((1, 8, 6, 3), np.inf, np.float32)
    with pytest.raises(ValueError, match=r"batch 0: the input of stem: .* are NaN or infinite"):
        jaxops.nn.calibrate(model, [bad], layers="stem")


CONVOLUTIONS = {
    "plain": (dict(), dict()),
    "strided, in groups of channels": (dict(strides=2, padding="VALID", use_bias=False), dict(group_size=4)),
    "grouped": (dict(feature_group_count=2, kernel_dilation=2), dict(dtype="int4")),
    "masked": (dict(mask=normal(3, 2, 8, 6) > 0, padding="CIRCULAR"), dict(dtype="int4", group_size=2)),
}


@pytest.mark.parametrize(
    ("own", "case"),
    [
        (True, "grouped"),
        (False, "strided, in groups of channels"),
        pytest.param(True, "plain", marks=pytest.mark.slow),
        pytest.param(False, "masked", marks=pytest.mark.slow),
    ],
)
def test_a_convolution_to_train_on_has_the_gradients_of_its_definition(own, case):
    """Of rounding it is 1 (straight through), of steps that of LSQ over √(numbers · largest)."""
    window, options = CONVOLUTIONS[case]
    more = dict(activation=jaxops.relu) if own else {}
    conv = (jaxops.nn.Conv if own else nnx.Conv)(8, 6, (3, 2), rngs=nnx.Rngs(0), **window, **more)
    layer = jaxops.nn.FakeQuantizedConv(conv, **options, input_scale=0.01)  # clips inputs,
    layer.scales[...] *= 0.8  # and weights
    x = jnp.asarray(normal(2, 7, 6, 8))
    residual = jnp.asarray(normal(*conv(x).shape, seed=1)) if own else None
    dy = jnp.asarray(normal(*conv(x).shape, seed=2))
    graph, parameters = nnx.split(layer)
    call = lambda p, x: nnx.merge(graph, p)(x, **(dict(residual=residual) if own else {}))
    y, pull = jax.vjp(call, parameters, x)
    got, dx = pull(dy)

    most = jnp.iinfo(options.get("dtype", "int8")).max
    kept = 1 if conv.mask is None else np.asarray(conv.mask)
    kernel, scales = np.asarray(conv.kernel[...]) * kept, np.asarray(layer.scales[...])
    spread = scales.repeat(8 // window.get("feature_group_count", 1) // scales.shape[2], 2) + 0 * kernel

    def rounded(x, step, most):
        """Integers, where they are none of the ends, and what a step gives each."""
        value = np.asarray(x) / np.float32(step)
        inside, nearest = abs(value) <= most, np.clip(np.round(value), -most, most)
        return nearest, inside, np.where(inside, nearest - value, nearest)

    (xs, x_inside, of_x), (ks, k_inside, of_k) = rounded(x, 0.01, 127), rounded(kernel, spread, most)
    assert not x_inside.all() and not k_inside.all()
    plain = nnx.Conv(8, 6, (3, 2), rngs=nnx.Rngs(0), **{k: v for k, v in window.items() if k != "mask"})
    plain, rest = nnx.split(plain)

    def exact(x, kernel):
        z = nnx.merge(plain, {**rest, "kernel": rest["kernel"].replace(kernel)})(x)
        return jnp.maximum(z, 0) + residual if own else z

    want, back = jax.vjp(exact, jnp.asarray(xs * np.float32(0.01)), jnp.asarray(ks * spread))
    of_xs, of_ks = back(dy)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, want)
    close(dx, of_xs * x_inside)
    close(got["kernel"][...], of_ks * k_inside * kept)
    close(got["input_scale"][...], np.sum(of_xs * of_x) / math.sqrt(x.size * 127), rtol=1e-3)
    sums = np.asarray(of_ks * of_k).reshape(*kernel.shape[:2], scales.shape[2], -1, 6).sum(3)
    sums = sums if scales.shape[0] > 1 else sums.sum((0, 1), keepdims=True)
    close(got["scales"][...], sums / math.sqrt(kernel.size / scales.size * most), rtol=1e-3)
    assert ("bias" in got) == window.get("use_bias", True)
    close(layer.converted()(x, residual=residual), y)


def test_a_convolution_to_train_on_computes_in_the_dtype_of_the_layer():
    conv = jaxops.nn.Conv(4, 6, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = jaxops.nn.FakeQuantizedConv(conv, input_scale=0.05)
    x = jnp.asarray(normal(2, 3, 9, 4))  # two batch axes
    y = layer(x)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 9, 6)
    assert error(y.astype(jnp.float32), conv(x).astype(jnp.float32)) < 0.03
    assert error(layer.converted()(x).astype(jnp.float32), y.astype(jnp.float32)) < 0.01


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int4", group_size=4),
        pytest.param(Scheme(activations="int8", observer="min_max"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_with_convolutions_is_trained_with_what_it_will_round(scheme, images):
    model, x, calibration = images
    rules = [("head", None), ("stem", dataclasses.replace(scheme, group_size=None)), ("", scheme)]
    aware = jaxops.nn.quantization_aware(model, rules, calibration)
    kinds = {name: type(getattr(aware, name)) for name in ("stem", "grouped", "strided", "line", "head")}
    assert kinds.pop("head") is nnx.Linear and set(kinds.values()) == {jaxops.nn.FakeQuantizedConv}
    after, _ = jaxops.nn.quantize_model(model, rules, calibration)
    assert error(aware(x), after(x)) < 1e-2  # before training; a tie between layers may fall to the other side
    target = jnp.asarray(normal(24, 5, seed=5))
    loss = lambda model: jnp.square(model(x) - target).mean()
    optimizer = nnx.Optimizer(aware, optax.sgd(1e-3), wrt=nnx.Param)
    before, gradients = nnx.jit(nnx.value_and_grad(loss))(aware)
    assert all(float(jnp.abs(gradients[name]["scales"][...]).max()) > 0 for name in kinds)
    optimizer.update(aware, gradients)
    final = jaxops.nn.convert(aware)
    assert float(loss(aware)) < float(before) and float(loss(final)) < float(before)
    for name in kinds:  # what is trained is what is kept
        trained, kept = getattr(aware, name), getattr(final, name)
        y = jnp.asarray(normal(2, 8, 6, trained.window.kernel[-2] * trained.window.feature_group_count))
        assert isinstance(kept, jaxops.nn.QuantizedConv) and kept.activations == scheme.activations
        np.testing.assert_allclose(kept(y), trained(y), rtol=1e-4, atol=1e-4)


def test_embeddings_are_quantised_by_rows(model, tokens):
    small, report = jaxops.nn.quantize_model(model, [("embed", Scheme())])
    assert isinstance(small.embed, jaxops.nn.QuantizedEmbed) and len(report.layers) == 1
    assert error(small.embed(tokens[0]), model.embed(tokens[0])) < 0.01
    query = normal(3, 32)
    assert error(small.embed.attend(query), model.embed.attend(query)) < 0.01
    assert np.isnan(np.asarray(small.embed(jnp.array([50])))).all()


def test_a_report_says_which_layer_costs_most(model, calibration, tokens, tmp_path):
    want = model(tokens[0])
    rules = [("head|0/mlp/up", Scheme("int4")), ("0/mlp/gate", Scheme())]
    report = jaxops.nn.sensitivity(model, rules, lambda m: float(jnp.square(m(tokens[0]) - want).sum()), calibration)
    assert [row.path for row in report.layers] == ["blocks/0/mlp/gate", "blocks/0/mlp/up", "head"]
    costs = {row.path: row.cost for row in report.layers}
    assert 0 < costs["blocks/0/mlp/gate"] < min(costs["blocks/0/mlp/up"], costs["head"])
    lines = str(report).splitlines()
    assert lines[0].split()[-1] == "cost" and lines[3].startswith("head") and lines[-1].startswith("all variables")
    report.plot(str(tmp_path / "costs.png"))
    assert (tmp_path / "costs.png").read_bytes()[:4] == b"\x89PNG"


def test_calibration_data_that_is_none_or_not_finite(model, tokens):
    with pytest.raises(ValueError, match="at least one batch, got none"):
        jaxops.nn.calibrate(model, [])
    with pytest.raises(ValueError, match="of the model has a path with 'nowhere'"):
        jaxops.nn.calibrate(model, tokens, layers="nowhere")
    linear = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    bad = np.ones((2, 4), np.float32)
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"batch 1: the input of layers/0: 1 of 8 numbers are NaN or infinite"):
        jaxops.nn.calibrate(linear, [np.ones((2, 4), np.float32), bad])


def test_rules_that_do_not_fit(model, calibration):
    quantize = jaxops.nn.quantize_model
    with pytest.raises(ValueError, match="the rules find no layer; those of the model: blocks/0/attention/key"):
        quantize(model, [("decoder", Scheme())])
    with pytest.raises(ValueError, match="quantize_model: head: its scheme needs calibration, and it was not observed"):
        quantize(model, [("head", Scheme(balance=0.5))], {k: v for k, v in calibration.items() if k != "head"})
    with pytest.raises(ValueError, match="quantize_model: head: quantize: group_size must be a divisor of the 32"):
        quantize(model, [("head", Scheme(group_size=5, rounding="outputs"))], calibration)
    with pytest.raises(ValueError, match="hessian=True"):
        quantize(model, [("head", Scheme(rounding="outputs"))], {"head": gathered(normal(5, 32))})
    with pytest.raises(ValueError, match="quantization_aware: head: balance, rounding and zero points are not trained"):
        jaxops.nn.quantization_aware(model, [("head", Scheme(symmetric=False))])
    with pytest.raises(ValueError, match="got none"):
        jaxops.nn.convert(model)


@pytest.mark.slow
def test_training_that_knows_of_rounding_errs_less_than_rounding_after_it():
    x = jnp.asarray(normal(256, 16))
    teacher = nnx.Sequential(nnx.Linear(16, 32, rngs=nnx.Rngs(1)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(2)))
    want = teacher(x)
    loss = lambda model: jnp.square(model(x) - want).mean()
    scheme = Scheme("int4", activations="int8", observer="mean_squared_error")
    calibration = jaxops.nn.calibrate(teacher, [x])
    after, _ = jaxops.nn.quantize_model(teacher, [("", scheme)], calibration)
    aware = jaxops.nn.quantization_aware(teacher, [("", scheme)], calibration)

    def same(got, want, atol):
        """But where a number between the layers is a tie, which float sums may round to the other side: by a step."""
        differ, last = np.abs(np.asarray(got - want)), aware.layers[2]
        assert np.mean((differ > atol).any(1)) < 0.01
        assert differ.max() <= float(last.input_scale[...] * jnp.abs(last.kernel[...]).max()) * 1.1

    same(aware(x), after(x), 1e-5)  # before training
    optimizer = nnx.Optimizer(aware, optax.adam(optax.cosine_decay_schedule(1e-3, 200)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    for _ in range(200):
        step(aware, optimizer)
    final = jaxops.nn.convert(aware)
    assert isinstance(final.layers[0], jaxops.nn.QuantizedLinear)
    same(final(x), aware(x), 1e-4)  # what is trained is what is kept
    assert loss(final) < 0.75 * loss(after)
