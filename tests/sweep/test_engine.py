"""Jobs as processes: what is run again, what is not, and what is left when the sweep is ended."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opcd.config import parsing
from opcd.runtime.errors import UserError
from opcd.sweep.job_engine import Engine, explain, locked
from opcd.sweep.jobs import Job, JobFolder
from opcd.sweep.launchers import SlurmLauncher, shares
from tests.helpers.paths import ROOT
from tests.helpers.sweep_jobs import Script, run


@pytest.fixture
def script(tmp_path):
    def make(name: str, code: str, after: tuple[str, ...] = (), **config: object) -> Script:
        return Script(name, [code], config, "done", after, ("pid",), folder=str(tmp_path / name))

    return make


DONE = "open('done', 'w').close(); open('../times', 'a').write(os.getcwd() + '\\n')"


def statuses(engine: Engine) -> dict[str, str]:
    return {name: task.status for name, task in engine.tasks.items()}


def test_a_failed_job_does_not_stop_the_rest_and_is_tried_again(tmp_path, script, capsys):
    bad = "print('what went wrong'), sys.exit(3)"
    jobs = [
        script("a", DONE),
        script("b", f"os.path.exists('../mended') or ({bad}); {DONE}"),
        script("c", DONE, after=("b",)),
        script("d", DONE),
        script("e", "print('stopped by a signal, exit code 0')"),
    ]
    engine = run(tmp_path, jobs)
    assert statuses(engine) == {"a": "finished", "b": "failed", "c": "not run", "d": "finished", "e": "failed"}
    text = explain(engine.failed())
    assert "b: exit code 3" in text and "what went wrong" in text and "e: ended before done was there" in text
    assert "b: failed" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    engine = run(tmp_path, jobs)
    assert statuses(engine) == {"a": "finished", "b": "finished", "c": "finished", "d": "finished", "e": "failed"}
    assert [Path(line).name for line in (tmp_path / "times").read_text().split()] == ["a", "d", "b", "c"]
    assert "a: finished before" in capsys.readouterr().out


def test_a_finished_job_with_another_config_is_refused_and_an_unfinished_one_is_not(tmp_path, script):
    run(tmp_path, [script("a", DONE, model={"loss": "JSD", "k": 1}), script("b", "sys.exit(1)", x=1)])
    with pytest.raises(UserError, match=r"a finished with another config \(model.loss\).*delete"):
        run(tmp_path, [script("a", DONE, model={"loss": "KL", "k": 1})])
    assert statuses(run(tmp_path, [script("b", DONE, x=2)])) == {"b": "finished"}


def test_nothing_of_a_former_attempt_stays(tmp_path, script):
    run(tmp_path, [script("a", "open('done', 'w').close(); sys.exit(1)")])
    assert statuses(run(tmp_path, [script("a", "pass")])) == {"a": "failed"}  # the proof is the former attempt's


def test_jobs_run_beside_each_other_but_not_more_than_allowed(tmp_path, script):
    code = "open('../log', 'a').write('+'); time.sleep(1.5); open('../log', 'a').write('-'); open('done', 'w').close()"
    run(tmp_path, [script(name, code) for name in "abcd"], at_once=2)
    running = [0]
    for mark in (tmp_path / "log").read_text():
        running.append(running[-1] + (1 if mark == "+" else -1))
    assert max(running) == 2 and len(running) == 9


def test_a_folder_serves_one_sweep(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="in use: by another sweep"), locked(tmp_path):
        pass


@pytest.mark.case("E1")
@pytest.mark.parametrize("command", ["sweep", "job"])
def test_files_of_the_users_in_a_sweeps_folder_are_kept(tmp_path, script, command):
    folder = tmp_path / "a" if command == "job" else tmp_path
    if command == "job":
        run(tmp_path, [script("b", DONE)])
    folder.mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"did not write there \(thesis\.txt\)"):
        run(tmp_path, [script("a", DONE)])
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.case("E1")
def test_notes_beside_a_failed_attempt_are_kept(tmp_path, script):
    jobs = [script("a", "os.makedirs('runs/version_0'); open('runs/version_0/x', 'w'); sys.exit(3)")]
    run(tmp_path, jobs)
    (tmp_path / "a/runs/version_0/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a: .*did not write there \(runs/version_0/notes\.txt\)"):
        run(tmp_path, jobs)
    (tmp_path / "a/runs/version_0/notes.txt").unlink()
    assert statuses(run(tmp_path, [script("a", DONE)])) == {"a": "finished"}
    assert not (tmp_path / "a/runs").exists()


@pytest.mark.case("E1")
def test_a_job_folder_that_is_a_link_is_not_emptied(tmp_path, script):
    other = tmp_path / "other"
    other.mkdir()
    (other / "job.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(other)
    with pytest.raises(UserError, match="is a link"):
        JobFolder(tmp_path / "out", script("a", DONE)).begin()
    assert [file.name for file in other.iterdir()] == ["job.json"]


LONG = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.helpers.sweep_jobs import Script, run
run(Path({folder!r}), [Script("a", [{code!r}], {{}}, "done", folder={job!r})])
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_sweep_and_the_process_it_started(tmp_path, script, kind):
    code = "open('pid', 'w').write(str(os.getpid())); time.sleep(120)"
    text = LONG.format(root=str(ROOT), folder=str(tmp_path), code=code, job=str(tmp_path / "a"))
    sweep = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = wait_for(lambda: int((tmp_path / "a" / "pid").read_text()))
    sweep.send_signal(kind)
    sweep.wait(20)
    if kind == signal.SIGTERM:
        wait_for(lambda: not alive(pid))
    else:  # it could not end its process, which still writes: no other sweep may begin
        assert alive(pid)
        with pytest.raises(UserError, match="killed one left behind"):
            run(tmp_path, [script("a", DONE)])
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))
    assert statuses(run(tmp_path, [script("a", DONE)])) == {"a": "finished"}


@pytest.mark.case("E4")
@pytest.mark.parametrize("name", ["job.json", "finished.json"])
@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"config": 3, "seconds": "1"}', "[" * 10**5])
def test_notes_of_wrong_types_are_one_message(tmp_path, script, name, text):
    run(tmp_path, [script("a", DONE)])
    (tmp_path / "a" / name).write_text(text)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        run(tmp_path, [script("a", DONE)])


ARM = "from opcd.__main__ import _end_with_the_sweep as end; end(); import os, time; print(os.getpid(), flush=True); "
SWEEP = """
import os, subprocess, sys, time
environment = os.environ | {{"OPCD_ENDS_WITH": {owner}}}
subprocess.Popen([sys.executable, "-c", {arm!r}], env=environment, start_new_session=True)
time.sleep(120)
"""


@pytest.mark.case("E11")
def test_an_arm_ends_with_its_sweep_also_after_sigkill(tmp_path):
    text = SWEEP.format(
        owner="str(os.getpid())", arm=ARM + "assert 'OPCD_ENDS_WITH' not in os.environ; time.sleep(120)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with sweep:
        arm = int(sweep.stdout.readline())
        assert alive(arm)
        sweep.kill()
    wait_for(lambda: not alive(arm))


@pytest.mark.case("E11")
def test_an_arm_whose_sweep_was_gone_before_does_not_begin(tmp_path):
    environment = os.environ | {"OPCD_ENDS_WITH": "1"}
    done = subprocess.run([sys.executable, "-c", ARM], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 143 and done.stdout == b""


@pytest.mark.case("E11")
def test_arms_know_their_sweep_and_the_lock_names_it(tmp_path, script):
    code = "open('done', 'w').write(os.environ['OPCD_ENDS_WITH'])"
    run(tmp_path, [script("a", code)])
    assert (tmp_path / "a" / "done").read_text() == str(os.getpid())
    with locked(tmp_path), pytest.raises(UserError, match=rf"in use.*process {os.getpid()} on "), locked(tmp_path):
        pass


@pytest.mark.case("E5")
def test_without_locks_the_process_in_the_lock_file_is_asked(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("opcd.runtime.files.locks.fcntl.flock", refuse)
    with locked(tmp_path):
        assert "without file locks" in capsys.readouterr().err
    owner = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(owner | {"process": os.getppid()}))
    with pytest.raises(UserError, match=f"in use.*process {os.getppid()}"), locked(tmp_path):
        pass


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except (OSError, ValueError):
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_devices_are_shared():
    four = ["0", "1", "2", "3"]
    assert shares(1, 2, four, 8) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert [shares(slot, 4, ["3", "7"], 8)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["3", "7", "3", "7"]
    assert shares(1, 1, [], 8) == {}
    assert "OMP_NUM_THREADS" in os.environ or shares(1, 2, [], 8) == {"OMP_NUM_THREADS": "4"}


SRUN = """#!/bin/sh
echo "$@" >>"$(dirname "$0")/asked"
while [ "${1#-}" != "$1" ]; do shift; done
export SLURM_NTASKS=1
exec "$@"
"""
"""What `srun` does with its words: its options go, and the rest is run."""


@pytest.fixture
def srun(tmp_path, monkeypatch):
    """A folder with an srun first on the PATH; gives what it has been asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "asked"


