"""python -m jaxops: the command `jaxops`."""

import sys

from jaxops.workbench.command import main

if __name__ == "__main__":
    sys.exit(main())
