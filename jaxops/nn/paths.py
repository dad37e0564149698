"""What changes whole models share: which layers, by rules over their paths; other layers in their place; and the
report of what that did.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

LINEAR = (nnx.Linear, nnx.LinearGeneral)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What quantisation or pruning did to a layer: bytes of its kernel or table, ‖w' - w‖ / ‖w‖, the same of its
    outputs on rows of the calibration data (None without), and what it alone costs the model (None unless `sensitivity`
    measured).
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
    """Of a model that was quantised or pruned: every layer that a rule found, in the order of the model; bytes of all
    variables before and after."""

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


def modules(model: nnx.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """(path, module) of those kinds, in the order of their paths, numbers by their value."""
    found = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, kinds)]
    found.sort(key=lambda one: tuple((isinstance(part, str), part) for part in one[0]))
    return [("/".join(map(str, path)), module) for path, module in found]


def replace(model: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Puts new[id(module)] wherever that module stands."""
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(nnx.iter_children(parent)):
            if id(child) in new:
                if isinstance(parent, nnx.List) and isinstance(name, int):
                    parent[name] = new[id(child)]
                else:
                    setattr(parent, str(name), new[id(child)])


def chosen[S](
    what: str, model: nnx.Module, rules: Sequence[tuple[str, S | None]], kinds: tuple[type, ...]
) -> list[tuple[str, Any, S]]:
    """(path, layer, scheme) of the layers of `kinds` that the rules find: of each the first whose regular expression is
    found in its path."""
    compiled = [(re.compile(pattern), scheme) for pattern, scheme in rules]
    found = []
    layers = modules(model, kinds)
    for path, layer in layers:
        scheme = next((scheme for pattern, scheme in compiled if pattern.search(path)), None)
        if scheme is not None:
            found.append((path, layer, scheme))
    if not found:
        names = ", ".join(path for path, _ in layers[:5]) or "none"
        raise ValueError(f"{what}: the rules find no layer; those of the model: {names}{', …' * (len(layers) > 5)}")
    return found


def bytes_of(model: nnx.Module) -> int:
    """Bytes of all variables."""
    return sum(size_of(x) for x in jax.tree.leaves(nnx.state(model)) if hasattr(x, "dtype"))


def size_of(x: jax.Array) -> int:
    """Bytes as they are stored: two int4 in one."""
    return math.ceil(x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) / 8)
