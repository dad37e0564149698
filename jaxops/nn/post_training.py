"""A whole model in few bits: which layers, by rules over their paths, with what is learned from calibration data; what
each of them then errs; and training that knows of it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxops.calibration import OBSERVERS, Statistics, balance, round_for_outputs
from jaxops.dispatch import Implementation
from jaxops.nn.quantized import FakeQuantizedLinear, Linear, QuantizedEmbed, QuantizedLinear, Shapes, flat_bias
from jaxops.quantization import Quantized, dequantize, quantize

Calibration = Mapping[str, Statistics]
_LINEAR = (nnx.Linear, nnx.LinearGeneral)
_INPUTS = "inputs"  # under which what a layer was given is kept


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a layer is quantised.

    weights: int8, int4, float8_e4m3fn or float8_e5m2. group_size, symmetric: as in `jaxops.quantize`.
    activations: None, or "int8" for products of integers. observer: how the one scale of all activations is chosen from
      calibration, "min_max", "moving_average", "percentile", "entropy" or "mean_squared_error"; None: each row has its
      own, at run time.
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
        parts += [] if self.activations is None else [f"{self.activations} activations, {self.observer or 'by rows'}"]
        return ", ".join(parts)


Rules = Sequence[tuple[str, Scheme | None]]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What quantisation did to a layer: bytes of its kernel or table, ‖w' - w‖ / ‖w‖, the same of its outputs on rows
    of the calibration data (None without), and what it alone costs the model (None unless `sensitivity` measured).
    """

    path: str
    scheme: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None = None
    cost: float | None = None


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Of every layer that a rule found, in the order of the model; bytes of all variables before and after."""

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        number = lambda x: "" if x is None else f"{x:.2e}"
        head = ("layer", "scheme", "bytes", "after", "weight error", "output error", "cost")
        lines = [head] + [
            (r.path, r.scheme, f"{r.bytes_before}", f"{r.bytes_after}", number(r.weight_error), number(r.output_error))
            + (number(r.cost),)
            for r in self.layers
        ]
        lines += [("all variables", "", f"{self.bytes_before}", f"{self.bytes_after}", "", "", "")]
        used = [i for i in range(len(head)) if any(line[i] for line in lines[1:])]
        widths = {i: max(len(line[i]) for line in lines) for i in used}
        pad = lambda line, i: line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i])
        return "\n".join("  ".join(pad(line, i) for i in used).rstrip() for line in lines)

    def plot(self, path: str) -> None:
        """Draws a bar per layer, worst first, into a PNG or SVG: its cost if measured, else the error of its outputs,
        else of its weights. Needs matplotlib (extra `cli`); raises `ImportError` without."""
        from matplotlib.figure import Figure

        kinds = {"cost": "cost of quantising this layer alone", "output_error": "relative error of the outputs"}
        kinds |= {"weight_error": "relative error of the weights"}
        kind = next(k for k in kinds if any(getattr(r, k) is not None for r in self.layers) or k == "weight_error")
        rows = sorted(self.layers, key=lambda r: getattr(r, kind) or 0.0)
        figure = Figure(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([r.path for r in rows], [getattr(r, kind) or 0.0 for r in rows], color="#3b6ea5")
        axes.set_xlabel(kinds[kind])
        axes.margins(y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    layers: str = "",
    hessian: bool = False,
) -> dict[str, Statistics]:
    """What the linear layers of `model` were given, by path ("blocks/0/mlp/up").

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
    found = {path: layer for path, layer in _modules(copy, _LINEAR) if re.search(layers, path)}
    if not found:
        raise ValueError(f"calibrate: no nnx.Linear or nnx.LinearGeneral of the model has a path with {layers!r}")
    _replace(copy, {id(layer): _Observed(layer) for layer in found.values()})
    shapes = {path: Shapes.of(f"calibrate: {path}", layer) for path, layer in found.items()}
    gathered = {path: Statistics.of(shapes[path].flat[0], hessian=hessian) for path in found}
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
    """A copy of `model` whose linear layers and embeddings are in few bits, and what that did to each.

    Args:
      model: any `nnx` model; it is not changed.
      rules: (regular expression, `Scheme` or None) in their order: the first that is found in the path of an
        `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Embed` decides; None, or no rule, leaves it as it is. Of a scheme an
        embedding takes the weights alone, a scale for each row.
      calibration: from `calibrate`; schemes with an observer, a balance or rounding="outputs" need it.
      implementation: of the products.

    Returns:
      The copy, with `QuantizedLinear` and `QuantizedEmbed` in it, and the report.

    Raises:
      ValueError: no layer is found by the rules, a layer that needs calibration was not observed, or a group size does
        not divide its rows (the path is named).
    """
    copy = nnx.clone(model)
    new: dict[int, nnx.Module] = {}
    reports = []
    for path, layer, scheme in _chosen("quantize_model", copy, rules):
        try:
            new[id(layer)], report = _quantized(path, layer, scheme, (calibration or {}).get(path), implementation)
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantize_model: {path}: {error}") from None
        reports.append(report)
    before = _bytes(copy)
    _replace(copy, new)
    return copy, QuantizationReport(tuple(reports), before, _bytes(copy))


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
    schemes = {path: scheme for path, _, scheme in _chosen("sensitivity", model, rules)}
    for layer in report.layers:
        alone = [(f"^{re.escape(layer.path)}$", schemes[layer.path])]
        changed, _ = quantize_model(model, alone, calibration, implementation=implementation)
        layers.append(dataclasses.replace(layer, cost=float(evaluate(changed)) - base))
    return dataclasses.replace(report, layers=tuple(layers))


