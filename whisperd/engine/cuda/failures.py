"""Translates what PyTorch, CUDA and Triton raise into the errors of whisperd. Home of their failures.

PyTorch and CUDA raise RuntimeError and its subclasses, Triton classes of its own, and what the C compiler and the files
of its cache raise. A test holds this complete for
the installed versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError

import torch

from whisperd.errors import EngineError, OutOfMemory

# of PyTorch's allocator, and in the names that CUDA, cuBLAS, cuDNN and cuFFT give to their own failures
WORDS = ("out of memory", "can't allocate memory", "alloc_failed", "cufft_alloc", "std::bad_alloc", "bad allocation")
LAUNCH = "out of resource"  # Triton: a kernel needs more shared memory or registers than this GPU has
TRITON_MODULE = "triton"


@contextmanager
def translated() -> Iterator[None]:
    """Raises OutOfMemory or EngineError in place of what PyTorch, CUDA or Triton raise inside."""
    try:
        yield
    except Exception as error:
        if not is_ours(error):
            raise
        raise translate(error) from error


def is_ours(error: BaseException) -> bool:
    """True for errors of PyTorch, CUDA and Triton, and for a memory that is full."""
    kinds = (RuntimeError, MemoryError, OSError, CalledProcessError)  # the last two: Triton's cache and its C compiler
    return isinstance(error, kinds) or any(
        base.__module__.partition(".")[0] == TRITON_MODULE for base in type(error).__mro__
    )


def translate(error: BaseException) -> EngineError:
    """The same as an error of whisperd.

    A capture that runs out of memory ends with an error that says only that something failed before: the first cause
    decides.
    """
    for cause in causes(error):
        if _is_exhaustion(cause):
            return OutOfMemory(f"the device has not enough memory: {cause}")
    library = "PyTorch" if isinstance(error, RuntimeError) else "Triton"
    return EngineError(f"{library} failed: {error or type(error).__name__}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or after."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_exhaustion(error: BaseException) -> bool:
    text = str(error).lower()
    if LAUNCH in text:
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in WORDS)
