"""The house rules, read off the source: who may import whom, who may name a platform or build a derivative rule."""

import ast
import inspect
import pathlib

import jax
import pytest

import jaxops
import jaxops.nn
import jaxops.nn.linen
import pallas_kernels.gpu
import pallas_kernels.tpu
import sharding
import sharding.nn

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = ("pallas_kernels", "jaxops", "sharding", "examples")  # each may import those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
WITHOUT_BACKWARD = (  # XLA's serves
    pallas_kernels.tpu.decode_attention,
    pallas_kernels.tpu.quantized_matmul,
    pallas_kernels.gpu.decode_attention,
    pallas_kernels.gpu.quantized_matmul,
    pallas_kernels.gpu.rope_projection,
)
LIBRARY = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "examples"]


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def _imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_layer_imports_only_the_layers_below_it(path):
    layer = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = [name for name in _imported(ast.parse(path.read_text())) if name.split(".")[0] in above]
    assert not wrong, f"{_name(path)} imports {wrong}"


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_nothing_asks_a_live_device_and_nothing_is_triton(path):
    text = path.read_text()
    for word in ("default_backend(", "jax.devices(", "local_devices(", "pallas.triton", "pallas import triton"):
        assert word not in text, f"{_name(path)} contains {word!r}"


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.relative_to(ROOT).parts[0] == "jaxops"], ids=_name)
def test_one_file_names_platforms_and_one_builds_derivative_rules(path):
    attributes = _attributes(ast.parse(path.read_text()))
    if path.name != "dispatch.py":
        assert "platform_dependent" not in attributes and "register_lowering" not in attributes, _name(path)
    if path.name != "autodiff.py":
        rules = attributes & {"custom_vjp", "custom_jvp", "defvjp", "defjvp", "primitive_jvps", "primitive_transposes"}
        assert not rules, f"{_name(path)} builds derivative rules: {rules}"


@pytest.mark.parametrize(
    "package", [jaxops, jaxops.nn, pallas_kernels.tpu, pallas_kernels.gpu, sharding], ids=lambda p: p.__name__
)
def test_a_table_of_contents_is_one_explicit_line_per_name(package):
    tree = ast.parse(inspect.getsource(package))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assert isinstance(node, ast.ImportFrom) and len(node.names) == 1, ast.unparse(node)
        assert node.names[0].asname == node.names[0].name, ast.unparse(node)


def _public():
    for package in (jaxops, jaxops.nn, jaxops.nn.linen, sharding, sharding.nn):
        for name, value in vars(package).items():
            home = getattr(value, "__module__", "").partition(".")[0]
            if not name.startswith("_") and callable(value) and home == package.__name__.partition(".")[0]:
                yield pytest.param(value, id=f"{package.__name__}.{name}")


@pytest.mark.parametrize("value", list(_public()))
def test_every_public_name_has_a_docstring(value):
    assert value.__doc__ and len(value.__doc__) > 40


@pytest.mark.parametrize("platform", [pallas_kernels.tpu, pallas_kernels.gpu], ids=lambda p: p.__name__)
def test_every_kernel_module_keeps_the_same_names(platform):
    imports = (node for node in ast.parse(inspect.getsource(platform)).body if isinstance(node, ast.ImportFrom))
    modules = [getattr(platform, node.names[0].name) for node in imports]
    assert modules
    for module in modules:
        names = ("unsupported", "forward", "backward", "Tiles", "tiles", "candidates", "memory")
        for name in names if module not in WITHOUT_BACKWARD else (n for n in names if n != "backward"):
            assert hasattr(module, name), f"{module.__name__} has no {name}"


def test_the_kernels_of_both_platforms_take_the_same_operands():
    norms = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
    products = ("matmul", "gated_linear_unit", "ragged_dot", "linear_cross_entropy", "rope_projection")
    for name in (*norms, *products, "softmax", "attention", "decode_attention", "rope"):
        tpu, gpu = getattr(pallas_kernels.tpu, name), getattr(pallas_kernels.gpu, name)
        for function in ("unsupported", "forward", *(("backward",) if gpu not in WITHOUT_BACKWARD else ())):
            operands = set(inspect.signature(getattr(tpu, function)).parameters)
            inspect.signature(getattr(gpu, function)).bind(**dict.fromkeys(operands))


def test_importing_the_library_starts_no_backend():
    import subprocess
    import sys

    code = "import sharding.nn; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_jax_is_the_supported_version():
    assert jax.__version__.startswith("0.12.")
