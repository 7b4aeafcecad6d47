"""benchmarks/rollout.py: both rollouts are measured on the same device."""

import sys

import pytest
import torch

from benchmarks import rollout


class Moved(Exception):
    """Carries where the student goes."""


class Student:
    """Goes nowhere but says where."""

    def to(self, device):
        raise Moved(str(device))


@pytest.mark.case("W4")
@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_student_is_on_the_gpu_where_there_is_one(there, device, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rollout.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(rollout.Student, "load", lambda config, device: Student())
    with pytest.raises(Moved, match=device):
        rollout.main()
