"""Suggestions in messages: the name that was probably meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

OTHERS = {"learningrate": "lr", "epochs": "maxepochs", "numtrainepochs": "maxepochs", "steps": "maxsteps"}
"""Names of other trainers -> names here."""
RENAMED = {
    "answer": "eval_sampling",
    "bad_numbers": "on_nonfinite",
    "ended": "finished_fraction",
    "halve_micro_batches": "shrink_on_oom",
    "max_importance": "importance_clip",
    "rollout_gap": "rollout_logprob_gap",
}
"""Parts of keys of earlier versions -> parts now."""
GONE = {
    "flex_attention": "it was removed; sdpa scores rows behind a shared context without a mask too",
}
"""Values of earlier versions -> what to use."""
RUN = re.compile(r"version_\d+")
"""The name of a run's folder."""
SHOWN = 5
"""Most names in a message."""


def near(wrong: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest of the names, ignoring case; None if none is near."""
    known = list(names)
    if (now := _renamed(wrong)) in known:
        return now
    found = get_close_matches(wrong, known, n=1, cutoff=cutoff)
    if not found:
        lower = {name.lower(): name for name in reversed(known)}
        found = [lower[name] for name in get_close_matches(wrong.lower(), lower, n=1, cutoff=cutoff)]
    return found[0] if found else None


def did_you_mean(wrong: str, names: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: "; did you mean X?", or `otherwise` if no name is near."""
    found = near(wrong, names, cutoff)
    return f"; did you mean {found}?" if found else otherwise


def or_all(wrong: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest name, or all names."""
    known = list(names)
    return did_you_mean(wrong, known, f"; there are {', '.join(known)}" if known else "; there are none")


def nearest_key(wrong: str, keys: Iterable[str]) -> str | None:
    """The dotted key that was probably meant: one with the same last part, such as model.optimizer.lr for model.lr, or
    the nearest; None if none is near."""
    known = list(keys)
    if (now := _renamed(wrong)) in known:
        return now
    last = _plain(wrong.rsplit(".", 1)[-1])
    same = [key for key in known if _plain(key.rsplit(".", 1)[-1]) == OTHERS.get(last, last)]
    if same:
        return near(wrong, same, 0.0)
    parts = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    return near(wrong, known, 0.5) or parts.get(near(last, parts) or "")


def key_meant(wrong: str, keys: Iterable[str]) -> str:
    """The end of a message about an unknown config key."""
    found = nearest_key(wrong, keys)
    return f"; did you mean {found}?" if found else "; `opcd fit --print_config` shows all"


def _renamed(key: str) -> str:
    """The present name of a dotted key of an earlier version."""
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def _plain(name: str) -> str:
    """A name without case, hyphens and underscores."""
    return name.lower().replace("_", "").replace("-", "")


def is_run(name: str) -> bool:
    """Whether a name is a path in the folder of a missing run, such as runs/version_7/student."""
    missing = _first_missing(Path(name))
    return missing is not None and missing.parent != Path.cwd() and RUN.fullmatch(missing.name) is not None


def beside(path: Path) -> str:
    """The end of a message about a missing path: similar names in its folder."""
    missing = _first_missing(path)
    if missing is None:
        return ""
    try:
        names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    close = sorted(get_close_matches(missing.name, names, n=SHOWN))
    several = f" {missing.parent.name} has {', '.join(close)}" if len(close) > 1 else ""
    inner = "" if missing == path.expanduser().absolute() else f"; there is no folder {missing}"
    return inner + did_you_mean(missing.name, names) + several


def _first_missing(path: Path) -> Path | None:
    """The first part of a path, from the root, that does not exist; None if all exist."""
    whole = path.expanduser().absolute()
    try:
        return next((part for part in (*reversed(whole.parents), whole) if not part.exists()), None)
    except OSError:  # a name that no file system takes, or a folder that may not be read
        return None
