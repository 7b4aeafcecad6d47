"""The command as a process of its own, with one rank or several."""

import subprocess
import sys

RANKS = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices")
SHARDED = ("--trainer.accelerator", "cpu", "--trainer.strategy", "fsdp2", "--trainer.devices", 2)


def run(*args: object, launcher: tuple[str, ...] = ()) -> str:
    """Run the command as a process of its own; returns what it printed."""
    words = [sys.executable, *launcher, "-m", "opcd", *args]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
