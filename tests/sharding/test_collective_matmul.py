"""Rings of products: equal to the plain composition, in every transform that a ring has, and what they send."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from jaxops import interpreter
from pallas_kernels import chips
from tests.compare import error, no_worse
from tests.sharding.traffic import compiled, sent

SLOW = pytest.mark.slow
module = sys.modules["sharding.collective_matmul"]

FORMS = {  # x and w local, whole
    "all_gather_matmul": (
        sharding.all_gather_matmul,
        P("data", "tensor"),
        P(None, "tensor"),
        P("data", None, "tensor"),
    ),
    "matmul_reduce_scatter": (
        sharding.matmul_reduce_scatter,
        P("data", None, "tensor"),
        P("tensor"),
        P("data", "tensor"),
    ),
}


def operands(rows, k=16, n=24, dtype=jnp.float32):
    random = np.random.default_rng(0)
    return jnp.asarray(random.standard_normal((2, rows, k)), dtype), jnp.asarray(random.standard_normal((k, n)), dtype)


def over(mesh, name, **options):
    function, *specs, out_spec = FORMS[name]
    local = functools.partial(function, axis="tensor", **options)
    return jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=out_spec)


UNOVERLAPPED = {
    "all_gather_matmul": lambda x, w: plain(sharding.all_gather(x, "tensor", -2), w),
    "matmul_reduce_scatter": lambda x, w: sharding.reduce_scatter(plain(x, w), "tensor", -2),
}


def value_and_gradients(product):
    def loss(x, w):
        y = product(x, w)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def plain(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("tensor", "rows"), [(2, 10), (4, 12), (8, 8), pytest.param(8, 24, marks=pytest.mark.slow)])
def test_equal_to_the_product_of_whole_arrays(name, tensor, rows):
    """12 rows over 4 devices: halves of 2 and 1; 8 over 8: a shard of one row goes one way."""
    mesh = sharding.make_mesh(
        data=-1 if tensor < 8 else 1,
        tensor=tensor,
        devices=jax.devices()[: max(tensor * 2, 8)][: 8 if tensor > 2 else 4],
    )
    x, w = operands(rows)
    program = compiled(value_and_gradients(over(mesh, name)), x, w)
    for got, want in zip(
        jax.tree.leaves(program(x, w)), jax.tree.leaves(value_and_gradients(plain)(x, w)), strict=True
    ):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_is_no_worse_than_the_plain_composition(name):
    """Sums that travel are rounded at each device: against a sum of 8 products rounded to bfloat16 each."""
    mesh = sharding.make_mesh(tensor=8)
    x, w = operands(24, dtype=jnp.bfloat16)
    _, *specs, out_spec = FORMS[name]
    unoverlapped = jax.shard_map(UNOVERLAPPED[name], mesh=mesh, in_specs=tuple(specs), out_specs=out_spec)
    ring, xla = (jax.jit(value_and_gradients(f))(x, w) for f in (over(mesh, name), unoverlapped))
    with jax.enable_x64(True):
        exact = value_and_gradients(plain)(x.astype(jnp.float64), w.astype(jnp.float64))
    for what, got, unfused, oracle in zip(
        ("y", "dx", "dw"), (ring[0][1], *ring[1]), (xla[0][1], *xla[1]), (exact[0][1], *exact[1]), strict=True
    ):
        no_worse(what, got, unfused, oracle, jnp.bfloat16)


@pytest.mark.parametrize("name", FORMS)
def test_what_it_sends(name):
    """Half of every shard each way: (T - 1) shards forward; backward (T - 1) more for dx, and one gather for dw."""
    mesh = sharding.make_mesh(tensor=8, data=1)
    x, w = operands(16)
    moved = x if name == "all_gather_matmul" else jax.eval_shape(plain, x, w)
    shard = moved.size * 4 // 8
    forward = compiled(over(mesh, name), x, w)
    assert sent(forward, dict(mesh.shape)) == {("collective-permute", "tensor"): 7 * shard}
    pairs = {
        line.partition("source_target_pairs=")[2][:6] for line in forward.as_text().splitlines() if "permute" in line
    }
    assert {"{{0,1}", "{{0,7}"} <= pairs
    pull = compiled(lambda x, w, ct: jax.vjp(over(mesh, name), x, w)[1](ct), x, w, jnp.ones((2, 16, 24)))
    gathers = 2 if name == "all_gather_matmul" else 1
    assert sent(pull, dict(mesh.shape)) == {("collective-permute", "tensor"): gathers * 7 * shard}


TRANSFORMS = {
    "forward mode": lambda f, xs, w: jax.jvp(f, (xs[0], w), (jnp.cos(xs[0]), 0.5 * w))[1],
    "forward mode of w": lambda f, xs, w: jax.vmap(lambda t: jax.jvp(lambda w: f(xs[0], w), (w,), (t,))[1])(
        jnp.stack([w, jnp.sin(w)])
    ),
    "forward over forward": lambda f, xs, w: jax.jvp(
        lambda x: jax.jvp(lambda w: f(x, w), (w,), (jnp.sin(w),))[1], (xs[0],), (xs[1],)
    )[1],
    "reverse over forward": lambda f, xs, w: jax.grad(
        lambda x: jnp.sin(jax.jvp(lambda w: f(x, w), (w,), (jnp.sin(w),))[1]).sum()
    )(xs[0]),
    "vmap": lambda f, xs, w: jax.vmap(jax.grad(lambda x, w: f(x, w).sum(), 1), (0, None))(xs, w),
    "checkpoint": lambda f, xs, w: jax.grad(lambda w: jnp.sin(jax.checkpoint(f)(xs[0], w)).sum())(w),
    "scan": lambda f, xs, w: jax.grad(
        lambda w: jax.lax.scan(lambda total, x: (total + jnp.sin(f(x, w)).sum(), None), 0.0, xs)[0]
    )(w),
    "grad of grad": lambda f, xs, w: jax.grad(
        lambda w: jnp.square(jax.grad(lambda w: jnp.sin(f(xs[0], w)).sum())(w)).sum()
    )(w),
    "forward over reverse": lambda f, xs, w: jax.jvp(
        jax.grad(lambda x: jnp.sin(f(x, w)).sum()), (xs[0],), (jnp.cos(xs[0]),)
    )[1],
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "transform", [pytest.param(t, marks=pytest.mark.slow) if t in ("scan", "checkpoint") else t for t in TRANSFORMS]
)
def test_transforms(transform, name):
    mesh = sharding.make_mesh(data=2, tensor=4)
    x, w = operands(8, k=8, n=12)
    xs = jnp.stack([x, 0.5 * x])
    run = TRANSFORMS[transform]
    got, want = (jax.jit(lambda xs, w, f=f: run(f, xs, w))(xs, w) for f in (over(mesh, name), plain))
    assert error(got, want) < 1e-5


def on(chip, implementation=None, dtype="bfloat16", rows=8192, name="all_gather_matmul", axes=None, gradient=False):
    """The program of a product, or of its gradients, on a mesh of `chip`s, manual over `axes` (None: all)."""
    mesh = sharding.make_mesh(data=2, tensor=4).abstract_mesh
    device = chips.abstract_device(chips.named(chip)) if chip else None
    function, *specs, out_spec = FORMS[name]
    specs = [P(*(one if one in (axes or mesh.axis_names) else None for one in spec)) for spec in (*specs, out_spec)]
    product = jax.shard_map(
        functools.partial(function, axis="tensor", implementation=implementation),
        mesh=mesh.update(abstract_device=device),
        in_specs=tuple(specs[:2]),
        out_specs=specs[2],
        axis_names=axes or set(),
    )
    loss = lambda x, w: product(x, w).astype(jnp.float32).sum()
    x, w = (jax.ShapeDtypeStruct(size, dtype) for size in ((2, rows, 2048), (2048, 4096)))
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1)) if gradient else product)(x, w))


@pytest.mark.parametrize("name", FORMS)
def test_a_kernel_serves_where_the_mesh_is_of_a_chip_that_gains_by_it(name):
    program = on("v5p", name=name, gradient=True)
    assert all(f"name={one}\n" in program for one in FORMS) and "ppermute" not in program


@pytest.mark.parametrize(
    "call", [dict(chip="v5e"), dict(chip=None), dict(chip="v5p", rows=64), dict(chip="v5p", dtype="float16")], ids=str
)
def test_elsewhere_xla_serves(call):
    program = on(**call)
    assert "name=all_gather_matmul" not in program and "ppermute" in program


def chained(x, w, implementation):
    """Both products, as in a layer, each the gradient of the other."""
    options = dict(axis="tensor", precision="highest", implementation=implementation)
    y = jnp.sin(sharding.all_gather_matmul(x, (w, 2 * w), **options)[1])
    return sharding.matmul_reduce_scatter(y, w.T, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform, chip",
    [("forward mode", "v5e"), ("forward over reverse", "v5e"), ("vmap", "v5e")],
)
def test_transforms_of_the_kernels(transform, chip):
    """Interpreted, on a mesh that says it is of TPUs."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    as_chip = mesh.abstract_mesh.update(abstract_device=chips.abstract_device(chips.named(chip)))
    x, w = operands(8, k=8, n=12)
    specs = (P("data", "tensor"), P(None, "tensor"))
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    xs, w = put(jnp.stack([x, 0.5 * x]), None, *specs[0]), put(w, *specs[1])

    def results(implementation, mesh):
        local = functools.partial(chained, implementation=implementation)
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return np.asarray(jax.jit(lambda xs, w: TRANSFORMS[transform](f, xs, w))(xs, w))

    want = results("xla", mesh)
    with interpreter.tpu():
        assert error(results("pallas", as_chip), want) < 1e-5


