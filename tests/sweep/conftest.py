"""What tests of sweeps share."""

from pathlib import Path

QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
