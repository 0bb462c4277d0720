"""Tensor types with shapes in jaxtyping's notation, as in Float[Tensor, "B T C"].

Tests check them at run time. Elsewhere jaxtyping is not needed and they mean Tensor alone, exported models included.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class Unchecked:
            """Stands for a jaxtyping type: subscripted with a tensor type and a shape, it is the tensor type."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Unchecked

__all__ = ["Bool", "Float", "Int"]