REFUSED = {
    "kernels with remote DMA run on TPU only, and the mesh is of NVIDIA H100": dict(chip="h100"),
    "the mesh does not tell which chip it is of": dict(chip=None),
    "operands must be float32 or bfloat16 on a TPU, got float16": dict(chip="v5p", dtype="float16"),
    r"mesh axes \['data'\] are partitioned automatically": dict(chip="v5p", axes={"tensor"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_kernel_alone_says_why_it_cannot_run(reason):
    with pytest.raises(ValueError, match=f"implementation 'pallas' was asked for, but {reason}"):
        on(implementation="pallas", **REFUSED[reason])


def test_matrices_that_share_their_rows_gather_them_once():
    mesh = sharding.make_mesh(data=1, tensor=8)
    x, w = operands(8)
    specs = dict(mesh=mesh, in_specs=(P(None, "tensor"), P(None, "tensor")), out_specs=P(None, None, "tensor"))
    both = jax.shard_map(lambda x, w: sum(sharding.all_gather_matmul(x, (w, 2 * w), axis="tensor")), **specs)
    program = compiled(value_and_gradients(both), x, w)
    for got, want in zip(
        jax.tree.leaves(program(x, w)),
        jax.tree.leaves(value_and_gradients(lambda x, w: 3 * plain(x, w))(x, w)),
        strict=True,
    ):
        assert error(got, want) < 1e-5
    assert sent(compiled(both, x, w), dict(mesh.shape)) == {("collective-permute", "tensor"): 7 * x.size * 4 // 8}


SPLIT = {  # x, w and y where w is split over "fsdp" besides
    "all_gather_matmul": (P(("data", "fsdp"), "tensor"), P("fsdp", "tensor"), P(("data", "fsdp"), None, "tensor")),
    "matmul_reduce_scatter": (P(("data", "fsdp"), None, "tensor"), P("tensor", "fsdp"), P(("data", "fsdp"), "tensor")),
}


def over_both(mesh, name, **options):
    x_spec, w_spec, y_spec = SPLIT[name]
    local = functools.partial(FORMS[name][0], axis="tensor", fsdp="fsdp", **options)
    return jax.shard_map(local, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)


@pytest.fixture(params=[1, module._LONG], ids=["long products", "short products"])
def longer(request, monkeypatch):
    """Halves are multiplied one by one, or put together."""
    monkeypatch.setattr(module, "_LONG", request.param)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("tensor", "fsdp", "rows"),
    [(2, 4, 10)] + [pytest.param(*case, marks=SLOW) for case in ((4, 2, 12), (1, 8, 6), (2, 2, 2), (8, 1, 8))],
)
def test_weights_that_are_split_over_a_second_axis(name, tensor, fsdp, rows, longer):
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, tensor=tensor)
    _, w = operands(rows)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, rows, 16)), jnp.float32)
    program = compiled(value_and_gradients(over_both(mesh, name)), x, w)
    for got, want in zip(
        jax.tree.leaves(program(x, w)), jax.tree.leaves(value_and_gradients(plain)(x, w)), strict=True
    ):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_split_weights_in_bfloat16_are_no_worse(name):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    _, w = operands(8, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 16)), jnp.bfloat16)
    x_spec, w_spec, y_spec = SPLIT[name]
    gathered = lambda x, w: UNOVERLAPPED[name](x, sharding.all_gather(w, "fsdp", w_spec.index("fsdp")))
    unoverlapped = jax.shard_map(gathered, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)
    ring, xla = (jax.jit(value_and_gradients(f))(x, w) for f in (over_both(mesh, name), unoverlapped))
    with jax.enable_x64(True):
        exact = value_and_gradients(plain)(x.astype(jnp.float64), w.astype(jnp.float64))
    for what, got, unfused, oracle in zip(
        ("y", "dx", "dw"), (ring[0][1], *ring[1]), (xla[0][1], *xla[1]), (exact[0][1], *exact[1]), strict=True
    ):
        no_worse(what, got, unfused, oracle, jnp.bfloat16)


