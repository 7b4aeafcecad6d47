"""What glibc does with freed memory on a CPU: keep it for the next pass, give it back before a checkpoint."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GLIBC = platform.libc_ver()[0] == "glibc"


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks under 32 MiB instead of giving them back to the kernel after every pass.

    The pages of a step's activations would be mapped and zeroed anew each time (docs/log.md). Larger blocks go back at
    once: they would fragment the heap. Does nothing where the C library is not glibc.
    """
    if GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Return all free pages to the kernel."""
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
