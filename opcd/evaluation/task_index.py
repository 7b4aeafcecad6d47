"""The definitions of tasks by name: in this package's folder, the user's folder, or lm-eval's own.

lm-eval reads all of its 14,000 files to find one name, which takes 20 s on two cores. Here the files are searched for
`task: NAME` (2 s), and lm-eval reads only the folder with the match. Groups and tags need all files.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import elsewhere

OWN = Path(__file__).parent.parent / "tasks"
NAME = re.compile(r"^[\"']?(?:task|group|tag)[\"']?:[ \t]*[\"']?([^\s\"'#\[{]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
"""A name at the top level of a YAML file."""
TAGS = re.compile(r"^[\"']?tag[\"']?:[ \t]*((?:\n[ \t]*- *[^\s#]+[ \t]*)+|\[[^\]]*\])", re.MULTILINE)
"""A list of tags at the top level of a YAML file."""


def own_tasks() -> list[str]:
    """The names of this package's tasks."""
    return sorted(file.stem for file in OWN.glob("*.yaml"))


def manager_for(name: str, include_path: str | None, prefix: str, metadata: dict[str, Any]) -> Any:
    """lm-eval's TaskManager of the folder that defines a task: the user's folder, this package's, or lm-eval's.

    Args:
        name: name of a task, a group or a tag.
        include_path: the user's folder, or None.
        prefix: prefix of config keys in messages.
        metadata: arguments that lm-eval passes to the function that makes the task's rows.

    Raises:
        UserError: there is no such task, or its file cannot be read.
    """
    from lm_eval.tasks import TaskManager

    user = None if include_path is None else _folder(include_path, prefix)
    for folder in filter(None, (user, OWN)):
        manager = TaskManager(include_defaults=False, include_path=folder, metadata=metadata)
        if name in manager.all_subtasks:
            return manager
    if user is not None:
        _refuse_unreadable(name, user, prefix)
    if (file := _names(_lm_eval_folder()).get(name)) is not None:
        manager = TaskManager(include_defaults=False, include_path=file.parent, metadata=metadata)
        if name in manager.all_subtasks:
            return manager
        manager = TaskManager(include_path=[folder for folder in (OWN, user) if folder])
        if name in manager.all_tasks:
            return manager
    elif user is not None and name in _names(user):
        return TaskManager(include_path=[OWN, user])
    raise UserError(_unknown(name, user, prefix))


def shown_file(file: str) -> str:
    """The path of a task's file for results: inside a package, it starts with the package's name."""
    for package in (OWN.parent, _lm_eval_folder().parent):
        if Path(file).is_relative_to(package):
            return str(Path(file).relative_to(package.parent))
    return file


def _folder(include_path: str, prefix: str) -> Path:
    folder = Path(include_path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{prefix}include_path: no folder {folder.resolve()}{elsewhere(include_path)}")
    if next(folder.rglob("*.yaml"), None) is None:
        raise UserError(f"{prefix}include_path: {folder.resolve()} has no .yaml file: a task of lm-eval is one")
    return folder


def _lm_eval_folder() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


@lru_cache(maxsize=4)
def _names(folder: Path) -> dict[str, Path]:
    """Name of a task, group or tag -> the first YAML file of a folder that has it."""
    names: dict[str, Path] = {}
    files = [file for file in folder.rglob("*") if file.suffix in ("", ".yaml") and file.is_file()]
    for file in sorted(
        files, key=lambda file: (file.suffix == "", file)
    ):  # files without a suffix are included by others
        text = file.read_text(encoding="utf-8", errors="replace")
        tags = [name for tags in TAGS.findall(text) for name in re.findall(r"[^\s,\[\]\"'-][^\s,\[\]\"']*", tags)]
        for name in (*NAME.findall(text), *tags):
            names.setdefault(name, file)
    return names


def _refuse_unreadable(name: str, folder: Path, prefix: str) -> None:
    """Raise UserError for a task's file that cannot be read: lm-eval skips such files."""
    from lm_eval.tasks import TaskManager

    for file in sorted(folder.rglob("*.yaml")):
        if re.search(rf"^task:[ \t]*[\"']?{re.escape(name)}\b", file.read_text("utf-8", "replace"), re.MULTILINE):
            try:
                TaskManager(include_defaults=False).load([str(file)])
            except Exception as error:
                why = " ".join(str(error).split())
                raise UserError(f"{prefix}tasks: {name}: cannot read {file}: {why}") from error


def _unknown(name: str, user: Path | None, prefix: str) -> str:
    own, theirs = own_tasks(), list(_names(_lm_eval_folder()))
    users = [] if user is None else list(_names(user))
    meant = did_you_mean(name, [*own, *users]) or did_you_mean(name, theirs)
    folder = "those of your own folder, with include_path" if user is None else f"those of {user}"
    return (
        f"{prefix}tasks: no task {name!r}{meant}; there are {', '.join(own)}, all of lm-eval's, {folder}, "
        f"and games, whose {prefix}data.{name} is opcd.games.GameSeeds"
    )
