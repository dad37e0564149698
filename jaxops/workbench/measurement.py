"""How fast one call is, beside what others offer and beside what the device can do: measured here, or modelled.

Measured: every variant is first compared with float64 and is not timed if it is wrong. Then the variants take turns
(`timing`). TFLOP/s and GB/s are those of the least that has to be computed and moved (`jaxops.cost`): a
variant that computes twice reaches half. The peak is its maker's for a chip that is known, and measured in the same run
elsewhere: on a CPU a call whose arrays fit the cache may exceed 100 %.

Modelled, for a chip that is not here: the time is what `jaxops.schedule` reads from the compiler's schedule. What that
model cannot see is in `BLIND`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops import autodiff
from jaxops.cost import Cost, Peak, published
from jaxops.cost import of as cost_of
from jaxops.inspection import explain
from jaxops.workbench import comparison, compiler, devices, peers, timing
from jaxops.workbench.call import Problem, call, operators, option
from pallas_kernels import chips

BLIND = (
    "The model reads the compiler's schedule. It does not see memory stalls beyond peak bandwidth, contention between "
    "cores or chips, clock throttling, the cost of a launch, or work that depends on the numbers. No chip has "
    "confirmed it. A GPU program has no modelled time: its schedule does not say how often its loops run."
)
# Largest ‖peer - oracle‖ / ‖oracle‖ by which a peer still computes the same: of 16-bit types, of others.
_SAME_16_BIT, _SAME = 3e-2, 1e-3


@dataclasses.dataclass(frozen=True)
class Usual:
    """A typical call: operands in words with sizes by name, options, and the sizes on a CPU and on an accelerator."""

    operands: tuple[str, ...]
    options: tuple[str, ...]
    cpu: Mapping[str, int]
    accelerator: Mapping[str, int]


_IMAGES = {"B": 8, "S": 32, "C": 256}, {"B": 16, "S": 64, "C": 512}
_ROWS = {"R": 4096, "D": 2048}, {"R": 8192, "D": 4096}
_PRODUCT = {"M": 1024, "K": 1024, "N": 1024}, {"M": 4096, "K": 4096, "N": 4096}
_HEADS = {"B": 1, "T": 1024, "N": 8, "H": 64}, {"B": 4, "T": 4096, "N": 8, "H": 128}
_PROJECTION = {**_HEADS[0], "D": 512}, {"B": 4, "T": 2048, "D": 4096, "N": 32, "H": 128}
_PAGES = {"T": 256, "M": 32, "N": 8, "H": 64}, {"T": 4096, "M": 512, "N": 8, "H": 128}
_VOCABULARY = {"T": 1024, "D": 256, "V": 16384}, {"T": 8192, "D": 2048, "V": 65536}
_GROUPS = {"M": 1024, "G": 8, "K": 512, "N": 512}, {"M": 8192, "G": 8, "K": 4096, "N": 4096}
_ATTENTION = ("query=BxTxNxH", "key=BxTxNxH", "value=BxTxNxH")
_BLOCKS = (
    {"M": 512, "K": 2048, "S": 410, "B": 32, "C": 65},
    {"M": 4096, "K": 4096, "S": 205, "B": 128, "C": 33},
)
_PAIRS = tuple({**sizes, "H": sizes["K"] // 2, "P": sizes["K"] // 8} for sizes in _PRODUCT)
_POOL = ("window_shape=(2,2)", "strides=(2,2)")
USUAL = {
    "adaptive_avg_pool": Usual(("inputs=BxSxSxC",), ("output_shape=(1,1)",), *_IMAGES),
    "avg_pool": Usual(("inputs=BxSxSxC",), _POOL, *_IMAGES),
    "global_avg_pool": Usual(("inputs=BxSxSxC",), (), *_IMAGES),
    "global_max_pool": Usual(("inputs=BxSxSxC",), (), *_IMAGES),
    "max_pool": Usual(("inputs=BxSxSxC",), _POOL, *_IMAGES),
    "add_layer_norm": Usual(("x=RxD", "residual=RxD", "scale=D", "bias=D"), (), *_ROWS),
    "add_rms_norm": Usual(("x=RxD", "residual=RxD", "scale=D"), (), *_ROWS),
    "block_sparse_matmul": Usual(("x=MxK", "w=SxBxB", "rows=S:int32", "offsets=C:int32"), (), *_BLOCKS),
    "batch_norm": Usual(("x=BxSxSxC", "scale=C", "bias=C"), (), *_IMAGES),
    "conv": Usual(
        ("lhs=BxSxSxC", "rhs=3x3xCxC", "bias=C"),
        ("window_strides=(1,1)", "padding=SAME", "dimension_numbers=('NHWC','HWIO','NHWC')", "activation=jaxops.relu"),
        {"B": 8, "S": 28, "C": 64},
        {"B": 8, "S": 28, "C": 256},
    ),
    "conv_transpose": Usual(
        ("lhs=BxSxSxC", "rhs=4x4xCxC", "bias=C"),
        ("strides=(2,2)", "padding=SAME", "activation=jaxops.relu"),
        {"B": 8, "S": 14, "C": 64},
        {"B": 8, "S": 28, "C": 256},
    ),
    "decode_attention": Usual(("query=BxNxH", *_ATTENTION[1:], "lengths=B:int32"), (), *_HEADS),
    "dot_product_attention": Usual(_ATTENTION, ("is_causal=True",), *_HEADS),
    "gated_linear_unit": Usual(("x=MxK", "w_gate=KxN", "w_up=KxN"), (), *_PRODUCT),
    "gelu": Usual(("x=RxD",), (), *_ROWS),
    "group_norm": Usual(("x=BxSxSxC", "scale=C", "bias=C"), ("num_groups=32",), *_IMAGES),
    "instance_norm": Usual(("x=BxSxSxC", "scale=C", "bias=C"), (), *_IMAGES),
    "layer_norm": Usual(("x=RxD", "scale=D", "bias=D"), (), *_ROWS),
    "linear_cross_entropy": Usual(("x=TxD", "weight=DxV", "labels=T:int32"), (), *_VOCABULARY),
    "linear_distillation": Usual(
        ("x=TxD", "weight=DxV", "teacher_x=TxD", "teacher_weight=DxV"), ("temperature=2.0",), *_VOCABULARY
    ),
    "matmul": Usual(("x=MxK", "w=KxN"), (), *_PRODUCT),
    "paged_attention": Usual(
        (
            "query=8xNxH",
            "key_pages=Tx16xNxH",
            "value_pages=Tx16xNxH",
            "page_table=8xM:int32",
            "lengths=8:int32",
            "query_starts=9:int32",
        ),
        (),
        *_PAGES,
    ),
    "quantized_conv": Usual(
        ("lhs=BxSxSxC", "rhs=3x3xCxC:int8", "scales=1x1x1xC:float32", "bias=C"),
        ("window_strides=(1,1)", "padding=SAME", "dimension_numbers=('NHWC','HWIO','NHWC')", "activation=jaxops.relu"),
        {"B": 8, "S": 28, "C": 64},
        {"B": 8, "S": 28, "C": 256},
    ),
    "quantized_matmul": Usual(("x=MxK", "w=KxN:int8", "scales=1xN:float32"), (), *_PRODUCT),
    "ragged_dot": Usual(("lhs=MxK", "rhs=GxKxN", "group_sizes=G:int32"), (), *_GROUPS),
    "relu": Usual(("x=RxD",), (), *_ROWS),
    "rms_norm": Usual(("x=RxD", "scale=D"), (), *_ROWS),
    "rope": Usual(("x=BxTxNxH", "positions=T:int32"), (), *_HEADS),
    "rope_projection": Usual(("x=BxTxD", "w=DxNxH", "positions=T:int32"), (), *_PROJECTION),
    "silu": Usual(("x=RxD",), (), *_ROWS),
    "softmax": Usual(("x=RxD",), (), *_ROWS),
    "sparse_2_4_matmul": Usual(("x=MxK", "w=HxN", "indices=PxN:uint8"), (), *_PAIRS),
    "squared_relu": Usual(("x=RxD",), (), *_ROWS),
}


def with_sizes(operand: str, sizes: Mapping[str, int]) -> str:
    """The words of an operand with every size that has a name replaced: "x=Rx64" and R=8 give "x=8x64"."""
    name, equals, rest = operand.partition("=")
    shape, colon, dtype = rest.partition(":")
    return name + equals + "x".join(str(sizes.get(size, size)) for size in shape.split("x")) + colon + dtype


@dataclasses.dataclass(frozen=True)
class Question:
    """A call in words, as `jaxops.workbench.call.call` takes them."""

    operator: str
    operands: tuple[str, ...]
    options: tuple[str, ...]
    dtype: str
    gradients: bool

    def __str__(self) -> str:
        direction = "forward and backward" if self.gradients else "forward"
        return f"{' '.join((self.operator, *self.operands, *self.options))}, {self.dtype}, {direction}"

    def call(self) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct]]:
        """The function of its operands, and their shapes. Raises `Problem` where the words make no sense."""
        return call(self.operator, self.operands, self.options, self.dtype, False)


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one variant.

    status: "timed", "modelled", "wrong" (the result differs: `reason` says by how much), "failed" (it does not run) or
      "absent" (there is no such operation, or no time for it). error: relative, of the result nearest to what is
      allowed; None where nothing was compared.
    """

    variant: str
    status: str
    reason: str = ""
    spread: timing.Spread | None = None
    temp_bytes: int | None = None
    error: float | None = None

    @property
    def seconds(self) -> float | None:
        return self.spread.median if self.spread else None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a time means. `percent` is of the roofline, `times_first` the time over that of the first variant."""

    tflops: float | None = None
    gbytes: float | None = None
    percent: float | None = None
    times_first: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One call on one device: `cost` is the least it has to compute and move, `where` the device or the chip's name.

    peak_memory_bytes: the most the device ever held in this process, where it says so.
    """

    question: Question
    where: str
    modelled: bool
    cost: Cost
    peak: Peak
    rows: tuple[Row, ...]
    peak_memory_bytes: int | None = None

    @property
    def bound(self) -> tuple[float, str] | None:
        """The roofline: (seconds, "compute" or "memory"); None if the peak of its products is not known."""
        try:
            return self.peak.bound(self.cost)
        except ValueError:
            return None

    def figures(self, row: Row) -> Figures:
        if row.seconds is None:
            return Figures()
        first = next(other.seconds for other in self.rows if other.seconds)
        return Figures(
            tflops=self.cost.flops / row.seconds / 1e12 if self.cost.flops else None,
            gbytes=self.cost.bytes / row.seconds / 1e9,
            percent=100 * self.bound[0] / row.seconds if self.bound else None,
            times_first=row.seconds / first,
        )

    def as_dict(self) -> dict[str, Any]:
        """For machines: seconds, bytes and flops."""
        return {
            **dataclasses.asdict(self.question),
            "where": self.where,
            "modelled": self.modelled,
            "cost": dataclasses.asdict(self.cost),
            "peak": dataclasses.asdict(self.peak),
            "bound": dict(zip(("seconds", "by"), self.bound, strict=True)) if self.bound else None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        spread = row.spread if row.status == "timed" else None
        return {
            "variant": row.variant,
            "status": row.status,
            "reason": row.reason,
            "seconds": row.seconds,
            "minimum": spread.minimum if spread else None,
            "maximum": spread.maximum if spread else None,
            "quartiles": spread.quartiles if spread else None,
            "rounds": len(spread.seconds) if spread else None,
            **dataclasses.asdict(self.figures(row)),
            "temp_bytes": row.temp_bytes,
            "error": row.error,
        }


# ---- measured -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Variant:
    """`function` takes the operands of the call; `peer`s need to compute the same only as far as peers do."""

    name: str
    function: Callable
    peer: bool = True


def measure(
    question: Question,
    against: Sequence[str] = (),
    *,
    rounds: int = 10,
    advance: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """The call on the device at hand, beside its counterparts in the libraries, or "module:function"s, `against`.

    The variant in question comes first and, if it runs as a kernel, the same call in XLA second.

    advance: called with a word after every step.

    Raises `Problem`, before anything is computed, for words that make no sense and for a library that is not installed.
    """
    function, shapes = question.call()
    variants, rows = _variants(question, function, shapes, against)
    try:
        arguments = _arguments(function, random_operands(shapes), question.gradients)
        work = cost_of(_program(function), *arguments)
    except (TypeError, ValueError) as error:  # the operator's own word on its input
        raise Problem(str(error)) from error
    judge = _Judge.of(function, arguments)
    advance("float64")

    ready: dict[str, Callable[[], Any]] = {}
    for variant in variants:
        run, row = _prepare(variant, arguments, judge)
        rows.append(row)
        if row.status == "timed":
            ready[variant.name] = run
        advance(f"{variant.name} checked")
    peak = published_here(question.dtype)
    spreads = timing.take_turns(ready | ({} if peak else timing.peak_calls(question.dtype)), rounds, advance)
    peak = peak or timing.peak_of(spreads)
    memory = (devices.at_hand().memory_stats() or {}).get("peak_bytes_in_use")
    timed = [dataclasses.replace(row, spread=spreads.get(row.variant)) for row in rows]
    timed.sort(key=lambda row: row.status == "absent")
    return Benchmark(question, devices.description(), False, work, peak, tuple(timed), memory)


def tried(question: Question) -> Row:
    """The call, run once on the device at hand and compared with float64: a row without times."""
    function, shapes = question.call()
    arguments = _arguments(function, random_operands(shapes), question.gradients)
    _, row = _prepare(_Variant(question.operator, function, peer=False), arguments, _Judge.of(function, arguments))
    return row


def published_here(dtype: str) -> Peak | None:
    """What the device at hand can do by its maker; None if it is no chip that is known."""
    chip = devices.chip()
    return published(chip, dtype) if chip and chip.name in chips.CHIPS else None


def at_one_peak(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """The same, measured one after the other on one device, with the best peak of them all."""
    peaks = [one.peak for one in benchmarks]
    flops = [peak.flops for peak in peaks if peak.flops]
    best = Peak(max(flops, default=None), max(peak.bandwidth for peak in peaks), peaks[0].source)
    return [dataclasses.replace(one, peak=best) for one in benchmarks]


def random_operands(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers for the operands of a call, by their names where these mean something.

    Floating: normal, of variance one over the contracted size in a weight; labels below the vocabulary, positions one
    after the other, lengths up to the length, segments of growing id, pages, rows and blocks that there are, groups
    that take all rows, masks that show nine in ten; other integers are 0 or 1.
    """
    random = np.random.default_rng(seed)

    def numbers(name: str, x: Any) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jnp.floating):
            weight = name in ("w", "weight", "w_gate", "w_up") and len(x.shape) == 2
            scale = 1 / max(x.shape[0], 1) ** 0.5 if weight else 1
            return (scale * random.standard_normal(x.shape, np.float32)).astype(x.dtype)
        if x.dtype == jnp.bool_:
            return (random.random(x.shape) < 0.9) | (np.arange(x.shape[-1] if x.shape else 1) == 0)
        if name == "positions":
            return np.broadcast_to(np.arange(x.shape[-1]), x.shape).astype(x.dtype)
        if name.endswith("_segment_ids"):
            return np.sort(random.integers(0, 4, x.shape), axis=-1).astype(x.dtype)
        if name.endswith("_seq_lengths"):
            longest = shapes[name.split("_")[0] if name.startswith("query") else "key"].shape[-3]
            return random.integers(longest // 2, longest + 1, x.shape).astype(x.dtype)
        if name == "group_sizes" and "lhs" in shapes:  # about the same, and together all rows
            rows = shapes["lhs_rows" if "lhs_rows" in shapes else "lhs"].shape[0]
            return random.multinomial(rows, np.full(x.size, 1 / x.size)).astype(x.dtype)
        if name in ("lhs_rows", "out_rows"):
            return random.integers(0, shapes["lhs"].shape[0], x.shape).astype(x.dtype)
        if name == "offsets":  # about as many blocks in every column
            return np.linspace(0, shapes["rows"].shape[0], x.size).astype(x.dtype)
        if name == "rows":
            return random.integers(0, shapes["x"].shape[-1] // shapes["w"].shape[1], x.shape).astype(x.dtype)
        if name == "indices":
            return random.integers(0, 256, x.shape).astype(x.dtype)
        if name == "query_starts":  # sequences of about the same number of tokens
            return np.linspace(0, shapes["query"].shape[0], x.size).astype(x.dtype)
        if name == "page_table":
            return random.integers(0, shapes["key_pages"].shape[0], x.shape).astype(x.dtype)
        if name == "lengths":
            paged = "page_table" in shapes
            longest = shapes["key_pages" if paged else "key"].shape[-3] * (
                shapes["page_table"].shape[1] if paged else 1
            )
            return random.integers(longest // 2, longest + 1, x.shape).astype(x.dtype)
        bound = shapes["weight"].shape[-1] if name == "labels" and "weight" in shapes else 2
        return random.integers(0, bound, x.shape).astype(x.dtype)

    return {name: numbers(name, x) for name, x in shapes.items()}


def _variants(
    question: Question, function: Callable, shapes: Mapping[str, Any], against: Sequence[str]
) -> tuple[list[_Variant], list[Row]]:
    """What is to be measured, and a row for each of `against` that has no counterpart."""
    library_has_it = question.operator in operators()
    variants, absent = [_Variant("jaxops" if library_has_it else question.operator, function, peer=False)], []
    chip = devices.chip()
    chooses = not any(word.startswith("implementation=") for word in question.options)
    if library_has_it and chooses and chip and chip.name in chips.CHIPS:
        lines = explain(function, target=chip.name, **shapes).lines
        if any(line.implementation == "pallas" for line in lines):
            options = (*question.options, "implementation=xla")
            in_xla, _ = dataclasses.replace(question, options=options).call()
            variants.append(_Variant("jaxops, XLA", in_xla, peer=False))
    for name in against:
        found = _counterpart(name, question, shapes)
        if isinstance(found, str):
            absent.append(Row(name, "absent", found))
        else:
            variants.append(_Variant(name, found))
    return variants, absent


def _counterpart(name: str, question: Question, shapes: Mapping[str, Any]) -> Callable | str:
    """The same call in the library, or of the "module:function", `name`, or why there is none."""
    options = tuple(word for word in question.options if not word.startswith("implementation="))
    if ":" in name:
        return dataclasses.replace(question, operator=name, options=options).call()[0]
    static = dict(option(word) for word in options)
    found = peers.find(name, question.operator, {**shapes, **static})
    if isinstance(found, str):
        return found
    if name == "torch" and devices.at_hand().platform != "cpu":
        return "torch is compared on a CPU only"
    return functools.partial(found, **static)


def _program(function: Callable) -> Callable:
    """f(chosen, fixed, cotangents): the outputs by name and the gradients of what is `chosen`, in one program."""

    def run(chosen, fixed, cotangents):
        if not chosen:
            return comparison.outputs_of(function(**fixed))
        outputs, pull_back = jax.vjp(lambda chosen: comparison.outputs_of(function(**chosen, **fixed)), chosen)
        (gradients,) = pull_back(cotangents)
        return {**outputs, **{f"gradient of {name}": gradient for name, gradient in gradients.items()}}

    return run


def _arguments(function: Callable, operands: Mapping[str, Any], gradients: bool) -> tuple[dict, dict, dict]:
    """What `_program` takes: with `gradients` all floating operands are chosen, and cotangents are random."""
    arrays = {name: jnp.asarray(x) for name, x in operands.items()}
    chosen = {n: x for n, x in arrays.items() if gradients and jnp.issubdtype(x.dtype, jnp.floating)}
    fixed = {n: x for n, x in arrays.items() if n not in chosen}
    outputs = jax.eval_shape(lambda arrays: comparison.outputs_of(function(**arrays)), arrays)
    random = np.random.default_rng(1)
    cotangents = {n: jnp.asarray(random.standard_normal(y.shape), y.dtype) for n, y in outputs.items()}
    return chosen, fixed, cotangents if chosen else {}


def _prepare(variant: _Variant, arguments: tuple, judge: "_Judge") -> tuple[Callable[[], Any], Row]:
    """(the call, ready to be timed; what came of running it once)."""
    try:
        if variant.name == "torch":
            run, temp = _torch_call(variant.function, *arguments), None
        else:
            compiled = jax.jit(_program(variant.function)).lower(*arguments).compile()
            run, temp = functools.partial(compiled, *arguments), timing.temp_bytes(compiled)
        got = {name: _as_numpy(x) for name, x in run().items()}
    except Exception as error:  # kernels and peers may fail in any way: that is their row
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return lambda: None, Row(variant.name, "failed", words if len(words) <= 300 else words[:300] + " …")
    return run, dataclasses.replace(judge.row(variant, got), temp_bytes=temp)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Compares results with `exact`, in float64; `unfused` is the plain form whose error is the yardstick.

    `dtype` is the narrowest of the operands, whose rounding is forgiven.
    """

    dtype: Any
    unfused: Mapping[str, Any]
    exact: Mapping[str, np.ndarray]

    @staticmethod
    def of(function: Callable, arguments: tuple) -> "_Judge":
        """By the references of the operators that `function` calls; by itself, in float32 and rounded, without any."""

        def plain(**operands):
            with autodiff.by_reference():
                return function(**operands)

        def as_wide_as(dtype: Any) -> Any:
            return jax.tree.map(
                lambda x: np.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x), arguments
            )

        program = _program(plain)
        with jax.enable_x64(True), jax.default_device("cpu"):  # an accelerator has no float64, or a slow one
            exact = jax.device_get(jax.jit(program)(*as_wide_as(np.float64)))
        if comparison.calls_operators(function, {**arguments[0], **arguments[1]}):
            unfused = program(*arguments)
        else:
            like = jax.eval_shape(program, *arguments)
            unfused = jax.tree.map(lambda x, y: x.astype(y.dtype), program(*as_wide_as(np.float32)), like)
        dtypes = [x.dtype for x in jax.tree.leaves(arguments[:2]) if jnp.issubdtype(x.dtype, jnp.floating)]
        narrowest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.dtype(jnp.float32))
        return _Judge(narrowest, jax.device_get(unfused), exact)

    def row(self, variant: _Variant, got: Mapping[str, Any]) -> Row:
        if set(got) != set(self.exact):
            return Row(variant.name, "wrong", f"it gives {', '.join(got)}, not {', '.join(self.exact)}")
        worst, wrong = 0.0, ""
        for name, exact in self.exact.items():
            found, unfused = np.asarray(got[name]), self.unfused[name]
            if variant.peer:
                error = comparison.error(found, exact, 2) if found.shape == exact.shape else float("inf")
                allowed = _SAME_16_BIT if unfused.dtype.itemsize == 2 else _SAME
                if not error <= allowed:
                    wrong = wrong or f"{name}: error {error:.2e}, allowed {allowed:.2e}"
            else:
                compared = comparison.judge(name, found, [(unfused, exact)], self.dtype)
                error = compared.error
                if not compared.holds:
                    wrong = wrong or str(compared)
            worst = max(worst, error)
        return Row(variant.name, "wrong" if wrong else "timed", wrong, error=worst)


def _as_numpy(x: Any) -> np.ndarray:
    """A JAX or torch array; torch's in float64, because NumPy does not know its bfloat16."""
    return np.asarray(x) if isinstance(x, jax.Array) else x.detach().double().numpy()


def _torch_call(function: Callable, chosen: Mapping, fixed: Mapping, cotangents: Mapping) -> Callable[[], Any]:
    """The same program with torch's own tensors and derivative."""
    import torch

    def tensor(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return torch.from_numpy(np.array(x))
        return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, str(x.dtype)))

    leaves = {name: tensor(x).requires_grad_() for name, x in chosen.items()}
    others = {name: tensor(x) for name, x in fixed.items()}
    pulled = {name: tensor(x) for name, x in cotangents.items()}

    def run():
        outputs = peers.torch_outputs(function(**leaves, **others))
        if not leaves:
            return outputs
        along = [pulled[name].to(y.dtype) for name, y in outputs.items()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), along)
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {name: y.detach() for name, y in outputs.items()} | named

    return run


