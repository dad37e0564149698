"""What the tests compare with: `jaxops.workbench.comparison`, over the eight virtual devices of `conftest.py`."""

import pytest

from jaxops.workbench.comparison import check as check
from jaxops.workbench.comparison import error as error
from jaxops.workbench.comparison import no_worse as no_worse

# One transform of each kind in `make test`, the whole table in `make test-slow`.
SOME = ("jvp", "vmap of grad", "grad of grad", "shard_map, Explicit mesh", "jit, Explicit mesh")
some_and_all = pytest.mark.parametrize(
    "transforms", [SOME, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"]
)
