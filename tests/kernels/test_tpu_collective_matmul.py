"""Rings with remote DMA on the TPU: interpreted on virtual devices, races detected, unwritten memory NaN, one device
late, against float64; and that each wait is needed."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.dispatch import runtime_tokens
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P

from jaxops.interpreter import tpu as interpreter
from pallas_kernels import chips
from pallas_kernels.tpu import collective_matmul as kernels
from tests.compare import no_worse

FULL = "highest"  # float32 products in full
ROWS, COLUMNS = P(None, "x"), P(None, None, "x")  # of [blocks, rows, columns]
SMALL = kernels.Tiles(16, 128, 128)
SLOW = pytest.mark.slow


def mesh_of(chip, **axes):
    """(A mesh of virtual devices, the same as if it were of `chip`.)"""
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    size = int(np.prod(list(axes.values())))
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:size], axis_types=kinds)
    return mesh, mesh.abstract_mesh.update(abstract_device=chips.abstract_device(chips.named(chip)))


# Each form: T, b, r, k, n ↦ operands (shape, how it is split), how results are split, the kernel, the same in plain JAX


def gather(T, b, r, k, n):
    operands = [((b, T * r, k), ROWS), ((k, T * n), P(None, "x")), ((k, T * 2 * n), P(None, "x"))]
    call = lambda x, *ws, **options: kernels.gather(x, ws, **options)[0]
    return operands, [COLUMNS] * 2, call, lambda x, *ws: [dot(x, w) for w in ws]


def keep(T, b, r, k, n):
    """As in the gradient of a scatter: w transposed, and what was gathered beside."""

    def call(x, w, **options):
        (y,), whole = kernels.gather(x, [w], transposed=True, keep=True, **options)
        return [y, whole[None]]

    operands = [((b, T * r, k), ROWS), ((T * n, k), P("x"))]
    return operands, [COLUMNS, P("x")], call, lambda x, w: [dot(x, w.T), jnp.stack([x] * T)]


def scatter(T, b, r, k, n):
    operands = [((b, T * r, T * k), COLUMNS), ((T * k, n), P("x"))]
    call = lambda x, w, **options: [kernels.scatter([x], [w], **options)]
    return operands, [ROWS], call, lambda x, w: [sum_of_parts(T, (x, w))]


def pairs(T, b, r, k, n):
    """As in the gradient of a gather by several weights: two products of different depth in one sum, transposed."""
    operands = [(shape, COLUMNS) for shape in ((b, T * r, T * k), (b, T * r, T * 2 * k))]
    operands += [((n, T * k), P(None, "x")), ((n, T * 2 * k), P(None, "x"))]
    call = lambda x1, x2, w1, w2, **options: [kernels.scatter([x1, x2], [w1, w2], transposed=True, **options)]
    return operands, [ROWS], call, lambda x1, x2, w1, w2: [sum_of_parts(T, (x1, w1.T), (x2, w2.T))]


def accumulate(T, b, r, k, n):
    flat = lambda x: x.reshape(-1, x.shape[-1])
    operands = [((b, T * r, k), ROWS), ((b, T * r, T * n), COLUMNS)]
    call = lambda x, y, **options: kernels.accumulate(x, [y], **options)
    return operands, [P(None, "x")], call, lambda x, y: [dot(flat(x).T, flat(y))]


def dot(a, b):
    return jnp.dot(a, b, precision=FULL, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)).astype(a.dtype)


def sum_of_parts(T, *pairs):
    """As a reduce-scatter has it: every device rounds its part."""
    along = lambda x, axis: jnp.split(x, T, axis)
    return functools.reduce(
        jnp.add, [dot(a, b) for x, w in pairs for a, b in zip(along(x, -1), along(w, 0), strict=True)]
    )


def late(x, axis, index):
    """x, on one device a while later than on the others."""

    def wait(mine):
        time.sleep(2 if int(mine) == index else 0)
        return np.zeros((), x.dtype)

    return x + io_callback(wait, jax.ShapeDtypeStruct((), x.dtype), jax.lax.axis_index(axis))


def run(form, chip, mode, T, b, r, k, n, dtype, tiles=None, slow=None, without=None):
    """(operands, results) of a kernel, interpreted; device `slow` is late."""
    random = np.random.default_rng(0)
    operands, results, call, plain = form(T, b, r, k, n)
    low = [jnp.asarray(random.standard_normal(shape), dtype) for shape, _ in operands]
    specs = tuple(spec for _, spec in operands)
    mesh, as_chip = mesh_of(chip, x=T)

    def local(x, *others):
        x = x if slow is None else late(x, "x", slow)
        options = dict(axis="x", chip=chips.named(chip), precision=FULL, tiles=tiles, without=without)
        return call(x, *others, **options)

    mapped = jax.shard_map(local, mesh=as_chip, in_specs=specs, out_specs=results, check_vma=True)
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(low, specs, strict=True)]
    with interpreter(dma_execution_mode=mode):
        return low, plain, jax.tree.map(np.asarray, jax.jit(mapped)(*placed))


CASES = [  # form, chip (v5p has two cores), DMAs, T, b, r, k, n, dtype, tiles, late device
    (gather, "v5e", "eager", 4, 1, 5, 130, 8, "bfloat16", None, 1),
    (scatter, "v5p", "on_wait", 4, 1, 35, 8, 9, "bfloat16", SMALL, None),
    (accumulate, "v5e", "on_wait", 3, 1, 5, 8, 9, "float32", None, None),
]
FURTHER = [
    (gather, "v5p", "on_wait", 8, 1, 5, 8, 9, "float32", None, 0),
    (gather, "v5p", "eager", 3, 2, 40, 200, 70, "float32", SMALL, None),
    (gather, "v5e", "on_wait", 2, 1, 1, 1, 1, "bfloat16", None, None),
    (keep, "v5e", "eager", 8, 1, 7, 9, 8, "bfloat16", None, 5),
    (keep, "v5p", "on_wait", 4, 2, 40, 200, 130, "float32", SMALL, None),
    (scatter, "v5e", "eager", 8, 1, 5, 8, 9, "float32", None, 3),
    (scatter, "v5p", "eager", 2, 2, 40, 200, 130, "bfloat16", SMALL, None),
    (pairs, "v5e", "eager", 4, 2, 40, 100, 130, "float32", SMALL, None),
    (pairs, "v5p", "on_wait", 8, 1, 20, 9, 8, "bfloat16", None, 7),
    (accumulate, "v5p", "eager", 8, 1, 7, 9, 8, "bfloat16", None, 2),
    (accumulate, "v5e", "eager", 2, 2, 140, 300, 130, "float32", kernels.Tiles(128, 128, 128), None),
]


def named(values):
    """The name of a case; a function's own would hold its address."""
    return " ".join(getattr(value, "__name__", str(value)) for value in values)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=SLOW) for case in FURTHER)], ids=named)
