"""One folder a run: planted names, runs that live, and disks without locks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opcd.runtime.errors import UserError
from opcd.runtime.files import locks
from opcd.runtime.files.run_folder import RunFolder, one_at_a_time, refuse_living


@pytest.fixture
def no_locks(monkeypatch):
    """A disk without file locks, such as some NFS."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    locks._say_unprotected.cache_clear()


@pytest.mark.case("A6")
@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe"])
def test_a_planted_lock_is_not_written_through(tmp_path, kind):
    victim, runs = tmp_path / "victim.pth", tmp_path / "runs"
    runs.mkdir()
    if kind != "dangling":
        victim.write_text("mine")
    planted = runs / ".version_0.lock"
    if kind == "pipe":
        os.mkfifo(planted)
    else:
        os.link(victim, planted) if kind == "hard link" else planted.symlink_to(victim)
    with pytest.raises(UserError, match=r"a link, a pipe or a device has its name"):
        RunFolder.claim(runs)
    with pytest.raises(UserError, match=r"version_0\.lock: a link, a pipe or a device has its name; remove it"):
        refuse_living(runs)
    assert victim.read_text() == "mine" if kind != "dangling" else not victim.exists()
    assert [entry.name for entry in runs.iterdir()] == [".version_0.lock"]


def test_the_folder_of_a_living_run_that_somebody_removed_is_not_taken(tmp_path):
    first = RunFolder.claim(tmp_path)
    first.path.rmdir()
    second = RunFolder.claim(tmp_path)
    assert second.path.name == "version_1" and not first.path.exists()
    first.release()
    second.release()


@pytest.mark.case("E4")
def test_odd_names_beside_runs(tmp_path):
    (tmp_path / "version_0").write_text("a file")
    (tmp_path / "version_²").mkdir()
    (tmp_path / "version_1").symlink_to(tmp_path / "nothing")
    claimed = RunFolder.claim(tmp_path)
    assert claimed.path.name == "version_2"
    claimed.release()


@pytest.mark.case("E5")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_without_locks_a_run_goes_on_and_says_so(tmp_path, no_locks, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with one_at_a_time(tmp_path):
        refuse_living(tmp_path)
        RunFolder.claim(tmp_path).release()
    told = capsys.readouterr().err
    assert told.count("without file locks") == 1 and str(tmp_path) in told and os.strerror(number) in told
    assert [entry.name for entry in tmp_path.iterdir()] == ["version_0"]


@pytest.mark.case("E5")
def test_without_locks_a_living_process_is_known_by_its_number(tmp_path, no_locks):
    folder = RunFolder.claim(tmp_path)
    lock = tmp_path / ".version_0.lock"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"process": child.pid}))
    with pytest.raises(UserError, match=f"has not ended .process {child.pid} on"):
        refuse_living(tmp_path)
    child.communicate(b"\n")
    refuse_living(tmp_path)
    assert not lock.exists()
    folder.release()


@pytest.mark.case("A6")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": "1"}', "[" * 10**5, '{"process": 1e400}', "\udc80"])
def test_a_lock_that_does_not_say_whose_it_is(tmp_path, text):
    folder = RunFolder.claim(tmp_path)
    (tmp_path / ".version_0.lock").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"has not ended .its lock does not say whose it is"):
        refuse_living(tmp_path)
    folder.release()


@pytest.mark.case("A6")
def test_only_own_scratch_files_are_cleared(tmp_path):
    """Of a run that is dead; its folder may be a link to somewhere else."""
    run = tmp_path / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / ".version_0.lock").write_text("{}")
    names = {".step=1.ckpt.0123456789abcdef-being-written": False, ".notes-being-written": True, "step=1.ckpt": True}
    for name in names:
        (run / "checkpoints" / name).write_text("")
    refuse_living(tmp_path)
    assert {name: (run / "checkpoints" / name).exists() for name in names} == names
    assert not (tmp_path / ".version_0.lock").exists()


@pytest.mark.case("E7")
def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"trainer\.default_root_dir: cannot write to .*runs"):
        RunFolder.claim(Path(tmp_path / "runs"))
