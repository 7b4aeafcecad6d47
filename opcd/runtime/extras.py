"""Packages that only some commands need: whether they are installed, and the command that installs them."""

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from opcd.runtime.errors import UserError

DISTRIBUTION = "opcd-lightning"
"""The name that pip knows this project by: `opcd` on PyPI is another project."""
ROOT = Path(__file__).parent.parent.parent
"""The folder that the package lies in: a clone, or site-packages."""


def install_hint(extra: str) -> str:
    """The command that installs an extra, of the clone that this package is imported from or of the installed wheel."""
    if not (ROOT / "pyproject.toml").is_file():
        return pip_install(f"'{DISTRIBUTION}[{extra}]'")
    if Path().samefile(ROOT):
        return pip_install(f"-e '.[{extra}]'")
    return pip_install(f"-e {shlex.quote(f'{ROOT}[{extra}]')}")


def require(extra: str, module: str, key: str) -> None:
    """Refuse what needs a module that is not installed.

    Args:
        extra: the extra that brings the module.
        module: its name in an import.
        key: the config key, the command or the task that needs it.

    Raises:
        UserError: it is not installed; the message holds the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{key} needs {module}, which is not installed: {install_hint(extra)}")


def pip_install(words: str) -> str:
    """The command that installs with the pip of this environment, which need not be the first one on the PATH."""
    first, own = shutil.which("pip"), Path(sys.executable)
    pip = "pip" if first and Path(first).parent == own.parent else f"{shlex.quote(str(own))} -m pip"
    return f"{pip} install {words}"
