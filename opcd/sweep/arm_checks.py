"""Checks of all configs of a sweep, before the first process starts."""

import json
import logging
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from opcd.data import ContextQueryDataModule
from opcd.modules.validation import Run, validate
from opcd.runtime.did_you_mean import key_meant
from opcd.runtime.differences import plain_config
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import require_file
from opcd.sweep.sweep_plan import Base, overrides

OWN_KEYS = ("trainer.default_root_dir", "config", "print_config")
"""Keys that the engine sets for every arm."""
NOT_ROWS = ("seed", "batch_size", "eval_batch_size", "shuffle", "num_workers")
"""Keys of `data` that do not change the rows."""


class ConfigChecker:
    """A checker of configs with the parser of `opcd fit`. It loads tokenizers and rows, no model.

    Args:
        parser: the parser of `opcd.cli.fit.fit_parser`.
        base: the settings that all arms share.

    Raises:
        UserError: a file of the base is missing, or the base is no valid config.
    """

    def __init__(self, parser: LightningArgumentParser, base: Base) -> None:
        self.parser, self.base = parser, base
        self._read: dict[str, ContextQueryDataModule] = {}
        for file in base.config:
            require_file(file, "base.config")
        self._known = self._keys()
        self.check_keys(base.set, "base.set")
        self._known = sorted({*self._known, *self._parse(self.words({}), "base").keys()})

    def words(self, settings: dict[str, Any]) -> list[str]:
        """The words after `opcd fit` for a run with these settings over the base.

        A setting replaces all keys of `base.set` below its key: another class has other arguments.
        """
        files = [word for file in self.base.config for word in ("--config", file)]
        base = {k: v for k, v in self.base.set.items() if not any(k.startswith(f"{key}.") for key in settings)}
        return [*files, *overrides({**base, **settings})]

    def check_keys(self, keys: Iterable[str], where: str) -> None:
        """Raise UserError for a dotted key that no config has, with the nearest known key."""
        for key in keys:
            if key in OWN_KEYS:
                raise UserError(f"{where}: {key} is set by the sweep itself; remove it")
            if not self._is_key(key):
                raise UserError(f"{where}: {key!r} is no config key{key_meant(key, self._known)}")

    def resolve(self, settings: dict[str, Any], where: str) -> dict[str, Any]:
        """The complete config of a run, as in its config.yaml, without trainer.default_root_dir.

        Raises:
            UserError: `opcd fit` would refuse the run before a model loads: a wrong value or argument, rows that
                cannot be read, or parts that do not fit together.
        """
        config = self._parse(self.words(settings), where)
        try:
            objects = self.parser.instantiate(config)
            data = self._rows(objects.data, config)
            validate(Run.configured(objects.model, config.trainer, data))
        except (ValueError, UserError, MisconfigurationException) as error:
            raise UserError(f"{where}: {error}") from error
        return plain_config(self.parser, config)

    def _parse(self, words: list[str], where: str) -> Any:
        quiet = logging.getLogger("jsonargparse")
        try:
            quiet.disabled = True  # its warning that a new class drops the arguments of the old one: axes do that
            return self.parser.parse_args(words)
        except ArgumentError as error:
            raise UserError(f"{where}: {error}") from error
        finally:
            quiet.disabled = False

    def _rows(self, data: ContextQueryDataModule, config: Any) -> ContextQueryDataModule:
        """The data with its rows, which are read once for all arms that share them."""
        rows = {key: value for key, value in config.data.as_dict().items() if key not in NOT_ROWS}
        models = [config.model.student, config.model.teacher]
        key = json.dumps([rows, *models], default=str, sort_keys=True)
        if key not in self._read:
            data.setup("fit")
            self._read[key] = data
        return self._read[key]

    def _keys(self) -> list[str]:
        names = (action.dest for action in self.parser._actions)
        own = {"help", *OWN_KEYS, "data.student", "data.teacher"}
        return [name for name in names if not name.endswith(".help") and name not in own]

    def _is_key(self, key: str) -> bool:
        """Whether the parser has the key, or a class or dictionary above it, whose inside the parser checks."""
        keys = self._keys()
        if key in keys:
            return True
        above = [name for name in keys if key.startswith(f"{name}.")]
        return bool(above) and not any(name.startswith(f"{max(above, key=len)}.") for name in keys)
