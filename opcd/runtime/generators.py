"""The random generators of this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the states of all random generators after the block, also after an error or a signal."""
    kept = isolate_rng()  # by itself, it restores nothing after an error
    kept.__enter__()
    try:
        yield
    finally:
        kept.__exit__(None, None, None)
