"""The command `opcd`, also as `python -m opcd`."""

import sys


def main() -> int:
    """Run the command with the arguments of this process; returns its exit code, 130 after Ctrl-C."""
    try:
        from opcd.cli import main as command
        from opcd.output import install

        install()  # for as long as the process lives: a traceback is cleaned too
        return command()
    except KeyboardInterrupt:
        print("opcd: SIGINT: asked to end", file=sys.stderr)  # while what the command needs was imported
        return 130


if __name__ == "__main__":
    sys.exit(main())
