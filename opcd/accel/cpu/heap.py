"""What glibc does with freed memory on a CPU: keep some for the next step, give the rest back to the kernel."""

import ctypes
import platform
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
MAPPINGS = 65_536
"""glibc's default for the blocks that have a mapping of their own."""
GLIBC = platform.libc_ver()[0] == "glibc"
MADV_DONTNEED = 4
SMAPS = Path("/proc/self/smaps")
KEPT = 2 * 2**30
"""Free bytes that the heap may hold from one step to the next."""

LARGE = 2**30
"""Bytes of a file's pages that are worth letting go at every step: to map 270 MB anew costs a twentieth of the step."""


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks under 32 MiB instead of giving them back to the kernel after every pass.

    The pages of a step's activations would be mapped and zeroed anew each time (docs/log.md). Larger blocks go back at
    once. Does nothing where the C library is not glibc.
    """
    if GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Within, larger blocks are taken from what the heap keeps, too: a loss takes the same few, chunk after chunk.

    Not for a whole step: blocks of all sizes in one heap leave holes that nothing fits in (docs/log.md).
    """
    if GLIBC:
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        if GLIBC:
            ctypes.CDLL(None).mallopt(M_MMAP_MAX, MAPPINGS)


def trim_heap(beyond: int = 0) -> None:
    """Return the heap's free pages to the kernel where there are more than `beyond` bytes of them.

    Blocks of many sizes fragment the heap: without this it grows by as much as a gigabyte a step (docs/log.md).
    """
    if GLIBC and _free_bytes() > beyond:
        ctypes.CDLL(None).malloc_trim(0)


def heap() -> Mallinfo2:
    """What glibc says of its heap: `fordblks` bytes are free in it, `hblkhd` lie in mappings of their own."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info: Mallinfo2 = libc.mallinfo2()
    return info


def _free_bytes() -> int:
    known = hasattr(ctypes.CDLL(None), "mallinfo2")
    return int(heap().fordblks) if known else 2**62  # unknown: taken for many


def drop_file_pages(tensors: Iterable[Tensor]) -> None:
    """Take the pages of the file that tensors are mapped from out of this process; the next read maps them anew.

    The kernel still has them in its cache, and may give that memory to others. A mapping that was written to stays, as
    does all that is no file's: it would be lost.
    """
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu")
    if not spans or not SMAPS.exists():
        return
    for start, end in _clean_mappings():
        low = bisect(spans, (start,))
        if low < len(spans) and spans[low][1] <= end:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """The address ranges of this process that are a file's and hold no page of their own."""
    span, mapped = (0, 0), False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # 7f00-7f10 r--p 00000000 fe:00 1234  /path
            low, high = words[0].split("-")
            span, mapped = (int(low, 16), int(high, 16)), words[4] != "0"
        elif words[0] == "Anonymous:" and mapped and words[1] == "0":
            yield span
