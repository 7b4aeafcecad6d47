"""Checkpoint files: whole or not there, verified, without code, and of the same config."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from opcd.checkpoints import (
    BrokenCheckpoint,
    DiskFull,
    SafeCheckpointIO,
    check_config,
    newest_whole,
    read_checkpoint,
)
from opcd.checkpoints.checkpoint_files import manifest_of, verify, write_checkpoint
from opcd.runtime.errors import UserError

CONFIG = {
    "seed_everything": 0,
    "trainer": {"precision": "32-true", "max_steps": 5},
    "model": {"temperature": 1.0, "micro_batch_tokens": 4096, "loss": {"class_path": "opcd.losses.ReverseKL"}},
    "data": {"train": "rows.jsonl", "val": None},
}


def checkpoint(step: int) -> dict:
    weight = torch.arange(1000.0) + step
    return {"global_step": step, "state_dict": {"a": weight, "tied": weight}, "config": CONFIG, "tuple": (1, "b")}


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs: checkpoints of the steps 1 and 2, and of 3, which went on from them."""
    for number, step in ((0, 1), (0, 2), (1, 3)):
        write_checkpoint(checkpoint(step), tmp_path / f"version_{number}" / "checkpoints" / f"step={step}.ckpt")
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new folder" / "a.ckpt"
    write_checkpoint(checkpoint(7), path)
    loaded = read_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["a"], checkpoint(7)["state_dict"]["a"])
    assert loaded["config"] == CONFIG and loaded["tuple"] == (1, "b")
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.ckpt", "a.ckpt.json"]
    assert path.stat().st_size < 2 * 4000  # tied weights once
    assert verify(path)["step"] == 7


def test_a_name_that_is_written_again_is_good_before_and_after(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    write_checkpoint(checkpoint(1), path)

    def die(self, target):
        raise KeyboardInterrupt

    for step in (2, 3):  # a save that dies before the name, and another
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                Path, "replace", lambda self, to, own=Path.replace: die(self, to) if to == path else own(self, to)
            )
            write_checkpoint(checkpoint(step), path)
        assert read_checkpoint(path)["global_step"] == 1
    write_checkpoint(checkpoint(4), path)
    assert read_checkpoint(path)["global_step"] == 4
    assert len(json.loads(manifest_of(path).read_text())["manifest"]["accepts"]) == 2


def test_the_newest_whole_one(runs, tmp_path):
    assert newest_whole(runs) == runs / "version_1/checkpoints/step=3.ckpt"
    (runs / "version_1/checkpoints/step=3.ckpt").write_bytes(b"cut")
    with pytest.warns(
        UserWarning, match=r"step=3.ckpt is not what was written.*Going on from .*step=2.ckpt \(step 2\)"
    ):
        assert newest_whole(runs) == runs / "version_0/checkpoints/step=2.ckpt"
    for file in runs.rglob("*.ckpt.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"no checkpoint under .* is complete"):
        newest_whole(runs)
    assert newest_whole(tmp_path / "nothing here") is None


def test_broken_files_are_named(runs):
    path = runs / "version_0/checkpoints/step=1.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match=r"step=1.ckpt is not what was written \(its SHA-256 differs\)"):
        SafeCheckpointIO().load_checkpoint(path)
    manifest_of(path).write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"step=1.ckpt.json is broken"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(path.with_name("step=9.ckpt"))


@pytest.mark.case("E4")
@pytest.mark.parametrize("kind", ["dangling", "dangling without a manifest", "folder", "pipe", "link in a circle"])
def test_a_newest_one_that_is_no_file_is_passed_over(runs, kind):
    newest = runs / "version_1/checkpoints/step=3.ckpt"
    newest.unlink()
    if "dangling" in kind:
        newest.symlink_to(runs / "nothing")
    elif kind == "folder":
        newest.mkdir()
    elif kind == "pipe":
        os.mkfifo(newest)
    else:
        newest.symlink_to(newest)
    if kind.endswith("manifest"):
        manifest_of(newest).unlink()
    with pytest.warns(UserWarning, match=r"step=3\.ckpt .*Going on from .*step=2\.ckpt \(step 2\)"):
        assert newest_whole(runs) == runs / "version_0/checkpoints/step=2.ckpt"


WRONG = [
    [],
    "text",
    None,
    {"accepts": []},
    {"accepts": None},
    {"accepts": [3]},
    {"accepts": [{}]},
    {"accepts": {"a": 1}},
]
WRONG += [{"step": "3"}, {"step": [1]}, {"config": []}, {"config": "model"}]


@pytest.mark.case("E4")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_of_wrong_types_is_a_broken_checkpoint(runs, wrong):
    """Its own SHA-256 is right: somebody else has written it."""
    newest = runs / "version_1/checkpoints/step=3.ckpt"
    manifest = json.loads(manifest_of(newest).read_text())["manifest"]
    manifest = manifest | wrong if isinstance(wrong, dict) else wrong
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    manifest_of(newest).write_text(json.dumps({"manifest": manifest, "sha256": digest}))
    with pytest.raises(BrokenCheckpoint, match=r"step=3\.ckpt\.json is broken"):
        verify(newest)
    with pytest.warns(UserWarning, match=r"Going on from .*step=2\.ckpt"):
        assert newest_whole(runs) == runs / "version_0/checkpoints/step=2.ckpt"


@pytest.mark.case("E4")
@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 10**5, "9" * 5000, '{"manifest": {}, "sha256": 3}', "\udc80"])
def test_a_manifest_that_is_none(runs, text):
    newest = runs / "version_1/checkpoints/step=3.ckpt"
    manifest_of(newest).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"step=3\.ckpt\.json is broken.*Going on from .*step=2\.ckpt"):
        assert newest_whole(runs) == runs / "version_0/checkpoints/step=2.ckpt"
    manifest_of(newest).unlink()
    manifest_of(newest).mkdir()
    with pytest.raises(BrokenCheckpoint, match="cannot be read: Is a directory"):
        verify(newest)


