"""Devices in a ring, and when one may write to the next: what kernels with remote DMA have in common.

Halves of what is sent go round in opposite ways, so that both directions of every link are used. Nobody writes to a
device before it has entered the kernel, which it says at a barrier. What arrives is put into slots; the first arrivals
find theirs empty, each later one needs a permit, a semaphore that counts the slots which are free again.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 3  # a neighbour may be a step behind and still have one that is free
CORE = "core"


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices of `axes`, in the order of JAX's index along them; `shape` are all mesh axes and their sizes; `me`
    are this device's coordinates, once in the kernel.

    `without`: waits that are left out, for tests that show what they are for.
    """

    axes: tuple[str, ...]
    shape: tuple[tuple[str, int], ...]
    cores: int
    without: str | None = None
    me: Any = None

    @staticmethod
    def of(axes: tuple[str, ...], cores: int, without: str | None = None) -> "Ring":
        """Of the mesh that encloses the call."""
        return Ring(axes, tuple(jax.sharding.get_abstract_mesh().shape.items()), cores, without)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.shape)

    @property
    def size(self) -> int:
        return math.prod(size for name, size in self.shape if name in self.axes)

    @property
    def collective_id(self) -> int:
        """One for each ring: else a device could take what its neighbour in another one says in the next kernel."""
        first, *others = (self.names.index(axis) for axis in self.axes)
        return first if not others else len(self.names) + sum(1 << i for i in (first, *others))

    def coordinates(self, mat: Any) -> jax.Array:
        """What `enter` is to be told, with the type of operands of manual axis type `mat`."""
        coordinates = jnp.stack([lax.axis_index(name) for name in self.names])
        missing = tuple(mat.varying - jax.typeof(coordinates).mat.varying)
        return lax.pcast(coordinates, missing, to="varying") if missing else coordinates

    def enter(self, coordinates, me) -> "Ring":
        """Nobody writes to a device that has not entered: each says so to those that will write to it."""
        pltpu.sync_copy(coordinates, me)
        ring = dataclasses.replace(self, me=me)
        barrier = pltpu.get_barrier_semaphore()
        for turn in range(self.turns):
            pl.semaphore_signal(barrier, 1, device_id=ring.id(self.half(turn), -1))
        if self.without != "barrier":
            pl.semaphore_wait(barrier, self.turns)
        return ring

    @property
    def turns(self) -> int:
        """How many halves go round on one core."""
        return 2 // self.cores

    def half(self, turn):
        return turn if self.cores == 1 else lax.axis_index(CORE)

    def at(self, half, steps):
        """The device `steps` further on the way of a half: 0 goes to the next device, 1 to the one before."""
        sizes, here = dict(self.shape), 0
        for axis in self.axes:
            here = here * sizes[axis] + self.me[self.names.index(axis)]
        return lax.rem(here + (1 - 2 * half) * steps + self.size, self.size)

    def id(self, half, steps):
        """The device there, by all mesh axes: Mosaic does not mix given coordinates with those it looks up itself."""
        sizes, there = dict(self.shape), {name: self.me[i] for i, name in enumerate(self.names)}
        rest = self.at(half, steps)
        for axis in reversed(self.axes):
            there[axis], rest = lax.rem(rest, sizes[axis]), lax.div(rest, sizes[axis])
        return there if self.cores == 1 else there | {CORE: half}

    def receive(self, copy):
        if self.without != "arrival":
            copy.wait_recv()

    def free_slot(self, free, half, arrival, slots, last=None):
        """What arrived as number `arrival`, of 1 to `last` (size - 1 unless said), is used up: says so to the device
        before, if that is to send once more."""
        last = self.size - 1 if last is None else last

        @pl.when((arrival >= 1) & (arrival + slots <= last))
        def _():
            pl.semaphore_signal(free.at[half], 1, device_id=self.id(half, -1))

    def await_slot(self, free, half, arrival, slots):
        """Until the next device has a slot for what is its arrival of this number; the first need no permit."""
        if self.without != "permit":
            pl.when(arrival > slots)(lambda: pl.semaphore_wait(free.at[half], 1))
