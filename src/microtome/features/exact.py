"""Sums of floats that do not depend on the order in which they are added.

Floating-point addition rounds, so (a + b) + c and a + (b + c) may differ in the last bit, and two workers would not
agree with one. Here each value is cut once, by itself, into a whole part and a fraction in units of 2**-40; both are
then added as integers, which never rounds. Only reading the total rounds, once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from microtome.common.errors import InputError

_BITS = 40
_MASK = (1 << _BITS) - 1


@dataclass
class ExactSum:
    """A running total a slot: whole + fraction · 2**-40, 0 ≤ fraction < 2**40, so equal totals are equal bits."""

    whole: Int64[np.ndarray, "slot"]
    fraction: Int64[np.ndarray, "slot"]

    @classmethod
    def zeros(cls, n: int) -> "ExactSum":
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64))

    def add(
        self,
        slots: Int64[np.ndarray, "run"],
        values: Float64[np.ndarray, "n"],
        starts: Int64[np.ndarray, "run"],
    ) -> None:
        """Add to each of `slots` (no two alike) its run of non-negative `values`, which begins at `starts`.

        What lies below 2**-40 of a value is dropped. A call may hold up to 2**23 values for one slot.
        """
        if len(values) == 0:
            return
        whole = np.floor(values)
        fraction = ((values - whole) * float(1 << _BITS)).astype(np.int64)
        self.whole[slots] += np.add.reduceat(whole.astype(np.int64), starts)
        self.fraction[slots] += np.add.reduceat(fraction, starts)
        self._carry()

    def plus(self, other: "ExactSum") -> "ExactSum":
        total = ExactSum(self.whole + other.whole, self.fraction + other.fraction)
        total._carry()
        return total

    def total(self) -> Float64[np.ndarray, "slot"]:
        return self.whole.astype(np.float64) + self.fraction.astype(np.float64) * 2.0**-_BITS

    def _carry(self) -> None:
        self.whole += self.fraction >> _BITS
        self.fraction &= _MASK
        if len(self.whole) and self.whole.min() < 0:
            raise InputError("A sum of activations left 63 bits", fix="Scale the dictionary's activations down")
