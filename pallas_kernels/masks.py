"""Which keys a query may attend to, as arithmetic on tiles: the part of a mask that is known before any number is seen.

A band lets query i see key j iff  i - left ≤ j ≤ i + right;  a side that is None is open. Causal is right = 0.
All functions take Python or traced integers.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Band:
    """i - left ≤ j ≤ i + right."""

    left: int | None = None
    right: int | None = None

    @staticmethod
    def of(is_causal: bool, window: tuple[int | None, int | None] | None) -> "Band":
        """The band of `is_causal` and `local_window_size=(left, right)` together."""
        left, right = window if window is not None else (None, None)
        if is_causal:
            right = 0 if right is None else min(right, 0)
        return Band(left, right)

    @property
    def open(self) -> bool:
        return self.left is None and self.right is None

    def allowed(self, row, column):
        """Whether query `row` sees key `column` (broadcasting), or True if the band is open."""
        seen = True
        if self.left is not None:
            seen = column >= row - self.left
        if self.right is not None:
            below = column <= row + self.right
            seen = below if seen is True else seen & below
        return seen

    def touched(self, row, rows, keys):
        """[first, end): the keys, of `keys`, that any query of row … row+rows-1 sees. May be empty (first ≥ end)."""
        first = 0 if self.left is None else _clip(row - self.left, keys)
        end = keys if self.right is None else _clip(row + rows + self.right, keys)
        return first, end

    def whole(self, row, rows, keys):
        """[first, end): the keys that every query of row … row+rows-1 sees. May be empty (first ≥ end)."""
        first = 0 if self.left is None else _clip(row + rows - 1 - self.left, keys)
        end = keys if self.right is None else _clip(row + 1 + self.right, keys)
        return first, end

    def pairs(self, queries: int, keys: int) -> int:
        """Σ_i |{j: query i sees key j}| over `queries` queries and `keys` keys, Python integers."""

        def below(end):  # Σ_i min(max(i + end, 0), keys): how many keys are before i + end
            whole = min(max(keys - end, 0), queries)  # rows from here on have all of them
            first = min(max(-end, 0), whole)  # rows before this have none
            return (first + end + whole - 1 + end) * (whole - first) // 2 + keys * (queries - whole)

        ended = keys * queries if self.right is None else below(self.right + 1)
        return ended - (0 if self.left is None else below(-self.left))

    def transposed(self) -> "Band":
        """The same band seen from the keys: key j is seen by the queries j - right … j + left."""
        return Band(self.right, self.left)


def _clip(value, high):
    return min(max(value, 0), high) if isinstance(value, int) and isinstance(high, int) else jnp.clip(value, 0, high)
