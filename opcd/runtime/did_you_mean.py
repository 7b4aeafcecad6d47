"""The name that was probably meant, for messages."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

OTHERS = {"learningrate": "lr", "epochs": "maxepochs", "numtrainepochs": "maxepochs", "steps": "maxsteps"}
"""What other trainers call it."""
RENAMED = {
    "answer": "eval_sampling",
    "bad_numbers": "on_nonfinite",
    "ended": "finished_fraction",
    "halve_micro_batches": "shrink_on_oom",
    "max_importance": "importance_clip",
    "rollout_gap": "rollout_logprob_gap",
}
"""Parts of keys of earlier versions, and what they are now."""
RUN = re.compile(r"version_\d+")
"""The folder of a run."""
SHOWN = 5
"""Most names of a folder in a message."""


def near(wrong: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest of the names, whatever the case; None where none is near."""
    known = list(names)
    if (now := _renamed(wrong)) in known:
        return now
    found = get_close_matches(wrong, known, n=1, cutoff=cutoff)
    if not found:
        lower = {name.lower(): name for name in reversed(known)}
        found = [lower[name] for name in get_close_matches(wrong.lower(), lower, n=1, cutoff=cutoff)]
    return found[0] if found else None


def did_you_mean(wrong: str, names: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a message about a name that is not there: "; did you mean X?", or `otherwise` where none is near."""
    found = near(wrong, names, cutoff)
    return f"; did you mean {found}?" if found else otherwise


def or_all(wrong: str, names: Iterable[str]) -> str:
    """The same, with all the names where none is near."""
    known = list(names)
    return did_you_mean(wrong, known, f"; there are {', '.join(known)}" if known else "; there are none")


def nearest_key(wrong: str, keys: Iterable[str]) -> str | None:
    """The dotted key that was probably meant: one that ends alike, such as model.optimizer.lr for model.lr, or the
    nearest; None where there is none."""
    known = list(keys)
    if (now := _renamed(wrong)) in known:
        return now
    last = _plain(wrong.rsplit(".", 1)[-1])
    same = [key for key in known if _plain(key.rsplit(".", 1)[-1]) == OTHERS.get(last, last)]
    return near(wrong, same, 0.0) if same else near(wrong, known, 0.5) or _by_last_part(last, known)


def key_meant(wrong: str, keys: Iterable[str]) -> str:
    """The end of a message about a config key that is not there."""
    found = nearest_key(wrong, keys)
    return f"; did you mean {found}?" if found else "; `opcd fit --print_config` shows all"


def _renamed(key: str) -> str:
    """What a dotted key of an earlier version is now."""
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def _by_last_part(last: str, keys: list[str]) -> str | None:
    """The key whose last part is nearest."""
    parts = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    found = near(last, parts)
    return parts[found] if found else None


def _plain(name: str) -> str:
    """A name as typed by somebody who does not remember its case, hyphens or underscores."""
    return name.lower().replace("_", "").replace("-", "")


def is_run(name: str) -> bool:
    """Whether a name is that of a run which is not there, or of something in it, such as runs/version_7/student."""
    missing = _first_missing(Path(name))
    return missing is not None and missing.parent != Path.cwd() and RUN.fullmatch(missing.name) is not None


def beside(path: Path) -> str:
    """The end of a message about a path that is not there: what its folder has of that kind."""
    missing = _first_missing(path)
    if missing is None:
        return ""
    names = _names(missing.parent)
    close = sorted(get_close_matches(missing.name, names, n=SHOWN))
    several = f" {missing.parent.name} has {', '.join(close)}" if len(close) > 1 else ""
    inner = "" if missing == path.expanduser().absolute() else f"; there is no folder {missing}"
    return inner + did_you_mean(missing.name, names) + several


def _first_missing(path: Path) -> Path | None:
    """The part of a path from the top that is not there; None where all of it is."""
    whole = path.expanduser().absolute()
    try:
        return next((part for part in (*reversed(whole.parents), whole) if not part.exists()), None)
    except OSError:  # a name that no file system takes, or a folder that may not be read
        return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []
