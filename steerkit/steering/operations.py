"""Operations: what a steering does to the stream, as plain functions of the stream."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

OPERATIONS = ("add", "ablate")


def direction_of(operation: str, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What an operation reads of a vector: `add` the vector itself, `ablate` its unit direction (in float32)."""
    if operation == "add":
        return vector
    wide = vector.double()
    return (wide / wide.norm()).float()


def operate(
    operation: str,
    stream: Tensor,
    vectors: Tensor,
    strength: Tensor,
    push: Tensor,
) -> Tensor:
    """`add`: `h + c v`. `ablate`: `h - c (h . u) u`, computed in float32, with u a unit vector.

    Args:
        stream: `[row, pos, d_model]`.
        vectors: `[row, 1, d_model]`, what `direction_of` returned.
        strength: `[row, 1, 1]`, the coefficient c of each row.
        push: `[row, 1, d_model]`, `strength * vectors` in the stream's dtype, computed once for all forwards.

    Shapes are not checked at run time, since compiled blocks call this.
    """
    if operation == "add":
        return stream + push
    wide = stream.float()
    along = (wide * vectors).sum(-1, keepdim=True)
    return (wide - strength * along * vectors).to(stream.dtype)
