"""Every comparison on the machine at hand: `python -m benchmarks`; one family with `python -m benchmarks.norms`."""

from benchmarks import attention, elementwise, gradient_reduction, linear_cross_entropy, norms, optim, ragged_dot

for family in (attention, norms, linear_cross_entropy, ragged_dot, elementwise, optim, gradient_reduction):
    family.main()
