"""Every comparison on the machine at hand: `python -m benchmarks`; one family with `python -m benchmarks.norms`."""

from benchmarks import attention, elementwise, linear_cross_entropy, norms, optim

for family in (attention, norms, linear_cross_entropy, elementwise, optim):
    family.main()