@pytest.mark.case("E4")
def test_odd_names_beside_runs_are_passed_over(runs):
    (runs / "version_²").mkdir()
    (runs / ("version_" + "9" * 200)).mkdir()
    (runs / "version_-1").mkdir()
    (runs / "version_7").mkdir()
    (runs / "version_7" / "checkpoints").write_text("a file")
    (runs / "version_8").write_text("a file")
    (runs / "version_9").symlink_to(runs / "nothing")
    assert newest_whole(runs) == runs / "version_1/checkpoints/step=3.ckpt"


@pytest.mark.case("E5")
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EIO, errno.EBUSY, errno.ESTALE])
def test_a_disk_that_refuses_is_one_message_and_what_was_saved_is_there(tmp_path, monkeypatch, number):
    write_checkpoint(checkpoint(1), tmp_path / "a.ckpt")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("opcd.runtime.files.disk.Path.replace", refuse)
        with pytest.raises(UserError, match=f"cannot write .*{os.strerror(number)}"):
            write_checkpoint(checkpoint(2), tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.json"]


def test_a_checkpoint_of_somebody_elses(tmp_path):
    plain, code = tmp_path / "plain.ckpt", tmp_path / "code.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, plain)
    with pytest.warns(UserWarning, match="no manifest"):
        assert read_checkpoint(plain)["state_dict"]["a"].sum() == 2
    torch.save({"f": Path("/tmp")}, code)  # a pickle of a class is code
    with (
        pytest.warns(UserWarning, match="no manifest"),
        pytest.raises(BrokenCheckpoint, match=r"cannot be loaded|is no"),
    ):
        read_checkpoint(code)
    with pytest.raises(UserError, match="weights_only=False"):
        SafeCheckpointIO().load_checkpoint(plain, weights_only=False)


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DiskFull, match="it takes 4 MiB, and 0 MiB are free; earlier ones are untouched"):
        write_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_another_config(tmp_path):
    path = tmp_path / "version_0/checkpoints/step=3.ckpt"
    free = CONFIG | {"trainer": {"precision": "32-true", "max_steps": 9}}
    free["model"] = CONFIG["model"] | {"micro_batch_tokens": 512}
    check_config(CONFIG, free, path)
    check_config(None, CONFIG, path)
    other = free | {"seed_everything": 1, "model": CONFIG["model"] | {"loss": {"class_path": "opcd.losses.ForwardKL"}}}
    with pytest.raises(UserError, match=r"these keys differ: seed_everything, model.loss.class_path"):
        check_config(CONFIG, other, path)
