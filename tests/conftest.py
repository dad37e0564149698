"""The machine every test sees: eight virtual CPU devices, no accelerator, compiled programs kept between runs."""

import contextlib
import os
import pathlib
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the CUDA compiler packages may be installed without their runtime
os.environ["MPLBACKEND"] = "Agg"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Nothing that this user compiled or tuned has a say in a test; the list of fonts that matplotlib made stays in use.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxops-tests-")


@pytest.fixture(autouse=True)
def _compiled_sooner(request):
    """Tests compile many programs and run each once: LLVM's optimisations are left out, unless marked `optimized`."""
    from jaxops import interpreter

    with contextlib.nullcontext() if request.node.get_closest_marker("optimized") else interpreter.unoptimized():
        yield
