"""Optional packages: checks whether they are installed, and the commands that install them."""

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from opcd.runtime.errors import UserError

DISTRIBUTION = "opcd-lightning"
"""The name of this project for pip: `opcd` on PyPI is another project."""
ROOT = Path(__file__).parent.parent.parent
"""The parent folder of the package: a clone, or site-packages."""


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the clone of this package or from the wheel."""
    if not (ROOT / "pyproject.toml").is_file():
        return pip_install(f"'{DISTRIBUTION}[{extra}]'")
    if Path().samefile(ROOT):
        return pip_install(f"-e '.[{extra}]'")
    return pip_install(f"-e {shlex.quote(f'{ROOT}[{extra}]')}")


def require(extra: str, module: str, key: str) -> None:
    """Check that a module is installed.

    Args:
        extra: the extra that installs the module.
        module: the name of the module in an import.
        key: the config key, command or task that needs it.

    Raises:
        UserError: the module is not installed; the message has the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{key} needs {module}, which is not installed: {install_hint(extra)}")


def pip_install(words: str) -> str:
    """A pip command for this environment, whose pip need not be the first one on the PATH."""
    first, own = shutil.which("pip"), Path(sys.executable)
    pip = "pip" if first and Path(first).parent == own.parent else f"{shlex.quote(str(own))} -m pip"
    return f"{pip} install {words}"
