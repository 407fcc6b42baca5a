"""Was a tensor written since it was looked at?"""

from __future__ import annotations

from torch import Tensor


def version(tensor: Tensor) -> object:
    """Return what is another after each change in place; of an inference tensor that is not counted.

    What is written through `.data` is not counted either.
    """
    return object() if tensor.is_inference() else tensor._version
