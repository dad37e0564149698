"""Which scalar operands of a Pallas call are known while tracing, and how they lie in SMEM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

import jaxops
from jaxops.schedule import tpu
from jaxops.schedule.scalars import smem_words
from tests.schedule import dumps


def test_splash_attention_tells_its_blocks():
    """The tables that the compiler got when the dump was recorded, found anew in a trace."""
    sizes = splash_attention_kernel.BlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((4096, 4096)) for _ in range(8)])

    def attention(query, key, value):
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes)
        return jax.vmap(kernel)(query, key, value)

    x = jax.ShapeDtypeStruct((4, 8, 4096, 128), jnp.bfloat16)
    with jaxops.target("v5e"):
        (found,) = tpu.known_scalars(jax.jit(attention).trace(x, x, x))
    (recorded,) = dumps.scalars("splash_v5e")
    assert (found.name, found.grid) == (recorded.name, recorded.grid) and set(found.words) >= {0, 1}
    assert dict(found.words) == dict(recorded.words)


def _call(table, x):
    def kernel(table_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...] * table_ref[pl.program_id(0)]

    spec = pl.BlockSpec((8, 128), lambda i, table_ref: (table_ref[i], 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(4,), in_specs=[spec], out_specs=spec)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="picked")(
        table, x
    )


X = jax.ShapeDtypeStruct((32, 128), jnp.float32)


def test_constants_are_carried_through_the_program():
    @jax.jit
    def halved(table):
        return table // 2

    def program(x):
        return _call(halved(jnp.arange(4, dtype=jnp.int32)[::-1] * 2), jnp.exp(x))

    (found,) = tpu.known_scalars(jax.jit(program).trace(X))
    assert (found.name, found.grid, dict(found.words)) == ("picked", (4,), {0: (3, 2, 1, 0)})


def test_arguments_are_known_only_if_they_are_told():
    traced = jax.jit(_call).trace(jax.ShapeDtypeStruct((4,), jnp.int32), X)
    (blind,) = tpu.known_scalars(traced)
    (told,) = tpu.known_scalars(traced, [np.array([1, 0, 3, -1], np.int32), None])
    assert dict(blind.words) == {} and dict(told.words) == {0: (1, 0, 3, -1)}


def test_a_call_within_a_loop_is_listed_and_nothing_of_it_is_known():
    def program(x):
        body = lambda i, x: _call(jnp.arange(4, dtype=jnp.int32) * i, x)
        return jax.lax.fori_loop(0, 3, body, x)

    (found,) = tpu.known_scalars(jax.jit(program).trace(X))
    assert found.name == "picked" and dict(found.words) == {}


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([5, -1], np.int32), [5, -1]),
        (np.array([[1, 2], [3, 4]], np.int32), [1, 2, *[0] * 126, 3, 4, *[0] * 126]),
        (np.array([[1, 2], [3, 4], [5, 6]], np.int16), [1 + (3 << 16), 2 + (4 << 16), *[0] * 126, 5, 6, *[0] * 126]),
        (np.array([[1], [2], [3], [-1], [7]], np.int8), [0xFF030201, *[0] * 127, 7, *[0] * 127]),
        (np.array([True, False, True]), [1, 0, 1, *[0] * 125]),
    ],
    ids=["int32", "rows", "int16", "int8", "bool"],
)
def test_smem_words(array, words):
    assert smem_words(array) == tuple(words)