# ---- modelled -------------------------------------------------------------------------------------------------------


def model(
    question: Question,
    targets: Sequence[str],
    against: Sequence[str] = (),
    *,
    seconds: float = 300,
    workers: int | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Benchmark]:
    """The call on chips that are not here, by the schedule that their compilers make: one benchmark for each target.

    Variants: what the operator chooses, the same in XLA where a kernel runs, and its counterparts `against`.

    seconds: for one compilation. Raises `Problem` for words that make no sense, an absent library or compiler.
    """
    function, shapes = question.call()
    try:
        work = cost_of(*_gradients_program(function, shapes)) if question.gradients else cost_of(function, **shapes)
        jobs = [job for target in targets for job in _jobs(question, target, function, shapes, against)]
    except (TypeError, ValueError) as error:  # the operator's own word on its input
        raise Problem(str(error)) from error
    results = iter(
        compiler.compile_jobs(
            [job for _, _, job in jobs if isinstance(job, compiler.Job)],
            seconds=seconds,
            workers=workers,
            advance=advance,
        )
    )
    rows: dict[str, list[Row]] = {target: [] for target in targets}
    for target, name, job in jobs:
        rows[target].append(Row(name, "absent", job) if isinstance(job, str) else _modelled(name, next(results)))
    return [
        Benchmark(question, name, True, work, published(chips.named(name), question.dtype), tuple(rows[name]))
        for name in targets
    ]


