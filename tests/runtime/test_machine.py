"""What a machine does not have is told before a model loads, and before other ranks wait for it."""

import socket

import pytest
import torch

TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")


@pytest.fixture
def words(tiny, rows, tmp_path):
    return "fit", "--model.student.name", tiny, "--data.train", rows, "--trainer.default_root_dir", tmp_path / "runs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_devices_that_are_not_there(opcd, words, tmp_path):
    code, said = opcd(*words, "--trainer.accelerator", "gpu", "--trainer.devices", 8)
    assert code == 2 and "trainer.devices 8, and this machine has 0 CUDA GPUs" in said, said
    assert not list((tmp_path / "runs").glob("version_*"))


def test_a_port_that_is_in_use(opcd, words, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        code, said = opcd(*words, *TWO)
    assert code == 2 and f"cannot meet at MASTER_PORT {port}" in said and "in use" in said, said
    assert not list((tmp_path / "runs").glob("version_*"))


def test_a_port_that_is_none(opcd, words, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "here")
    code, said = opcd(*words, *TWO)
    assert code == 2 and "MASTER_PORT here" in said, said
