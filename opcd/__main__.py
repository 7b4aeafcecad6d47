"""The command `opcd`, also as `python -m opcd`."""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def main() -> int:
    """Run the command with the arguments of this process; returns its exit code, 130 after Ctrl-C."""
    try:
        _end_with_the_sweep()
        from opcd.cli.main import main as command
        from opcd.runtime.output import install

        install()  # for as long as the process lives: a traceback is cleaned too
        return command()
    except KeyboardInterrupt:
        print("opcd: SIGINT: asked to end", file=sys.stderr)  # while what the command needs was imported
        return 130


def _end_with_the_sweep() -> None:
    """Have the kernel send SIGTERM to this process where the sweep that started it is gone, also after SIGKILL."""
    sweep = os.environ.pop("OPCD_ENDS_WITH", None)  # not for the processes that this one starts
    if sweep is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != sweep:  # it was gone before
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
