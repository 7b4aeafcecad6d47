"""One thread for these tests: their tensors are tiny, and threads that wait for each other cost four times the work."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Holds torch to one thread while the tests of this folder run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
