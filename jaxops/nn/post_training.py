"""A whole model in few bits: which layers, by rules over their paths, with what is learned from calibration data; what
each of them then errs; and training that knows of it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxops.calibration import OBSERVERS, Statistics, balance, round_for_outputs
from jaxops.dispatch import Implementation
from jaxops.nn.paths import LINEAR, LayerReport, QuantizationReport, bytes_of, chosen, modules, replace, size_of
from jaxops.nn.pruned import PrunedLinear
from jaxops.nn.quantized import (
    FakeQuantizedConv,
    FakeQuantizedLinear,
    Linear,
    QuantizedConv,
    QuantizedEmbed,
    QuantizedLinear,
    Shapes,
    Window,
    flat_bias,
    kernel_of,
)
from jaxops.quantization import Quantized, dequantize, quantize

Calibration = Mapping[str, Statistics]
_OBSERVED = (*LINEAR, nnx.Conv)
_KINDS = (*_OBSERVED, nnx.Embed)
_INPUTS = "inputs"  # under which what a layer was given is kept


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a layer is quantised.

    weights: int8, int4, float8_e4m3fn or float8_e5m2. group_size, symmetric: as in `jaxops.quantize`; of a convolution,
      groups are of the input channels at each place of the window.
    activations: None, or "int8" for products of integers. observer: how the one scale of all activations is chosen from
      calibration, "min_max", "moving_average", "percentile", "entropy" or "mean_squared_error"; None: each row, or each
      image of a convolution, has its own, at run time.
    balance: how much of the difficulty of quantising inputs is moved into the weights, from 0 to 1 (SmoothQuant's α);
      None: nothing is.
    rounding: "nearest", or "outputs" to keep the outputs on the calibration data (GPTQ).

    Raises `ValueError` for what is unknown or does not go together.
    """

    weights: str = "int8"
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    observer: str | None = None
    balance: float | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        known = {
            "weights": ("int8", "int4", "float8_e4m3fn", "float8_e5m2"),
            "activations": (None, "int8"),
            "observer": (None, *OBSERVERS),
            "rounding": ("nearest", "outputs"),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Scheme: {name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        if self.balance is not None and not 0 <= self.balance <= 1:
            raise ValueError(f"Scheme: balance must be from 0 to 1, got {self.balance}")
        if self.observer and not self.activations:
            raise ValueError(f"Scheme: observer is of activations='int8', got {self.observer!r} with activations=None")
        if self.rounding == "outputs" and not self.weights.startswith("int"):
            raise ValueError(f"Scheme: rounding='outputs' is for integers, got weights={self.weights!r}")
        if not self.symmetric and (self.activations or not self.weights.startswith("int")):
            raise ValueError("Scheme: symmetric=False is for integer weights and activations=None")

    @property
    def needs_data(self) -> bool:
        return self.observer is not None or self.balance is not None or self.rounding == "outputs"

    def __str__(self) -> str:
        parts = [f"{self.weights}/{self.group_size}" if self.group_size else self.weights]
        parts += [] if self.symmetric else ["zero points"]
        parts += [] if self.balance is None else [f"balance {self.balance:g}"]
        parts += [] if self.rounding == "nearest" else ["rounded for outputs"]
        parts += (
            [] if self.activations is None else [f"{self.activations} activations, {self.observer or 'at run time'}"]
        )
        return ", ".join(parts)


Rules = Sequence[tuple[str, Scheme | None]]


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    layers: str = "",
    hessian: bool = False,
) -> dict[str, Statistics]:
    """What the linear layers and convolutions of `model` were given, by path ("blocks/0/mlp/up"): of a convolution the
    windows, or where it has groups, the pixels.

    Args:
      model: any `nnx` model; it is not changed. Its layers must be called, not only their kernels be read.
      batches: pytrees of arrays; batches of one shape share a compiled program.
      apply: runs the model on a batch.
      layers: a regular expression; those whose path it is found in are observed.
      hessian: also sum x xᵀ, for `Scheme(rounding="outputs")`: 8 bytes for each pair of inputs of a layer.

    Raises:
      ValueError: there are no batches, no layer is found, or a layer was given NaN or infinities (its path and the
        batch are named).
    """
    copy = nnx.clone(model)
    found = {path: layer for path, layer in modules(copy, _OBSERVED) if re.search(layers, path)}
    if not found:
        kinds = "nnx.Linear, nnx.LinearGeneral or nnx.Conv"
        raise ValueError(f"calibrate: no {kinds} of the model has a path with {layers!r}")
    replace(copy, {id(layer): _Observed(layer) for layer in found.values()})
    shapes = {path: _shapes(f"calibrate: {path}", layer) for path, layer in found.items()}
    gathered = {path: Statistics.of(shapes[path].observed, hessian=hessian) for path in found}
    graph, state = nnx.split(copy)

    @jax.jit
    def inputs(state, batch):
        _, kept = nnx.capture(apply, nnx.Intermediate)(nnx.merge(graph, state), batch)
        named = {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(kept)}
        return {path: named[f"{path}/{_INPUTS}"] for path in found if f"{path}/{_INPUTS}" in named}

    count = 0
    for count, batch in enumerate(batches, 1):
        for path, seen in inputs(state, batch).items():
            for x in seen:
                try:
                    gathered[path].add(np.asarray(shapes[path].rows(x), np.float32))
                except ValueError as error:
                    raise ValueError(f"calibrate: batch {count - 1}: the input of {path}: {error}") from None
    if not count:
        raise ValueError("calibrate: batches must hold at least one batch, got none")
    return gathered


def quantize_model[M: nnx.Module](
    model: M, rules: Rules, calibration: Calibration | None = None, *, implementation: Implementation = None
) -> tuple[M, QuantizationReport]:
    """A copy of `model` whose linear layers, convolutions and embeddings are in few bits, and what that did to each.

    Args:
      model: any `nnx` model; it is not changed.
      rules: (regular expression, `Scheme` or None) in their order: the first that is found in the path of an
        `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv` or `nnx.Embed` decides; None, or no rule, leaves it as it is. Of
        a scheme an embedding takes the weights alone, a scale for each row.
      calibration: from `calibrate`; schemes with an observer, a balance or rounding="outputs" need it.
      implementation: of the products.

    Returns:
      The copy, with `QuantizedLinear`, `QuantizedConv` and `QuantizedEmbed` in it, and the report.

    Raises:
      ValueError: no layer is found by the rules, a layer that needs calibration was not observed, a group size does not
        divide its rows or channels, or a convolution with groups has a balance or rounding="outputs" (the path is
        named).
    """
    copy = nnx.clone(model)
    new: dict[int, nnx.Module] = {}
    reports = []
    for path, layer, scheme in chosen("quantize_model", copy, rules, _KINDS):
        try:
            new[id(layer)], report = _quantized(path, layer, scheme, (calibration or {}).get(path), implementation)
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantize_model: {path}: {error}") from None
        reports.append(report)
    before = bytes_of(copy)
    replace(copy, new)
    return copy, QuantizationReport(tuple(reports), before, bytes_of(copy))


def sensitivity(
    model: nnx.Module,
    rules: Rules,
    evaluate: Callable[[Any], float],
    calibration: Calibration | None = None,
    *,
    implementation: Implementation = None,
) -> QuantizationReport:
    """The report of `quantize_model` with the cost of each layer: evaluate(the model with this layer alone quantised) -
    evaluate(model).

    Args:
      evaluate: model → a loss, less being better; called once for each layer and once more.
      model, rules, calibration, implementation: as in `quantize_model`.

    Raises what `quantize_model` raises.
    """
    _, report = quantize_model(model, rules, calibration, implementation=implementation)
    base, layers = float(evaluate(model)), []
    schemes = {path: scheme for path, _, scheme in chosen("sensitivity", model, rules, _KINDS)}
    for layer in report.layers:
        alone = [(f"^{re.escape(layer.path)}$", schemes[layer.path])]
        changed, _ = quantize_model(model, alone, calibration, implementation=implementation)
        layers.append(dataclasses.replace(layer, cost=float(evaluate(changed)) - base))
    return dataclasses.replace(report, layers=tuple(layers))


def quantization_aware[M: nnx.Module](model: M, rules: Rules, calibration: Calibration | None = None) -> M:
    """A copy of `model` to be trained on, whose linear layers and convolutions round as `convert` will:
    `FakeQuantizedLinear` and `FakeQuantizedConv`.

    Args:
      model: any `nnx` model; it is not changed.
      rules: as in `quantize_model`, with symmetric integer weights; embeddings are left as they are. Of a scheme with
        activations the observer chooses the first step ("min_max" if there is none).
      calibration: from `calibrate`; for schemes with activations.

    Raises:
      ValueError: as `quantize_model`; or a scheme has what training does not learn (a balance, rounding, zero points).
    """
    copy = nnx.clone(model)
    new: dict[int, nnx.Module] = {}
    for path, layer, scheme in chosen("quantization_aware", copy, rules, _OBSERVED):
        try:
            if scheme.balance is not None or scheme.rounding != "nearest" or not scheme.symmetric:
                raise ValueError(f"balance, rounding and zero points are not trained, got {scheme}")
            step = None
            if scheme.activations:
                statistics = _observed((calibration or {}).get(path))
                step = _step(statistics.threshold(scheme.observer or "min_max", 127))
            kind: Any = FakeQuantizedConv if isinstance(layer, nnx.Conv) else FakeQuantizedLinear
            new[id(layer)] = kind(layer, scheme.weights, group_size=scheme.group_size, input_scale=step)
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantization_aware: {path}: {error}") from None
    replace(copy, new)
    return copy


def convert[M: nnx.Module](model: M, *, implementation: Implementation = None) -> M:
    """A copy of a trained model of `quantization_aware` or `prune_model`, with the layers for inference:
    `QuantizedLinear` in place of `FakeQuantizedLinear`, `QuantizedConv` of `FakeQuantizedConv`; of `PrunedLinear` a
    `BlockSparseLinear`, a `Sparse24Linear`, or for zeros anywhere the dense layer with these zeros.

    Raises `ValueError` if it has none of them.
    """
    copy = nnx.clone(model)
    found = modules(copy, (FakeQuantizedLinear, FakeQuantizedConv, PrunedLinear))
    if not found:
        raise ValueError("convert: model must hold layers of `quantization_aware` or `prune_model`, got none")
    replace(copy, {id(layer): layer.converted(implementation) for _, layer in found})
    return copy


class _Observed(nnx.Module):
    """A layer, and what it was given: kept as an intermediate."""

    def __init__(self, layer: Linear | nnx.Conv):
        self.layer = layer

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        self.sow(nnx.Intermediate, _INPUTS, x)
        return self.layer(x, *args, **options)


def _shapes(name: str, layer: Any) -> Shapes | Window:
    return Window.of(name, layer) if isinstance(layer, nnx.Conv) else Shapes.of(name, layer)


def _observed(statistics: Statistics | None) -> Statistics:
    if statistics is None or not statistics.rows:
        raise ValueError("its scheme needs calibration, and it was not observed (was it called, not only its kernel?)")
    return statistics


def _quantized(
    path: str, layer: Any, scheme: Scheme, statistics: Statistics | None, implementation: Implementation
) -> tuple[nnx.Module, LayerReport]:
    if isinstance(layer, nnx.Embed):
        embed = QuantizedEmbed.of(layer, scheme.weights)
        weights = Quantized(embed.values[...], embed.scales[...])
        return embed, _report(path, scheme.weights, layer.embedding[...], weights)
    shapes = _shapes("layer", layer)
    grouped = isinstance(shapes, Window) and shapes.feature_group_count > 1
    if grouped and (scheme.balance is not None or scheme.rounding == "outputs"):
        raise ValueError("a convolution with groups takes no balance and no rounding='outputs'")
    exact = kernel_of(layer)
    kernel = np.asarray(exact.astype(jnp.float32)).reshape(shapes.flat)
    options: dict[str, Any] = {"group_size": scheme.group_size, "symmetric": scheme.symmetric}
    if scheme.needs_data:
        statistics = _observed(statistics)
    factors = None
    if scheme.balance is not None:
        assert statistics is not None
        positions, (k, n) = shapes.positions, shapes.flat
        by_channel = kernel.reshape(positions, k // positions, n).swapaxes(0, 1).reshape(k // positions, -1)
        factors = balance(statistics.channels.reshape(positions, -1).max(0), by_channel, scheme.balance)
        rows = np.tile(factors, positions)
        kernel, statistics = kernel * rows[:, None], statistics.divided(rows)
    if scheme.rounding == "outputs":
        assert statistics is not None
        if statistics.hessian is None:
            raise ValueError("rounding='outputs' needs calibrate(…, hessian=True)")
        quantize(jnp.asarray(kernel), scheme.weights, axis=0, **options)  # refuses what does not fit
        weights = round_for_outputs(kernel, statistics.hessian, scheme.weights, **options)
    else:
        weights = quantize(jnp.asarray(kernel), scheme.weights, axis=0, **options)
    step = None
    if scheme.observer is not None:
        assert statistics is not None
        step = jnp.float32(_step(statistics.threshold(scheme.observer, 127)))
    same: dict[str, Any] = dict(
        dtype=layer.dtype,
        activations=scheme.activations,
        activation_scale=step,
        input_scales=None if factors is None else jnp.asarray(factors),
        implementation=implementation,
    )
    new: nnx.Module
    if isinstance(shapes, Window):
        activation = getattr(layer, "activation", None)
        new = QuantizedConv(shapes.spread(weights), flat_bias(layer), window=shapes, activation=activation, **same)
    else:
        new = QuantizedLinear(weights, flat_bias(layer), shapes=shapes, **same)
    report = _report(path, str(scheme), exact, weights, scaled=kernel)
    if statistics is not None and len(statistics.samples) and not grouped:
        if isinstance(shapes, Window) and scheme.activations and step is None:  # as of one image, not of each window
            step = jnp.float32(_step(float(np.abs(statistics.samples).max())))
        # the rows are already divided by the factors, so the layer's own division is left out
        bare = QuantizedLinear(
            weights, dtype=jnp.float32, activations=scheme.activations, activation_scale=step, implementation="xla"
        )
        want = statistics.samples @ kernel
        error = float(np.linalg.norm(np.asarray(bare(jnp.asarray(statistics.samples))) - want))
        report = dataclasses.replace(report, output_error=error / max(float(np.linalg.norm(want)), 1e-30))
    return new, report


def _report(path: str, scheme: str, kernel: jax.Array, weights: Quantized, scaled: Any = None) -> LayerReport:
    exact = np.asarray(kernel.astype(jnp.float32)).reshape(weights.values.shape) if scaled is None else scaled
    error = float(np.linalg.norm(np.asarray(dequantize(weights)) - exact))
    after = sum(size_of(x) for x in weights if x is not None)
    relative = error / max(float(np.linalg.norm(exact)), 1e-30)
    return LayerReport(path, scheme, tuple(kernel.shape), size_of(kernel), after, relative)


def _step(threshold: float) -> float:
    return threshold / 127 if threshold > 0 else 1.0
