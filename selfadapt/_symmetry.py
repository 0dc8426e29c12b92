"""The eight symmetries of the square, D4, acting on pixels and on vectors."""

from dataclasses import dataclass
from itertools import product

from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Symmetry:
    """One symmetry of the square: an optional flip of the columns, then `turns` quarter turns.

    Turns go the way of `torch.rot90`. `g @ h` is the symmetry "first `h`, then `g`".

    >>> Symmetry(turns=1) @ Symmetry(turns=3) == Symmetry()
    True
    >>> Symmetry(turns=1).matrix
    ((0, -1), (1, 0))
    """

    turns: int = 0
    flip: bool = False

    def __matmul__(self, first: "Symmetry") -> "Symmetry":
        sign = -1 if self.flip else 1  # a flip turns the other way: F R = R^-1 F
        return Symmetry((self.turns + sign * first.turns) % 4, self.flip != first.flip)

    @property
    def inverse(self) -> "Symmetry":
        """The symmetry that undoes this one."""
        return self if self.flip else Symmetry(-self.turns % 4)

    @property
    def matrix(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The linear part, on vectors (dy, dx): `new = matrix @ old`."""
        (cos, sin) = ((1, 0), (0, 1), (-1, 0), (0, -1))[self.turns]
        sign = -1 if self.flip else 1
        return (cos, -sin * sign), (sin, cos * sign)

    @property
    def transposes(self) -> bool:
        """Whether height and width change places."""
        return self.turns % 2 == 1

    def move(self, pixels: Tensor, step: Grid = (1, 1)) -> Tensor:
        """Move the pixels of `[..., H, W]`; channels stay as they are.

        `step` keeps a coarser sampling lattice in place: where an axis is reversed, pixel `i`
        goes to `(N - step - i) mod N`, so that multiples of `step` land on multiples of `step`
        (a plain flip would shift them by `step - 1` pixels). The `step - 1` pixels beyond the
        last lattice point wrap around, which keeps the move a permutation.
        """
        (yy, yx), (xy, xx) = self.matrix
        if self.transposes:
            pixels = pixels.transpose(-2, -1)
        reversed_axes = [axis for axis, sign in ((-2, yy + yx), (-1, xy + xx)) if sign < 0]
        if reversed_axes:
            pixels = pixels.flip(reversed_axes)
            if step != (1, 1):
                pixels = pixels.roll([1 - step[axis] for axis in reversed_axes], reversed_axes)
        return pixels


D4: tuple[Symmetry, ...] = tuple(
    Symmetry(turns, flip) for flip, turns in product((False, True), range(4))
)
"""All eight symmetries, the identity first."""
