"""One traced program for every platform; what is refused, and with which words."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxops
from jaxops import dispatch
from pallas_kernels import chips

F32, BF16 = jnp.float32, jnp.bfloat16


def _array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _norm(x, scale):
    return jaxops.rms_norm(x, scale)


def _layer_norm(x, scale, bias):
    return jaxops.layer_norm(x, scale, bias)


def _add_norm(x, residual, scale):
    y, total = jaxops.add_rms_norm(x, residual, scale)
    return y + total


def _attention(q, k, v):
    return jaxops.dot_product_attention(q, k, v, is_causal=True)


def _cross_entropy(x, weight, labels):
    return jaxops.linear_cross_entropy(x, weight, labels)


# operator, operands, how many of them take a gradient, which platforms have a kernel
PROGRAMS = {
    "rms_norm": (_norm, (_array(300, 256), _array(256, dtype=F32)), 2, ("tpu", "cuda")),
    "layer_norm": (_layer_norm, (_array(300, 256), _array(256, dtype=F32), _array(256, dtype=F32)), 3, ("tpu", "cuda")),
    "add_rms_norm": (_add_norm, (_array(300, 256), _array(300, 256), _array(256, dtype=F32)), 3, ("tpu", "cuda")),
    "dot_product_attention": (
        _attention,
        (_array(2, 256, 4, 128), _array(2, 256, 2, 128), _array(2, 256, 2, 128)),
        3,
        ("tpu", "cuda"),
    ),
    "linear_cross_entropy": (
        _cross_entropy,
        (_array(256, 128), _array(128, 1024), _array(256, dtype=jnp.int32)),
        2,
        ("tpu", "cuda"),
    ),
    "ragged_dot": (
        jaxops.ragged_dot,
        (_array(300, 128), _array(3, 128, 256), _array(3, dtype=jnp.int32)),
        2,
        ("tpu", "cuda"),
    ),
}
MARKS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}


def _gradient(function, count):
    return jax.jit(jax.grad(lambda *xs: jnp.sum(function(*xs).astype(F32)), tuple(range(count))))


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_traced_program_lowers_for_every_platform(name):
    function, operands, count, kernels = PROGRAMS[name]
    for program in (jax.jit(function), _gradient(function, count)):
        traced = program.trace(*operands)
        for platform in ("tpu", "cuda", "cpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            present = {p for p, mark in MARKS.items() if mark in text}
            assert present == ({platform} & set(kernels)), f"{name} for {platform}: {present}"


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_a_program_is_exported_for_a_platform_that_is_not_here(platform):
    function, operands, _, _ = PROGRAMS["rms_norm"]
    exported = jax.export.export(jax.jit(function), platforms=[platform])(*operands)
    assert exported.platforms == (platform,)
    assert any(mark in exported.mlir_module() for mark in MARKS.values()) == (platform != "cpu")


@pytest.mark.parametrize("name", PROGRAMS)
def test_vmap_keeps_the_kernel(name):
    function, operands, _, kernels = PROGRAMS[name]
    stacked = [_array(2, *x.shape, dtype=x.dtype) for x in operands]
    traced = jax.jit(jax.vmap(function)).trace(*stacked)
    for platform in kernels:
        assert MARKS[platform] in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_kernel_stands_in_shard_map_and_xla_under_automatic_partitioning():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 256), BF16, sharding=NamedSharding(mesh, PartitionSpec("d")))
    scale = jax.ShapeDtypeStruct((256,), F32, sharding=NamedSharding(mesh, PartitionSpec()))
    by_hand = jax.shard_map(
        _norm, mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec()), out_specs=PartitionSpec("d")
    )
    for program, expected in ((_norm, False), (by_hand, True)):
        text = jax.jit(program).trace(x, scale).lower(lowering_platforms=("tpu",)).as_text()
        assert (MARKS["tpu"] in text) == expected


def test_a_strict_kernel_under_automatic_partitioning_says_what_to_do():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 256), BF16, sharding=NamedSharding(mesh, PartitionSpec("d")))
    strict = jax.jit(functools.partial(jaxops.rms_norm, implementation="pallas"))
    with pytest.raises(ValueError, match=r"partitioned automatically over 8 devices.*shard_map"):
        strict.trace(x, jnp.ones(256)).lower(lowering_platforms=("tpu",))


def test_the_order_given_is_the_order_tried():
    function = functools.partial(jaxops.rms_norm, implementation=("xla", "pallas"))
    text = jax.jit(function).trace(*PROGRAMS["rms_norm"][1]).lower(lowering_platforms=("tpu",)).as_text()
    assert MARKS["tpu"] not in text


@pytest.mark.parametrize("bad", ["palas", "cudnn", ("xla", "triton"), ()])
def test_an_unknown_implementation_is_named(bad):
    with pytest.raises(ValueError, match=r"rms_norm: implementation must be None, one of \('pallas', 'xla'\)"):
        jaxops.rms_norm(jnp.ones((2, 8)), jnp.ones(8), implementation=bad)


def test_a_strict_kernel_raises_on_a_platform_without_kernels():
    with pytest.raises(ValueError, match="kernels run on TPU and CUDA only"):
        jaxops.rms_norm(jnp.ones((2, 8)), jnp.ones(8), implementation="pallas")


def test_a_strict_kernel_raises_the_kernels_own_reason_while_tracing():
    q = jnp.ones((1, 16, 2, 64), jnp.float32)
    strict = functools.partial(jaxops.dot_product_attention, q, q, q, implementation="pallas")
    with jaxops.target("h100"), pytest.raises(ValueError, match=r"'pallas' was asked for, but gpu: .*float32"):
        jax.eval_shape(strict)


def test_the_default_never_raises_where_a_kernel_refuses():
    q = jnp.ones((1, 16, 2, 64), jnp.float32)
    with jaxops.target("h100"):
        traced = jax.jit(jaxops.dot_product_attention).trace(q, q, q)
        assert MARKS["cuda"] not in traced.lower(lowering_platforms=("cuda",)).as_text()


# ---- explain and target ----


def test_explain_names_each_call_of_a_program_and_the_reasons():
    function, operands, count, _ = PROGRAMS["rms_norm"]
    explained = jaxops.explain(_gradient(function, count), *operands, target="v6e")
    assert [(line.phase, line.chip, line.implementation, line.reason) for line in explained.lines] == [
        ("forward", "v6e", "pallas", ""),
        ("backward", "v6e", "pallas", ""),
    ]
    (line,) = jaxops.explain(jaxops.rms_norm, *operands, target="a100").lines
    assert line.implementation == "xla" and "8.0" in line.reason
    (line,) = jaxops.explain(jaxops.rms_norm, *operands).lines
    assert line.chip == "cpu" and line.implementation == "xla" and "TPU and CUDA only" in line.reason
    assert "rms_norm forward [x bf16[300,256], scale f32[256]] on cpu: xla" in str(line)


def test_explain_counts_repeated_calls_and_finds_those_inside_loops():
    def layers(x, scale):
        x, _ = jax.lax.scan(lambda x, _: (_norm(x, scale), None), x, None, length=3)
        return _norm(_norm(x, scale), scale)

    (line,) = jaxops.explain(layers, *PROGRAMS["rms_norm"][1]).lines
    assert line.count == 3  # call sites: one in the loop, two after it


def test_explain_compiles_on_request_and_says_what_is_saved():
    q = _array(1, 1024, 2, 64, dtype=F32)
    explained = jaxops.explain(functools.partial(jaxops.dot_product_attention, is_causal=True), q, q, q, compile=True)
    assert 0 < explained.temp_bytes < 64e6
    assert explained.lines[0].saved_bytes == 2 * 1024 * 4  # the log-sum-exp
    assert "MB" in str(explained)


def test_explain_of_a_program_without_operators():
    assert str(jaxops.explain(jnp.sin, jnp.ones(3))) == "no jaxops operator is called"


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"target must be one of v4, v5e, .*got 'h200'"), jaxops.target("h200"):
        pass


@pytest.mark.parametrize("name", chips.CHIPS)
def test_a_target_is_what_kernels_see(name):
    with jaxops.target(name) as chip:
        assert chips.current(chip.platform) is chip is chips.targeted()
    assert chips.targeted() is None


def test_kinds_of_devices_are_known():
    assert chips.of_kind("TPU v5 lite").name == "v5e"
    assert chips.of_kind("NVIDIA H100 PCIe").name == "h100"
    assert chips.of_kind("cpu") is None


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_a_target_runs_the_kernels_in_the_interpreter_on_request(target):
    rng = np.random.default_rng(0)
    x, scale = jnp.asarray(rng.standard_normal((5, 128)), F32), jnp.asarray(rng.standard_normal(128), F32)
    gradient = jax.grad(lambda x, scale: jnp.sum(jnp.sin(_norm(x, scale))), (0, 1))
    want = gradient(x, scale)
    with jaxops.target(target, interpret=True):
        got = gradient(x, scale)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_choice_reads_as_a_sentence():
    choice = dispatch.choose(("pallas",), "too large")
    assert choice.implementation is None and choice.reason == "pallas: too large"