@pytest.mark.parametrize("name", FORMS)
def test_what_split_weights_send(name, longer):
    """(F - 1) shards of w forward; backward as many of w, again, and of dw. Along "tensor" as with whole weights."""
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    _, w = operands(8)
    x = jnp.ones((4, 8, 16))
    y = jax.eval_shape(plain, x, w)
    rows = (x if name == "all_gather_matmul" else y).size * 4 // 8  # of the device, bytes
    shard = w.size * 4 // 8
    tensor, fsdp = ("collective-permute", "tensor"), ("collective-permute", "fsdp")
    axes = dict(mesh.shape)
    assert sent(compiled(over_both(mesh, name), x, w), axes) == {tensor: rows, fsdp: 3 * shard}
    pull = compiled(lambda x, w, ct: jax.vjp(over_both(mesh, name), x, w)[1](ct), x, w, jnp.ones(y.shape))
    gathers = 2 if name == "all_gather_matmul" else 1
    assert sent(pull, axes) == {tensor: gathers * rows, fsdp: 2 * 3 * shard}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("transform", [t if t == "grad of grad" else pytest.param(t, marks=SLOW) for t in TRANSFORMS])
def test_transforms_of_split_weights(transform, name):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    x, w = operands(8, k=8, n=16)
    xs = jnp.stack([x, 0.5 * x])
    run = TRANSFORMS[transform]
    got, want = (jax.jit(lambda xs, w, f=f: run(f, xs, w))(xs, w) for f in (over_both(mesh, name), plain))
    assert error(got, want) < 1e-5