def test_equal_to_the_product_of_whole_arrays(case):
    form, chip, mode, T, b, r, k, n, dtype, tiles, slow = case
    low, plain, got = run(form, chip, mode, T, b, r, k, n, dtype, tiles, slow)
    unfused = plain(*low)
    with jax.enable_x64(True):
        exact = plain(*(jnp.asarray(np.asarray(x, np.float64)) for x in low))
    for y, like, oracle in zip(got, unfused, exact, strict=True):
        no_worse(form.__name__, y, like, oracle, dtype)


# Of 8 devices each receives more often than it has slots. Permits are left out on two cores: on one, what arrives on
# the other way says nearly as much (of `scatter` always, of the others it depends on the order of the threads whether a
# race is found). A device that is late must not be written to; two cores compile their kernel before they run it, so
# that there no device can be relied on to be late.
FAULTS = [
    (gather, "arrival", "v5e", "on_wait", 4, None),
    (gather, "arrival", "v5p", "eager", 4, None),
    (gather, "permit", "v5p", "eager", 8, None),
    (gather, "barrier", "v5e", "eager", 4, 0),
    (scatter, "arrival", "v5e", "eager", 4, None),
    (scatter, "arrival", "v5p", "eager", 4, None),
    (scatter, "permit", "v5p", "eager", 8, None),
    (scatter, "barrier", "v5e", "eager", 4, 0),
    (accumulate, "arrival", "v5e", "eager", 4, None),
    (accumulate, "permit", "v5p", "eager", 8, None),
]


@pytest.mark.parametrize("fault", [FAULTS[0], *(pytest.param(fault, marks=SLOW) for fault in FAULTS[1:])], ids=named)
def test_a_wait_that_is_left_out_is_found(fault):
    form, without, chip, mode, T, slow = fault
    try:
        *_, got = run(form, chip, mode, T, 1, 5, 8, 9, "float32", None, slow, without)
    except Exception as error:
        runtime_tokens.clear()  # else JAX raises the same once more at its exit
        # What a device writes to one that has not entered is nowhere.
        assert "race" in str(error).lower() or without == "barrier", error
    else:
        assert np.isnan(got[0]).any()


def test_refusals():
    shape = lambda *sizes, dtype="bfloat16": jax.ShapeDtypeStruct(sizes, dtype)
    x, w = shape(2, 16, 64), shape(64, 128)
    assert kernels.unsupported([x], [w, w], None) is None
    assert "must be float32 or bfloat16 on a TPU, got float16" in kernels.unsupported(
        [shape(8, 64, dtype="float16")], [w], None
    )
    assert "one dtype, got bfloat16 and float32" in kernels.unsupported([x], [shape(64, 8, dtype="float32")], None)
    wide = [shape(8, 64, dtype="float32"), shape(64, 8, dtype="float32")]
    assert "precision default or highest" in kernels.unsupported(wide[:1], wide[1:], "high")
    assert "nothing" in kernels.unsupported([shape(0, 64)], [w], None)


def test_where_nothing_is_known_to_be_gained():
    """Over 8 and 4 devices of [16384, 8192] · [8192, 28672]: XLA's transfers wait for products, or are hidden."""
    v5p, shape = chips.named("v5p"), lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    assert kernels.no_gain(v5p, 2048, [shape(8192, 3584)], scattered=False) is None
    assert kernels.no_gain(v5p, 2048, [shape(3584, 8192)], scattered=True) is None
    assert "5100 are enough" in kernels.no_gain(v5p, 4096, [shape(8192, 7168)], scattered=False)
    assert "5100 are enough" in kernels.no_gain(v5p, 4096, [shape(7168, 8192)], scattered=True)
    assert "not on v5e" in kernels.no_gain(chips.named("v5e"), 2048, [shape(8192, 3584)], scattered=False)
    assert "less than two tiles" in kernels.no_gain(v5p, 100, [shape(8192, 3584)], scattered=False)