def _gradients_program(function: Callable, shapes: Mapping[str, Any]) -> tuple[Callable, dict, dict, dict]:
    """(the gradients as a function, its three arguments): what the compiler service makes of a job with gradients."""
    chosen = {name: x for name, x in shapes.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    fixed = {name: x for name, x in shapes.items() if name not in chosen}
    cotangents = jax.eval_shape(lambda operands: comparison.outputs_of(function(**operands)), dict(shapes))

    def gradients(chosen, fixed, cotangents):
        found = _program(function)(chosen, fixed, cotangents)
        return {name: x for name, x in found.items() if name not in cotangents}

    return gradients, chosen, fixed, cotangents


def _jobs(
    question: Question, target: str, function: Callable, shapes: Mapping[str, Any], against: Sequence[str]
) -> list[tuple[str, str, compiler.Job | str]]:
    """(target, variant, what to compile or why there is nothing)."""
    options = tuple(word for word in question.options if not word.startswith("implementation="))
    library_has_it = question.operator in operators()

    def job(function: str, options: tuple[str, ...], implementation: str | None = None) -> compiler.Job:
        return compiler.Job(
            chip=target,
            function=function,
            operands=question.operands,
            options=options,
            dtype=question.dtype,
            gradients=question.gradients,
            implementation=implementation,
            schedule=True,
        )

    ours = "jaxops" if library_has_it else question.operator
    found: list[tuple[str, str, compiler.Job | str]] = [(target, ours, job(question.operator, question.options))]
    if library_has_it and options == question.options:
        lines = explain(function, target=target, **shapes).lines
        if any(line.implementation == "pallas" for line in lines):
            found.append((target, "jaxops, XLA", job(question.operator, options, "xla")))
    for name in against:
        if ":" in name:
            found.append((target, name, job(name, options)))
            continue
        peer = peers.find(name, question.operator, {**shapes, **dict(option(word) for word in options)})
        if name == "torch":
            peer = "torch makes no program that could be modelled"
        found.append(
            (target, name, peer if isinstance(peer, str) else job(f"{peer.__module__}:{peer.__name__}", options))
        )
    return found


def _modelled(name: str, result: Mapping[str, Any]) -> Row:
    """What the compiler made of one variant."""
    if result["status"] != "compiled":
        return Row(name, "failed", result["reason"])
    schedule, temp = result["schedule"], result["temp_bytes"]
    if "error" in schedule:
        return Row(name, "absent", f"compiled, but its schedule cannot be read: {schedule['error']}", temp_bytes=temp)
    if schedule["seconds"] is None:
        kernels = "; ".join(
            f"{kernel['name']}: {kernel['registers']} registers, {kernel['spill_store_bytes']} bytes spilled, "
            f"{kernel['smem_bytes']} bytes of shared memory, occupancy {100 * kernel['occupancy']:.0f} %"
            for kernel in schedule["kernels"]
        )
        return Row(name, "absent", f"compiled; a GPU program has no modelled time. {kernels}", temp_bytes=temp)
    return Row(name, "modelled", spread=timing.Spread((schedule["seconds"],)), temp_bytes=temp)