def quantization_aware[M: nnx.Module](model: M, rules: Rules, calibration: Calibration | None = None) -> M:
    """A copy of `model` to be trained on, whose linear layers round as `convert` will: `FakeQuantizedLinear`.

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
    for path, layer, scheme in _chosen("quantization_aware", copy, rules):
        if isinstance(layer, nnx.Embed):
            continue
        try:
            if scheme.balance is not None or scheme.rounding != "nearest" or not scheme.symmetric:
                raise ValueError(f"balance, rounding and zero points are not trained, got {scheme}")
            step = None
            if scheme.activations:
                statistics = _observed((calibration or {}).get(path))
                step = _step(statistics.threshold(scheme.observer or "min_max", 127))
            new[id(layer)] = FakeQuantizedLinear(layer, scheme.weights, group_size=scheme.group_size, input_scale=step)
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantization_aware: {path}: {error}") from None
    _replace(copy, new)
    return copy


def convert[M: nnx.Module](model: M, *, implementation: Implementation = None) -> M:
    """A copy of a model of `quantization_aware`, trained, with `QuantizedLinear` in place of `FakeQuantizedLinear`.

    Raises `ValueError` if it has none.
    """
    copy = nnx.clone(model)
    found = _modules(copy, (FakeQuantizedLinear,))
    if not found:
        raise ValueError("convert: model must hold layers of `quantization_aware`, got none")
    _replace(copy, {id(layer): layer.quantized(implementation) for _, layer in found})
    return copy


class _Observed(nnx.Module):
    """A layer, and what it was given: kept as an intermediate."""

    def __init__(self, layer: Linear):
        self.layer = layer

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        self.sow(nnx.Intermediate, _INPUTS, x)
        return self.layer(x, *args, **options)


def _modules(model: nnx.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """(path, module) of those kinds, in the order of their paths, numbers by their value."""
    found = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, kinds)]
    found.sort(key=lambda one: tuple((isinstance(part, str), part) for part in one[0]))
    return [("/".join(map(str, path)), module) for path, module in found]


def _replace(model: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Puts new[id(module)] wherever that module stands."""
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(nnx.iter_children(parent)):
            if id(child) in new:
                if isinstance(parent, nnx.List) and isinstance(name, int):
                    parent[name] = new[id(child)]
                else:
                    setattr(parent, str(name), new[id(child)])


def _chosen(what: str, model: nnx.Module, rules: Rules) -> list[tuple[str, Any, Scheme]]:
    """(path, layer, scheme) of the layers that the rules find."""
    compiled = [(re.compile(pattern), scheme) for pattern, scheme in rules]
    found = []
    modules = _modules(model, (*_LINEAR, nnx.Embed))
    for path, layer in modules:
        scheme = next((scheme for pattern, scheme in compiled if pattern.search(path)), None)
        if scheme is not None:
            found.append((path, layer, scheme))
    if not found:
        names = ", ".join(path for path, _ in modules[:5]) or "none"
        raise ValueError(f"{what}: the rules find no layer; those of the model: {names}{', …' * (len(modules) > 5)}")
    return found


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
    shapes = Shapes.of("layer", layer)
    kernel = np.asarray(layer.kernel[...].astype(jnp.float32)).reshape(shapes.flat)
    options: dict[str, Any] = {"group_size": scheme.group_size, "symmetric": scheme.symmetric}
    if scheme.needs_data:
        statistics = _observed(statistics)
    factors = None
    if scheme.balance is not None:
        assert statistics is not None
        factors = balance(statistics.channels, kernel, scheme.balance)
        kernel, statistics = kernel * factors[:, None], statistics.divided(factors)
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
    new = QuantizedLinear(
        weights,
        flat_bias(layer),
        dtype=layer.dtype,
        activations=scheme.activations,
        activation_scale=step,
        input_scales=None if factors is None else jnp.asarray(factors),
        shapes=shapes,
        implementation=implementation,
    )
    report = _report(path, str(scheme), layer.kernel[...], weights, scaled=kernel)
    if statistics is not None and len(statistics.samples):
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
    after = sum(_size(x) for x in weights if x is not None)
    relative = error / max(float(np.linalg.norm(exact)), 1e-30)
    return LayerReport(path, scheme, tuple(kernel.shape), _size(kernel), after, relative)


def _step(threshold: float) -> float:
    return threshold / 127 if threshold > 0 else 1.0


def _bytes(model: nnx.Module) -> int:
    return sum(_size(x) for x in jax.tree.leaves(nnx.state(model)) if hasattr(x, "dtype"))


def _size(x: jax.Array) -> int:
    """Bytes as they are stored: two int4 in one."""
    return math.ceil(x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) / 8)
