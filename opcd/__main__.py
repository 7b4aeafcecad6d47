"""The command `opcd`, also as `python -m opcd`."""

import os
import sys

# Read once, by torch's first allocation: its large tensors on a CPU then lie in huge pages, where a step maps them anew
# at a fraction of the page faults (docs/log.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> int:
    """Run the command with the arguments of this process; returns its exit code, 130 after Ctrl-C."""
    try:
        from opcd.cli import main as command

        return command()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