def test_several_split_weights_travel_as_one():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    _, w = operands(8)
    x = jnp.ones((4, 8, 16))
    x_spec, w_spec, y_spec = SPLIT["all_gather_matmul"]

    def local(x, w):
        y, half = sharding.all_gather_matmul(x, (w, w[:, :6].astype(jnp.bfloat16)), axis="tensor", fsdp="fsdp")
        assert half.dtype == jnp.float32 and half.shape[-1] == 6
        return y

    both = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)
    assert error(jax.jit(both)(x, w), plain(x, w)) < 1e-5


SPLIT_BAD = {
    r"x has shape \(1, 10, 16\), its dimension 2 must be a multiple of 3, the devices along 'fsdp'": dict(fsdp=3),
    r"w must have shape \(8, n\)": dict(fsdp=2, specs=(P(), P(), P())),
    "axis must be a mesh axis of an enclosing jax.shard_map, got 'shards'": dict(fsdp=2, name="shards"),
    "but the kernels take whole weights": dict(fsdp=2, implementation="pallas"),
}


@pytest.mark.parametrize("message", SPLIT_BAD)
def test_bad_split_weights(message):
    options = dict(SPLIT_BAD[message])
    fsdp = options.pop("fsdp")
    mesh = sharding.make_mesh(fsdp=fsdp, tensor=1, devices=jax.devices()[:fsdp])
    specs = options.pop("specs", (P(), P("fsdp") if fsdp == 2 else P(), P()))
    local = functools.partial(sharding.all_gather_matmul, axis="tensor", fsdp=options.pop("name", "fsdp"), **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            jax.shard_map(local, mesh=mesh, in_specs=specs[:2], out_specs=specs[2], check_vma=False), X[:1], W
        )


X, W = operands(10)
BAD = {
    "x must be of a floating dtype, got int32": lambda: sharding.all_gather_matmul(jnp.ones((2, 3), int), W, axis="t"),
    r"x must have shape \(..., rows, k\), got \(16,\)": lambda: sharding.matmul_reduce_scatter(X[0, 0], W, axis="t"),
    r"w must have shape \(16, n\)": lambda: sharding.all_gather_matmul(X, W.T, axis="t"),
    r"w\[1\] must have shape \(16, n\)": lambda: sharding.all_gather_matmul(X, (W, W.T), axis="t"),
    "w must hold at least one": lambda: sharding.all_gather_matmul(X, (), axis="t"),
    r"implementation must be None, one of \('pallas', 'xla'\)": lambda: sharding.matmul_reduce_scatter(
        X, W, axis="t", implementation="ring"
    ),
    "all_gather_matmul: axis must be a mesh axis": lambda: sharding.all_gather_matmul(X, W, axis="t"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_rows_that_the_axis_does_not_divide():
    mesh = sharding.make_mesh(tensor=8)
    with pytest.raises(ValueError, match=r"x has shape \(2, 10, 2\), its dimension 1 must be a multiple of 8"):
        jax.eval_shape(over(mesh, "matmul_reduce_scatter"), X, W)
