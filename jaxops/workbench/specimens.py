"""Calls to try an operator on: usual ones, and by chance ones whose sizes, dtypes, options and masks divide no tile.

A specimen holds Python expressions, not arrays: what is tried and the program that shows a failure are the same text.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.workbench.call import NAMES, Problem, function

# On both sides of the tiles of every kernel, and 1.
SIZES = (1, 2, 3, 7, 8, 16, 31, 64, 127, 128, 129, 160, 255, 256, 257, 300, 511, 513, 1000)
DTYPES = ("float32", "bfloat16")
# What `jaxops verify` takes where no operands are given, in words; no size divides a tile.
USUAL: dict[str, tuple[str, str]] = {
    "add_layer_norm": ("x=40x129 residual=40x129 scale=129 bias=129", ""),
    "add_rms_norm": ("x=40x129 residual=40x129 scale=129", ""),
    "block_sparse_matmul": ("x=30x384 w=7x128x128 rows=7:int32<3 offsets=3:int32<8 bias=256", ""),
    "adaptive_avg_pool": ("inputs=3x5x7x33", "output_shape=(3,7)"),
    "avg_pool": ("inputs=3x5x7x33", "window_shape=(3,2) strides=(2,2) padding=SAME"),
    "batch_norm": ("x=3x5x7x129 scale=129 bias=129", ""),
    "conv": (
        "lhs=2x9x7x30 rhs=3x2x30x17 bias=17 residual=2x5x7x17",
        "window_strides=(2,1) padding=SAME dimension_numbers=('NHWC','HWIO','NHWC')",
    ),
    "conv_transpose": ("lhs=2x5x7x30 rhs=3x2x30x17 bias=17 residual=2x10x7x17", "strides=(2,1) padding=SAME"),
    "decode_attention": ("query=3x2x4x128 key=3x304x2x128 value=3x304x2x128 lengths=3:int32<305", ""),
    "dot_product_attention": ("query=2x70x3x32 key=2x130x1x32 value=2x130x1x32", "is_causal=True"),
    "gated_linear_unit": ("x=30x65 w_gate=65x129 w_up=65x129", ""),
    "gelu": ("x=30x129", ""),
    "global_avg_pool": ("inputs=3x5x7x33", ""),
    "global_max_pool": ("inputs=3x5x7x33", ""),
    "group_norm": ("x=3x5x7x129 scale=129 bias=129", "num_groups=3"),
    "instance_norm": ("x=3x5x7x129 scale=129 bias=129", ""),
    "layer_norm": ("x=40x129 scale=129 bias=129", ""),
    "linear_cross_entropy": ("x=33x65 weight=65x300 labels=33:int32<300 bias=300", "reduction=none"),
    "linear_distillation": (
        "x=33x65 weight=65x300 teacher_x=33x40 teacher_weight=40x300 bias=300",
        "temperature=2.0 reduction=none",
    ),
    "max_pool": ("inputs=3x5x7x33", "window_shape=(2,2) strides=(2,2)"),
    "matmul": ("x=30x65 w=65x129 bias=129 residual=30x129", ""),
    "paged_attention": (
        "query=9x4x128 key_pages=9x32x2x128 value_pages=9x32x2x128 page_table=3x3:int32<9 lengths=3:int32<97"
        " query_starts=4:int32<10",
        "",
    ),
    "quantized_conv": (
        "lhs=2x9x7x30 rhs=3x2x30x17:int8 scales=1x2x3x17 bias=17 residual=2x5x7x17",
        "window_strides=(2,1) padding=SAME dimension_numbers=('NHWC','HWIO','NHWC')",
    ),
    "quantized_matmul": ("x=30x256 w=256x129:int8 scales=2x129 bias=129", ""),
    "ragged_dot": ("lhs=70x65 rhs=3x65x129 group_sizes=3:int32<50", ""),
    "relu": ("x=30x129", ""),
    "rms_norm": ("x=40x129 scale=129", ""),
    "rope": ("x=2x40x3x32 positions=40:int32<1000", ""),
    "rope_projection": ("x=2x40x65 w=65x2x64 positions=40:int32<1000 bias=2x64", ""),
    "silu": ("x=30x129", ""),
    "softmax": ("x=40x129", ""),
    "sparse_2_4_matmul": ("x=30x132 w=66x129 indices=17x129:uint8<256 bias=129", ""),
    "squared_relu": ("x=30x129", ""),
}


@dataclasses.dataclass(frozen=True)
class Operand:
    """A random array: a NumPy expression of `random` (a `numpy.random.Generator`) and `np`, cast to `dtype`."""

    shape: tuple[int, ...]
    dtype: str
    expression: str


def normal(shape: Sequence[int], dtype: str) -> Operand:
    """Standard normal numbers."""
    return Operand(tuple(shape), dtype, f"random.standard_normal({tuple(shape)})")


def integers(below: int, shape: Sequence[int], least: int = 0) -> Operand:
    """int32 from `least` to `below` - 1."""
    return Operand(tuple(shape), "int32", f"random.integers({least}, {below}, {tuple(shape)})")


def booleans(shape: Sequence[int]) -> Operand:
    """True with probability 0.7."""
    return Operand(tuple(shape), "bool", f"random.random({tuple(shape)}) < 0.7")


def of(shape: Sequence[int], dtype: Any, below: int) -> Operand:
    """Random numbers that suit the dtype: normal, true or false, or at least 0 and less than `below`."""
    if jnp.issubdtype(dtype, jnp.floating):
        return normal(shape, str(dtype))
    return booleans(shape) if dtype == jnp.bool_ else dataclasses.replace(integers(below, shape), dtype=str(dtype))


def rising(most: int, count: int) -> Operand:
    """`count` integers that rise from 0 to `most`: where the sequences of a ragged batch start."""
    return Operand((count,), "int32", f"np.sort(np.append([0, {most}], random.integers(0, {most + 1}, {count - 2})))")


def named(name: str, shape: Sequence[int], dtype: Any, below: int) -> Operand:
    """`of`, but for an operand that has to rise, up to `below` - 1."""
    return rising(below - 1, shape[0]) if name in ("query_starts", "offsets") else of(shape, dtype, below)


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One call: "rms_norm" or "module:function", random operands by name, and options as Python expressions."""

    name: str
    operands: Mapping[str, Operand]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def arrays(self) -> dict[str, jax.Array]:
        names = {"random": np.random.default_rng(self.seed), "np": np}
        return {name: jnp.asarray(eval(x.expression, names), x.dtype) for name, x in self.operands.items()}

    def function(self) -> functools.partial:
        """The function of the operands alone."""
        return functools.partial(function(self.name), **self.static())

    def static(self) -> dict[str, Any]:
        return {name: eval(text, dict(NAMES)) for name, text in self.options.items()}

    def size(self) -> tuple[int, int]:
        """How large it is, to compare with others: arrays and options, and numbers in them."""
        count = sum(int(np.prod(x.shape)) for x in self.operands.values())
        return len(self.operands) + len(self.options), count

    def words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(operands, options) as the command line takes them."""
        operands = [f"{name}={'x'.join(map(str, x.shape))}:{x.dtype}" for name, x in self.operands.items()]
        bare = lambda text: text[1:-1] if text[0] == "'" and text[1:-1].isidentifier() else text
        return tuple(operands), tuple(f"{name}={bare(text)}" for name, text in self.options.items())

    def __str__(self) -> str:
        operands, options = self.words()
        return " ".join([self.name, *operands, *(f"--set {shlex.quote(option)}" for option in options)])


def by_chance(specimen: Specimen, most: int) -> Any:
    """A hypothesis strategy of specimens of the same operator.

    For an operator of this library its own, with sizes up to `most`. For any other function every number among the
    sizes given is one dimension, the same wherever it stands, drawn up to what was given; dtypes are drawn together.
    """
    strategies = hypothesis().strategies
    draw_one = _DRAWN.get(specimen.name)
    if draw_one is None:
        return strategies.composite(lambda draw: _resized(_Chance(draw, strategies, most), specimen))()
    return strategies.composite(lambda draw: _library(_Chance(draw, strategies, most), specimen.name, draw_one))()


def drawn(specimen: Specimen, count: int, seed: int, most: int) -> list[Specimen]:
    """Up to `count` different calls of `by_chance`, the same for the same seed; fewer where there are no more."""
    library = hypothesis()
    found: dict[str, Specimen] = {}

    def keep(one: Specimen) -> None:
        found.setdefault(repr(one), one)

    settings = library.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(library.HealthCheck),
        phases=(library.Phase.generate,),
        verbosity=library.Verbosity.quiet,
    )
    settings(library.seed(seed)(library.given(by_chance(specimen, most))(keep)))()
    return list(found.values())


def hypothesis() -> Any:
    """The library of that name. Raises `Problem` without it."""
    try:
        import hypothesis
        import hypothesis.strategies
    except ImportError as error:
        raise Problem("--fuzz needs hypothesis: pip install 'jaxops[verify]'") from error
    return hypothesis


@dataclasses.dataclass(frozen=True)
class _Chance:
    """What is drawn, in the words of the strategies below; shrinking goes to the first choice."""

    draw: Callable
    strategies: Any
    most: int

    def of(self, *choices: Any) -> Any:
        return self.draw(self.strategies.sampled_from(choices))

    def size(self, most: int | None = None) -> int:
        most = min(self.most, self.most if most is None else most)
        return self.of(*[size for size in SIZES if size < most], most)

    def features(self, dtype: str, most: int | None = None) -> int:
        """The size of an axis that the gradient of a product is summed over; in 16 bits at least 16.

        In 16 bits what comes before the product is rounded: a sum of two or three such terms may all but cancel, and
        its error is then a matter of luck.
        """
        return self.size(most) if dtype == "float32" else max(16, self.size(most))

    def shape(self, *last: int) -> tuple[int, ...]:
        """Zero to two leading axes, then `last`."""
        rank = self.of(0, 1, 2)
        return (*[self.size(3) for _ in range(rank - 1)], *([self.size()] if rank else []), *last)

    def seed(self) -> int:
        return self.draw(self.strategies.integers(0, 2**16))


def _library(chance: _Chance, name: str, draw_one: Callable) -> Specimen:
    operands, options = draw_one(chance)
    there = {name: x for name, x in operands.items() if x is not None}
    static = {name: x if isinstance(x, str) else repr(x) for name, x in options.items()}
    return Specimen(name, there, static, chance.seed())


def _resized(chance: _Chance, specimen: Specimen) -> Specimen:
    given = sorted({size for x in specimen.operands.values() for size in x.shape if size > 1}, reverse=True)
    moved = resized(specimen, {size: chance.of(*[s for s in SIZES if s < size], size) for size in given})
    floating = {x.dtype for x in moved.operands.values() if jnp.issubdtype(x.dtype, jnp.floating)}
    dtype = chance.of(*DTYPES)
    if len(floating) == 1:  # a function asked about with two dtypes keeps them
        operands = {
            n: dataclasses.replace(x, dtype=dtype) if x.dtype in floating else x for n, x in moved.operands.items()
        }
        moved = dataclasses.replace(moved, operands=operands)
    return dataclasses.replace(moved, seed=chance.seed())


def resized(specimen: Specimen, sizes: Mapping[int, int]) -> Specimen:
    """`specimen` with other numbers in the shapes, each wherever it stands."""

    def again(x: Operand) -> Operand:
        shape = tuple(sizes.get(size, size) for size in x.shape)
        return Operand(shape, x.dtype, x.expression.replace(str(x.shape), str(shape)))

    return dataclasses.replace(specimen, operands={name: again(x) for name, x in specimen.operands.items()})


# ---- the operators of this library: (operands, options) by chance ---------------------------------------------------


def _attention(c: _Chance) -> tuple[dict, dict]:
    dtype = c.of(*DTYPES, "float16")
    batch, groups, per_group, size = c.of(1, 2), c.of(1, 2), c.of(1, 2, 3), c.of(16, 64, 32, 80, 128, 256)
    queries, keys, value_size = c.size(), c.size(), c.of(size, 16, 48)
    heads, logits = groups * per_group, (batch, groups * per_group, queries, keys)
    over_logits = lambda: tuple(c.of(1, full) for full in logits)
    lengths = c.of(False, True)
    segments = c.of(False, True)
    ids = lambda length: Operand(
        (batch, length), "int32", f"np.sort(random.integers(0, 3, {(batch, length)}), axis=-1)"
    )
    operands = {
        "query": normal((batch, queries, heads, size), dtype),
        "key": normal((batch, keys, groups, size), dtype),
        "value": normal((batch, keys, groups, value_size), dtype),
        "bias": normal(over_logits(), c.of(dtype, "float32")) if c.of(False, True) else None,
        "mask": booleans(over_logits()) if c.of(False, True) else None,
        "query_seq_lengths": integers(queries + 1, (batch,)) if lengths else None,
        "key_value_seq_lengths": integers(keys + 1, (batch,)) if lengths else None,
        "query_segment_ids": ids(queries) if segments else None,
        "key_value_segment_ids": ids(keys) if segments else None,
        "sinks": normal((heads,), "float32") if c.of(False, True) else None,
        "prefix_lengths": integers(keys + 1, (batch,)) if c.of(False, True) else None,
        "alibi_slopes": Operand((heads,), "float32", f"0.5 ** np.arange({heads})") if c.of(False, True) else None,
    }
    options: dict[str, Any] = {"is_causal": c.of(False, True)}
    window = c.of(None, (7, None), (40, 17), 5, (None, 100))
    if window is not None:
        options["local_window_size"] = window
    if c.of(False, True):
        options["logits_soft_cap"] = 3.0
    if c.of(False, True):
        options["return_residual"] = True
    if c.of(False, True):
        options["score_mod"] = c.of(
            "lambda score, batch, head, query, key: score * (0.5 + head) + 0.01 * (query - key)",
            "lambda score, batch, head, query, key: 3 * score / (2 + abs(score)) - 0.1 * batch",
        )
    if c.of(False, True):
        options["mask_mod"] = c.of(
            "lambda batch, head, query, key: (query - key) % 3 == 0",
            "lambda batch, head, query, key: (query // 64 + key // 64 + head) % 2 == batch",
            "lambda batch, head, query, key: key < 100",
        )
    if c.of(False, True):
        options["dropout_rate"] = c.of(0.1, 0.75)
        operands["dropout_key"] = Operand((2,), "uint32", "random.integers(0, 2**32, (2,))")
    return operands, options


def _decode(c: _Chance) -> tuple[dict, dict]:
    batch, keys, tokens = c.of(1, 3), c.size(), c.of(1, 2, 5)
    leading = (batch, tokens) if tokens > 1 else (batch,)
    operands, options = _cached(c, leading, (batch, keys), ("key", "value"))
    operands["lengths"] = integers(keys + 1, (batch,))
    return operands, options


def _paged(c: _Chance) -> tuple[dict, dict]:
    sequences, page_size, most, tokens = c.of(1, 3), c.of(16, 1, 7, 32, 64), c.of(1, 2, 5), c.of(1, 3, 20, 40)
    pages = sequences * most + 1
    operands, options = _cached(c, (tokens,), (pages, page_size), ("key_pages", "value_pages"))
    operands |= {
        "page_table": integers(pages, (sequences, most)),
        "lengths": integers(page_size * most + 1, (sequences,)),
        "query_starts": rising(tokens, sequences + 1),
    }
    return operands, options


def _cached(c: _Chance, leading: tuple, cache: tuple, names: tuple[str, str]) -> tuple[dict, dict]:
    """Queries of shape [*leading, N, H] and caches [*cache, K, H], perhaps quantised; what both operators share."""
    dtype, groups, per_group, size = c.of(*DTYPES, "float16"), c.of(2, 1, 8), c.of(1, 2, 3), c.of(128, 16, 64, 80)
    quantised = c.of(False, True)
    shape, heads = (*cache, groups, size), groups * per_group
    operands = {"query": normal((*leading, heads, size), dtype)}
    for name in names:
        whole = Operand(shape, "int8", f"random.integers(-4, 5, {shape})")
        operands[name] = whole if quantised else normal(shape, dtype)
    if quantised:
        scales = (cache[0], groups, cache[1])
        for name in ("key_scales", "value_scales"):
            operands[name] = Operand(scales, "float32", f"random.uniform(0.2, 0.6, {scales})")
    if c.of(False, True):
        operands["sinks"] = normal((heads,), "float32")
    options: dict[str, Any] = {}
    if c.of(False, True):
        options["local_window_size"] = c.of(20, 0)
    if c.of(False, True):
        options["logits_soft_cap"] = 3.0
    if c.of(False, True):
        options["return_residual"] = True
    return operands, options


def _norm(c: _Chance, *, with_bias: bool, with_residual: bool = False) -> tuple[dict, dict]:
    dtype, features = c.of(*DTYPES, "float16"), c.size()
    parameters, shape = c.of(dtype, "float32"), c.shape(features)
    operands = {
        "x": normal(shape, dtype),
        "residual": normal(shape, c.of(dtype, "float32")) if with_residual else None,
        "scale": normal((features,), parameters) if c.of(True, False) else None,
        "bias": normal((features,), parameters) if with_bias and c.of(True, False) else None,
    }
    return operands, {"eps": c.of(1e-6, 1e-3), "scale_offset": c.of(0.0, 1.0)}


def _group_norm(c: _Chance) -> tuple[dict, dict]:
    num_groups = c.of(1, 3, 32)
    operands, options = _channel_norm(c, num_groups * c.of(1, 2, 5, 16))
    return operands, {"num_groups": num_groups, **options}


def _channel_norm(c: _Chance, channels: int | None = None) -> tuple[dict, dict]:
    dtype, channels = c.of(*DTYPES, "float16"), channels or c.size()
    parameters = c.of(dtype, "float32")
    operands = {
        "x": normal((c.size(3), *(c.size(40) for _ in range(c.of(1, 0, 2))), channels), dtype),
        "scale": normal((channels,), parameters) if c.of(True, False) else None,
        "bias": normal((channels,), parameters) if c.of(True, False) else None,
    }
    return operands, {"eps": c.of(1e-6, 1e-3)}


def _pool(c: _Chance) -> tuple[dict, dict]:
    operands, window = _images(c), (c.of(2, 1, 3), c.of(2, 1, 3))
    strides = c.of(window, (1, 1), (2, 2))
    return operands, {"window_shape": window, "strides": strides, "padding": c.of("'VALID'", "'SAME'")}


def _adaptive_pool(c: _Chance) -> tuple[dict, dict]:
    return _images(c), {"output_shape": (c.size(9), c.size(9))}


def _images(c: _Chance) -> dict:
    shape = (c.size(3), c.size(12), c.size(12), c.size())
    return {"inputs": normal(shape, c.of(*DTYPES, "float16"))}


def _cross_entropy(c: _Chance) -> tuple[dict, dict]:
    dtype = c.of(*DTYPES, "float16")
    hidden, vocab = c.features(dtype, 130), c.features(dtype)
    leading = c.shape()
    operands = {
        "x": normal((*leading, hidden), dtype),
        "weight": normal((hidden, vocab), dtype),
        "labels": integers(vocab, leading),
        "bias": normal((vocab,), c.of(dtype, "float32")) if c.of(False, True) else None,
        "token_weights": Operand(leading, "float32", f"random.uniform(0, 2, {leading})") if c.of(False, True) else None,
    }
    options = {
        "ignore_index": c.of(None, 0),
        "label_smoothing": c.of(0.0, 0.1),
        "z_loss": c.of(0.0, 1e-2),
        "logits_soft_cap": c.of(None, 5.0),
        "reduction": c.of("'mean'", "'sum'", "'none'"),
    }
    return operands, options


def _distillation(c: _Chance) -> tuple[dict, dict]:
    def layer(hidden):  # logits of size 1, as those of models are
        return Operand((hidden, vocab), dtype, f"random.standard_normal({(hidden, vocab)}) / {hidden}**0.5")

    dtype, leading = c.of(*DTYPES, "float16"), c.shape()
    hidden, teacher_hidden, vocab = c.features(dtype, 130), c.features(dtype, 130), c.features(dtype)
    operands = {
        "x": normal((*leading, hidden), dtype),
        "weight": layer(hidden),
        "teacher_x": normal((*leading, teacher_hidden), dtype),
        "teacher_weight": layer(teacher_hidden),
        "bias": normal((vocab,), c.of(dtype, "float32")) if c.of(False, True) else None,
        "teacher_bias": normal((vocab,), dtype) if c.of(False, True) else None,
        "token_weights": Operand(leading, "float32", f"random.uniform(0, 2, {leading})") if c.of(False, True) else None,
    }
    return operands, {"temperature": c.of(1.0, 4.0), "reduction": c.of("'mean'", "'sum'", "'none'")}


def _elementwise(c: _Chance) -> tuple[dict, dict]:
    return {"x": normal(c.shape(c.size()), c.of(*DTYPES, "float16"))}, {}


def _gelu(c: _Chance) -> tuple[dict, dict]:
    return _elementwise(c)[0], {"approximate": c.of(True, False)}


def _activation(c: _Chance) -> str:
    return c.of("jaxops.silu", "jaxops.gelu", "jaxops.relu", "jaxops.squared_relu")


def _conv(c: _Chance) -> tuple[dict, dict]:
    dtype, rank, per_group, groups = c.of(*DTYPES, "float16"), c.of(2, 1, 3), c.size(20), c.of(1, 3)
    window, outputs = [c.of(1, 2, 3) for _ in range(rank)], groups * c.size(40)
    dilation, strides = (tuple(c.of(1, 2) for _ in range(rank)) for _ in range(2))
    sizes = [c.size(20) + 4 for _ in range(rank)]
    if rank == 2 and c.of(False, True):  # what a CPU makes of tiles
        per_group, groups, outputs, window, dilation, strides = 64, 1, c.of(64, 70), [3, 3], (1, 1), (1, 1)
    padding = c.of("SAME", "VALID", tuple((c.of(0, 1), c.of(1, 2)) for _ in range(rank)))
    axes = "HWD"[:rank]
    numbers = c.of((f"N{axes}C", f"{axes}IO", f"N{axes}C"), (f"NC{axes}", f"OI{axes}", f"NC{axes}"))
    sized = dict(zip(axes, sizes, strict=True)) | {"N": c.of(1, 2, 3), "C": groups * per_group}
    windowed = dict(zip(axes, window, strict=True)) | {"I": per_group, "O": outputs}
    operands = {
        "lhs": normal([sized[axis] for axis in numbers[0]], dtype),
        "rhs": normal([windowed[axis] for axis in numbers[1]], dtype),
        "bias": normal((outputs,), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    options = {
        "window_strides": strides,
        "padding": repr(padding),
        "rhs_dilation": dilation,
        "dimension_numbers": numbers,
        "feature_group_count": groups,
    }
    return operands, options | ({"activation": _activation(c)} if c.of(False, True) else {})


def _conv_transpose(c: _Chance) -> tuple[dict, dict]:
    operands, given = _conv(c)
    numbers, groups = given["dimension_numbers"], given["feature_group_count"]
    rhs, turned = list(operands["rhs"].shape), c.of(False, True)
    rhs[numbers[1].index("I")] *= groups
    if turned:
        a, b = numbers[1].index("I"), numbers[1].index("O")
        rhs[a], rhs[b] = rhs[b], rhs[a]
    options = {name: given[name] for name in ("rhs_dilation", "dimension_numbers", "activation") if name in given}
    padding = c.of("SAME", "VALID", tuple((c.of(0, 1), c.of(1, 2)) for _ in given["window_strides"]))
    options |= {"strides": tuple(c.of(1, 2, 3) for _ in given["window_strides"]), "padding": repr(padding)}
    return operands | {"rhs": normal(rhs, operands["lhs"].dtype)}, options | {"transpose_kernel": turned}


def _matmul(c: _Chance) -> tuple[dict, dict]:
    dtype, inner, columns = c.of(*DTYPES, "float16"), c.size(), c.size()
    shape = c.shape(inner)
    operands = {
        "x": normal(shape, dtype),
        "w": normal((inner, columns), dtype),
        "bias": normal((columns,), c.of(dtype, "float32")) if c.of(False, True) else None,
        "residual": normal((*shape[:-1], columns), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    activation = {"activation": _activation(c)} if c.of(False, True) else {}
    return operands, {**activation, "precision": c.of(None, "'highest'")}


def _quantized_conv(c: _Chance) -> tuple[dict, dict]:
    operands, options = _conv(c)
    lhs, rhs, dtype = operands["lhs"].shape, operands["rhs"].shape, operands["lhs"].dtype
    kind, quantised = c.of("int8", "int4"), c.of(False, True)
    most = 127 if kind == "int8" else 7
    parts = tuple(c.of(1, size) for size in rhs)
    operands["rhs"] = Operand(rhs, kind, f"random.integers(-{most}, {most} + 1, {rhs})")
    operands["scales"] = Operand(parts, dtype, f"random.uniform(0.5, 1.5, {parts}) / {most}")
    if c.of(False, True):
        operands["zeros"] = Operand(parts, "float32", f"random.integers(-5, 6, {parts})")
    if quantised:
        images = tuple(size if axis == 0 else 1 for axis, size in enumerate(lhs))
        operands["lhs"] = Operand(lhs, "int8", f"random.integers(-127, 128, {lhs})")
        operands["lhs_scales"] = Operand(images, dtype, f"random.uniform(0.5, 1.5, {images}) / 127")
    return operands, options


def _quantized(c: _Chance) -> tuple[dict, dict]:
    dtype, group, groups, columns = c.of(*DTYPES, "float16"), c.of(128, 32, 64, 7), c.of(1, 2, 4), c.size()
    kind, quantised = c.of("int8", "int4"), c.of(False, True)
    inner = group * groups
    shape, most = c.shape(inner), 127 if kind == "int8" else 7
    operands = {
        "x": Operand(shape, "int8", f"random.integers(-127, 128, {shape})") if quantised else normal(shape, dtype),
        "w": Operand((inner, columns), kind, f"random.integers(-{most}, {most} + 1, {(inner, columns)})"),
        "scales": Operand((groups, columns), dtype, f"random.uniform(0.5, 1.5, {(groups, columns)}) / {most}"),
        "bias": normal((columns,), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    if c.of(False, True):
        operands["zeros"] = Operand((groups, columns), "float32", f"random.integers(-5, 6, {(groups, columns)})")
    if quantised:
        rows = (*shape[:-1], 1)
        operands["x_scales"] = Operand(rows, dtype, f"random.uniform(0.5, 1.5, {rows}) / 127")
    return operands, {}


def _block_sparse(c: _Chance) -> tuple[dict, dict]:
    dtype, sides = c.of(*DTYPES, "float16"), (128, 256, 16, 7)
    bk, bn, height, width, count = c.of(*sides), c.of(*sides), c.of(1, 2, 3), c.of(1, 2, 4), c.of(1, 3, 9)
    shape, size = c.shape(height * bk), width * bn
    operands = {
        "x": normal(shape, dtype),
        "w": normal((count, bk, bn), dtype),
        "rows": integers(height, (count,)),
        "offsets": rising(count, width + 1),
        "bias": normal((size,), c.of(dtype, "float32")) if c.of(False, True) else None,
        "residual": normal((*shape[:-1], size), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    activation = {"activation": _activation(c)} if c.of(False, True) else {}
    return operands, {**activation, "precision": c.of(None, "'highest'")}


def _sparse_2_4(c: _Chance) -> tuple[dict, dict]:
    dtype, inner, columns = c.of(*DTYPES, "float16"), 4 * c.size(130), c.size()
    shape, packed = c.shape(inner), (-(-inner // 8), columns)
    operands = {
        "x": normal(shape, dtype),
        "w": normal((inner // 2, columns), dtype),
        "indices": Operand(packed, "uint8", f"random.integers(0, 256, {packed})"),
        "bias": normal((columns,), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    activation = {"activation": _activation(c)} if c.of(False, True) else {}
    return operands, {**activation, "precision": c.of(None, "'highest'")}


def _gated(c: _Chance) -> tuple[dict, dict]:
    dtype, inner = c.of(*DTYPES, "float16"), c.size()
    columns = c.features(dtype)
    weights = {name: normal((inner, columns), dtype) for name in ("w_gate", "w_up")}
    options = {"activation": _activation(c), "precision": c.of(None, "'highest'")}
    return {"x": normal(c.shape(inner), dtype), **weights}, options


def _softmax(c: _Chance) -> tuple[dict, dict]:
    shape = c.shape(c.size())
    axis = c.of(-1, 0, tuple(range(len(shape))), -1)
    where = booleans([c.of(size, 1) for size in shape]) if c.of(False, True) else None
    return {"x": normal(shape, c.of(*DTYPES, "float16")), "where": where}, {"axis": axis, "temperature": c.of(1.0, 0.7)}


def _rope(c: _Chance) -> tuple[dict, dict]:
    length, heads, size = c.size(), c.of(1, 3), c.of(2, 16, 64, 130)
    leading = (c.size(5),) if c.of(False, True) else ()
    positions = (*leading, length) if c.of(False, True) else (length,)
    scaling = c.of("None", "2.0", "jaxops.RopeScaling(8.0, 1.0, 4.0, 256)")
    operands = {
        "x": normal((*leading, length, heads, size), c.of(*DTYPES, "float16")),
        "positions": integers(1000, positions),
    }
    return operands, {"base": c.of(10000.0, 500000.0), "scaling": scaling}


def _rope_projection(c: _Chance) -> tuple[dict, dict]:
    length, depth, heads, size = c.size(), c.size(), c.of(1, 2, 5), c.of(2, 16, 64, 128, 130)
    leading, dtype = (c.size(5),) if c.of(False, True) else (), c.of(*DTYPES, "float16")
    operands = {
        "x": normal((*leading, length, depth), dtype),
        "w": normal((depth, heads, size), dtype),
        "positions": integers(1000, (*leading, length) if c.of(False, True) else (length,)),
    }
    if c.of(False, True):
        operands["bias"] = normal((heads, size), dtype)
    return operands, {"base": c.of(10000.0, 500000.0), "scaling": c.of("None", "2.0")}


def _ragged(c: _Chance) -> tuple[dict, dict]:
    dtype, tokens, inner, columns, groups = c.of(*DTYPES, "float16"), c.size(), c.size(), c.size(130), c.of(3, 1, 8, 40)
    gathered, scattered = c.of(False, True), c.of(False, True)
    rows = c.size() if gathered else tokens
    out_size = c.size(300)
    offset = c.of(None, 0, 2)
    sizes = groups if offset is None else groups + 1
    operands = {
        "lhs": normal((tokens, inner), dtype),
        "rhs": normal((groups, inner, columns), dtype),
        "group_sizes": integers(c.of(2, 1, 3) * rows // sizes + 2, (sizes,)),
        "group_offset": None if offset is None else Operand((), "int32", str(offset)),
        # one below and one above what there is
        "lhs_rows": integers(tokens + 1, (rows,), least=-1) if gathered else None,
        "out_rows": integers(out_size + 1, (rows,), least=-1) if scattered else None,
        "out_weights": normal((rows,), c.of(dtype, "float32")) if c.of(False, True) else None,
    }
    return operands, {"out_size": out_size} if scattered else {}


_DRAWN: dict[str, Callable[[_Chance], tuple[dict, dict]]] = {
    "add_layer_norm": functools.partial(_norm, with_bias=True, with_residual=True),
    "add_rms_norm": functools.partial(_norm, with_bias=False, with_residual=True),
    "block_sparse_matmul": _block_sparse,
    "adaptive_avg_pool": _adaptive_pool,
    "avg_pool": _pool,
    "batch_norm": _channel_norm,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "decode_attention": _decode,
    "dot_product_attention": _attention,
    "gated_linear_unit": _gated,
    "gelu": _gelu,
    "global_avg_pool": lambda c: (_images(c), {}),
    "global_max_pool": lambda c: (_images(c), {}),
    "group_norm": _group_norm,
    "instance_norm": _channel_norm,
    "layer_norm": functools.partial(_norm, with_bias=True),
    "linear_cross_entropy": _cross_entropy,
    "linear_distillation": _distillation,
    "matmul": _matmul,
    "max_pool": _pool,
    "paged_attention": _paged,
    "quantized_conv": _quantized_conv,
    "quantized_matmul": _quantized,
    "ragged_dot": _ragged,
    "relu": _elementwise,
    "rms_norm": functools.partial(_norm, with_bias=False),
    "rope": _rope,
    "rope_projection": _rope_projection,
    "silu": _elementwise,
    "softmax": _softmax,
    "sparse_2_4_matmul": _sparse_2_4,
    "squared_relu": _elementwise,
}
