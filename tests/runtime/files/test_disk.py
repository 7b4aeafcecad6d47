"""What is written, replaced and removed on a disk: whole files, no links followed, nothing that somebody else wrote."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import (
    MANIFEST,
    SCRATCH,
    DiskError,
    DiskFull,
    append_lines,
    claim_folder,
    explained,
    open_own,
    remove_own,
    require_own,
    require_room,
    require_writable,
    whole_folder,
    write_atomic,
)


def all_files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder of somebody's."""
    folder = tmp_path / "home"
    (folder / "work").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years")
    (folder / "work" / "model.safetensors").write_text("weights of mine")
    return folder


def test_a_file_is_whole_or_not_there_and_has_the_rights_of_the_user(tmp_path):
    file = tmp_path / "page.html"
    write_atomic(file, "one ü")
    write_atomic(file, "two")
    assert all_files(tmp_path) == {"page.html": "two"}
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.case("A6")
@pytest.mark.parametrize("name", [".page.html-being-written", ".page.html.0-being-written", "page.html"])
def test_a_planted_link_is_not_written_through(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "theirs"
    folder.mkdir()
    victim.write_text("mine")
    (folder / name).symlink_to(victim)
    write_atomic(folder / "page.html", "<script>")
    assert victim.read_text() == "mine" and (folder / "page.html").read_text() == "<script>"


@pytest.mark.case("A6")
def test_names_of_scratch_files_cannot_be_known_before(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("opcd.runtime.files.disk.put_in_place", lambda scratch, path: seen.append(scratch.name))
    for _ in range(3):
        write_atomic(tmp_path / "x", "")
    assert len(set(seen)) == 3 and all(SCRATCH.fullmatch(name) for name in seen)


@pytest.mark.case("A6")
@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_a_file_to_add_to_is_no_link_and_no_pipe(tmp_path, kind):
    victim, file = tmp_path / "victim", tmp_path / ".version_0.lock"
    if kind != "dangling":
        victim.write_text("mine")
    if kind in ("link", "dangling"):
        file.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, file)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(OSError):
        os.close(open_own(file, os.O_RDWR))
    with pytest.raises(DiskError, match=r"\.version_0\.lock"):
        append_lines(file, "a line\n")
    assert victim.read_text() == "mine" if kind != "dangling" else not victim.exists()


@pytest.mark.case("E1")
def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(home):
    before = all_files(home)
    for take in (require_own, lambda folder, key: claim_folder(folder, ["model.safetensors"], key)):
        with pytest.raises(
            UserError, match=r"weights: .*home holds files that opcd did not write there \(thesis\.txt, "
        ):
            take(home, "weights")
    with pytest.raises(UserError, match="did not write"), whole_folder(home, "student"):
        pytest.fail("nothing is done")
    assert all_files(home) == before


@pytest.mark.case("E1")
@pytest.mark.parametrize("kind", ["file", "dangling", "link to a full folder", "only empty folders"])
def test_a_place_that_is_no_empty_folder_is_refused(tmp_path, home, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("mine")
    elif kind == "only empty folders":
        (place / "later").mkdir(parents=True)
    else:
        place.symlink_to(home if "full" in kind else tmp_path / "nothing")
    with pytest.raises(UserError, match="place"):
        require_own(place, "weights")


@pytest.mark.case("E1")
def test_own_folders_are_replaced_and_what_was_added_to_them_is_not(tmp_path):
    target = tmp_path / "student"
    for content in ("one", "two"):
        with whole_folder(target, "student") as scratch:
            (scratch / "inner").mkdir()
            (scratch / "inner" / f"{content}.txt").write_text(content)
    assert all_files(target).keys() == {MANIFEST, "inner/two.txt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\(notes\.txt\)"), whole_folder(target, "student"):
        pytest.fail("nothing is done")
    remove_own(target)
    assert all_files(tmp_path) == {"student/notes.txt": "mine"}


@pytest.mark.case("E1")
@pytest.mark.parametrize("written", [None, 3, [1, None], ["../home/thesis.txt", "/etc/passwd"], {"thesis.txt": 1}])
def test_a_manifest_of_odd_types_claims_nothing_outside(tmp_path, home, written):
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    (own / MANIFEST).write_text(json.dumps({"written": written}))
    with pytest.raises(UserError, match="notes"):
        require_own(own, "weights")
    remove_own(own)
    assert (own / "notes.txt").exists() and (home / "thesis.txt").exists()


@pytest.mark.case("E1")
def test_a_failure_leaves_the_former_folder(tmp_path):
    target = tmp_path / "student"
    with whole_folder(target, "student") as scratch:
        (scratch / "a").write_text("one")
    with pytest.raises(ZeroDivisionError), whole_folder(target, "student") as scratch:
        (scratch / "a").write_text("two")
        1 / 0  # noqa: B018
    assert all_files(tmp_path).keys() == {"student/a", f"student/{MANIFEST}"}
    assert (target / "a").read_text() == "one"


@pytest.mark.case("E1")
def test_a_claimed_folder_is_cleared_of_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "weights"
    claim_folder(folder, ["model.safetensors"], "weights")
    (folder / ".model.safetensors.0123456789abcdef-being-written").write_text("half")
    (folder / "model.safetensors").write_text("whole")
    require_own(folder, "weights")
    claim_folder(folder, ["model.safetensors"], "weights")
    assert all_files(folder).keys() == {MANIFEST, "model.safetensors"}


@pytest.mark.case("E5")
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EIO, errno.EBUSY, errno.ESTALE, errno.ETXTBSY])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_what_the_system_refuses_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    (tmp_path / "page").write_text("before")

    def refuse(*_):
        raise OSError(number, os.strerror(number), "page")

    monkeypatch.setattr(
        "opcd.runtime.files.disk.os.fsync" if call == "fsync" else "opcd.runtime.files.disk.Path.replace", refuse
    )
    with pytest.raises(DiskError, match=f"cannot write .*page: {os.strerror(number)}"):
        write_atomic(tmp_path / "page", "after")
    assert all_files(tmp_path) == {"page": "before"}


@pytest.mark.case("E5")
def test_a_disk_that_cannot_fsync_folders_is_no_reason_to_stop(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("opcd.runtime.files.disk.os.fsync", only_files)
    write_atomic(tmp_path / "page", "text")
    assert (tmp_path / "page").read_text() == "text"


@pytest.mark.case("E6")
def test_a_full_disk_says_what_is_needed_and_free(tmp_path):
    with pytest.raises(
        DiskFull, match=r"no room for .*x: it takes [\d.]+ MiB, and [\d.]+ MiB are free; free some room"
    ):
        require_room(tmp_path / "x", 2**60)
    for error in (OSError(errno.ENOSPC, "No space"), _safetensors_error()):
        with (
            pytest.raises(DiskFull, match=r"it takes 2\.0 MiB, and [\d.]+ MiB are free"),
            explained(tmp_path / "x", 2**21),
        ):
            raise error


def _safetensors_error() -> Exception:
    from safetensors import SafetensorError

    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.case("E7")
def test_what_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out.gguf", Path("/proc/out.gguf")):
        with pytest.raises(UserError, match="--out: cannot write"):
            require_writable(path, "--out")
    require_writable(tmp_path / "new" / "out.gguf", "--out")
    assert all_files(tmp_path) == {"file": ""}
