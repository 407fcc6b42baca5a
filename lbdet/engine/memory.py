"""A step asks for the tensors of the step before; glibc would give them back and fault them in anew."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""of mallopt(3)"""


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that tensors leave, which makes a step on a CPU some 10 % faster.

    The process then keeps its largest size until it ends. Nothing is done without glibc, and where the
    environment already says how malloc is to behave (`MALLOC_...`).

    Returns:
        Whether that is so from now on.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