def test_jobs_through_srun(tmp_path, script, srun, capsys):
    alone = "assert 'SLURM_NTASKS' not in os.environ and 'OPCD_ENDS_WITH' not in os.environ"
    with locked(tmp_path / "out") as lock:
        engine = Engine(tmp_path, SlurmLauncher(["--time=4:00:00", "--gpus=1"], lock), sys.maxsize)
        engine.add([script("a", f"{alone}; print('from the node'); {DONE}"), script("b", "sys.exit(7)")])
        engine.run()
    assert statuses(engine) == {"a": "finished", "b": "failed"}
    assert engine.tasks["b"].code == 7
    assert engine.tasks["a"].folder.last_lines(1) == ["from the node"]
    asked = [line.split(" env -u ")[0] for line in srun.read_text().splitlines() if " env -u " in line]
    assert sorted(asked) == [f"--ntasks=1 --job-name={name} --time=4:00:00 --gpus=1" for name in "ab"]
    lines = capsys.readouterr().out.splitlines()
    log = os.path.relpath(tmp_path / "a" / "log.txt")
    assert lines[0] == f"a: running; its output: {log}" and "a: finished in 0:0" in " ".join(lines)


def test_srun_that_is_not_there_and_words_that_are_no_options(tmp_path, srun, monkeypatch):
    with pytest.raises(UserError, match="'gpu' is no option of srun"):
        SlurmLauncher(["-p", "gpu"], 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launcher slurm needs srun"):
        SlurmLauncher([], 0)


def test_the_last_lines_of_a_log(tmp_path, script):
    folder = JobFolder(tmp_path, script("a", ""))
    assert folder.last_lines(3) == []
    folder.begin()
    folder.log.write_bytes(b"first\n\nhalf\rwhole\n\xff last \n")
    assert folder.last_lines(2) == ["whole", "\N{REPLACEMENT CHARACTER} last"]


def test_a_job_may_import_what_the_sweep_may(monkeypatch):
    job = Job("a", ["fit"], {}, "proof")
    assert job.command[1:] == ["-m", "opcd", "fit"]
    monkeypatch.setattr(parsing, "allowed", ["--allow-imports", "subprocess"])
    assert job.command[1:] == ["-m", "opcd", "--allow-imports", "subprocess", "fit"]
