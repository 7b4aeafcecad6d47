"""Control over glibc's freed memory: keep some for the next step, return the rest to the kernel."""

import ctypes
import platform
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
MAPPINGS = 65_536
"""glibc's default for the number of blocks with a mapping of their own."""
GLIBC = platform.libc_ver()[0] == "glibc"
MADV_DONTNEED = 4
SMAPS = Path("/proc/self/smaps")
KEPT = 2 * 2**30
"""Free bytes that the heap may hold from one step to the next."""
LARGE = 2**30
"""Bytes of file pages that are worth dropping at every step: mapping 270 MB again takes a twentieth of the step."""


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _set(option: int, value: int) -> None:
    if GLIBC:
        ctypes.CDLL(None).mallopt(option, value)


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks under 32 MiB instead of returning them to the kernel after every pass.

    Otherwise the pages of a step's activations are mapped and zeroed each time (docs/log.md). Larger blocks still go
    back at once. Does nothing where the C library is not glibc.
    """
    _set(M_MMAP_THRESHOLD, 32 * 2**20)
    _set(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Keep larger blocks in the heap, too, within the context: a loss needs the same few for every chunk.

    Do not use for a whole step: blocks of all sizes in one heap fragment it (docs/log.md).
    """
    _set(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        _set(M_MMAP_MAX, MAPPINGS)


def trim_heap(beyond: int = 0) -> None:
    """Return the heap's free pages to the kernel if they are more than `beyond` bytes.

    Blocks of many sizes fragment the heap: without trimming it grows by up to a gigabyte a step (docs/log.md).
    """
    libc = ctypes.CDLL(None)
    # Before glibc 2.33 the number of free bytes is unknown: assume many.
    if GLIBC and (not hasattr(libc, "mallinfo2") or heap().fordblks > beyond):
        libc.malloc_trim(0)


def heap() -> Mallinfo2:
    """glibc's figures on its heap: `fordblks` bytes are free in it, `hblkhd` are in mappings of their own."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info: Mallinfo2 = libc.mallinfo2()
    return info


def drop_file_pages(tensors: Iterable[Tensor]) -> None:
    """Unmap the pages of the file that tensors are mapped from; the next read maps them again.

    The kernel keeps them in its cache and may reuse that memory. Mappings that were written to, or that belong to no
    file, stay: their content would be lost.
    """
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu")
    if not spans or not SMAPS.exists():
        return
    for start, end in _clean_mappings():
        low = bisect(spans, (start,))
        if low < len(spans) and spans[low][1] <= end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """Yield the address ranges of this process that are mapped from a file and were not written to."""
    span, mapped = (0, 0), False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # 7f00-7f10 r--p 00000000 fe:00 1234  /path
            low, high = words[0].split("-")
            span, mapped = (int(low, 16), int(high, 16)), words[4] != "0"
        elif words[0] == "Anonymous:" and mapped and words[1] == "0":
            yield span
