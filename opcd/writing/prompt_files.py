"""Prompts as Jinja files: those of the package, or files of the user in their place."""

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import read_text, require_file


class Prompt:
    """A Jinja template; the values are never read as a template.

    Args:
        default: the file of the package.
        file: a file that replaces it, or None.
        key: the config key of that file, for messages.
        known: the names that the template may use.
        needed: the names that the template must use.

    Raises:
        UserError: the file cannot be read, is not a template, uses an unknown name, or lacks a needed one.
    """

    def __init__(self, default: Path, file: str | None, key: str, known: set[str], needed: set[str]) -> None:
        path = default if file is None else require_file(file, key)
        self.text = read_text(path, key)
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            used = meta.find_undeclared_variables(environment.parse(self.text))
            self._template = environment.from_string(self.text)
        except TemplateError as error:
            raise UserError(f"{key}: {path}: {error}") from error
        for wrong, why in ((used - known, "unknown name"), (needed - used, "lacks")):
            if wrong:
                there = ", ".join(f"{{{{ {each} }}}}" for each in sorted(known))
                raise UserError(f"{key}: {path}: {why} {', '.join(sorted(wrong))}; a prompt is made of {there}")

    def __call__(self, **values: Any) -> str:
        """Fill in the values; white space around the text is removed."""
        return self._template.render(values).strip()
