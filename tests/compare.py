"""What the tests compare with: `jaxops.workbench.comparison`, over the eight virtual devices of `conftest.py`."""

from jaxops.workbench.comparison import check as check
from jaxops.workbench.comparison import error as error
from jaxops.workbench.comparison import no_worse as no_worse
