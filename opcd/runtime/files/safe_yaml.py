"""YAML that somebody else has written, read within bounds.

An alias stands for what it names: a few lines of nested ones stand for billions of values. What loads them is fast, and
what walks through them afterwards never ends.
"""

from typing import Any

import yaml

from opcd.runtime.errors import UserError

MOST_COPIES = 50_000
"""Values that the aliases of a text may stand for, in all."""
MOST_LEVELS = 100
"""Lists and mappings inside of one another."""
LONGEST_NUMBER = 400
"""Characters of a number or a date: Python takes quadratic time for what is longer, or refuses it."""
NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnboundedYAML(yaml.YAMLError):
    """A text that stands for more than it seems to, or that PyYAML fails at."""


def load_yaml(text: str, source: str, loader: Any = Loader) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        source: the file, or what else it comes from, for messages.
        loader: one of PyYAML's loaders.

    Raises:
        UserError: it is no YAML, or more than it seems to be (`check_yaml`).
    """
    try:
        return bounded(lambda: yaml.load(text, Loader=loader), text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from error


def bounded(load: Any, text: str) -> Any:
    """What `load` makes of a text, once that is checked.

    Raises:
        yaml.YAMLError: and nothing else.
    """
    try:
        check_yaml(text)
        return load()
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML has many for `!!int x`, the 99th of a month, half a surrogate pair
        raise UnboundedYAML(f"a value cannot be read: {error!s:.200}") from error


def check_yaml(text: str) -> None:
    """Refuse a text whose values cannot be counted, or read, in reasonable time.

    Raises:
        yaml.YAMLError: names the line.
    """
    sizes: dict[int, int] = {}
    own = 0
    root = yaml.compose(text, Loader=Loader)
    pending: list[tuple[yaml.Node, bool]] = [] if root is None else [(root, False)]
    open_nodes: set[int] = set()
    while pending:
        node, counted = pending.pop()
        parts = _parts(node)
        if counted:
            open_nodes.remove(id(node))
            size = _own_size(node)
            sizes[id(node)] = size + sum(sizes[id(part)] for part in parts)
            own += size
        elif id(node) in open_nodes:
            raise UnboundedYAML(f"an anchor holds an alias of itself{_line(node)}")
        elif id(node) not in sizes:
            _check_number(node)
            if len(open_nodes) == MOST_LEVELS:
                raise UnboundedYAML(f"more than {MOST_LEVELS} lists and mappings inside of one another{_line(node)}")
            open_nodes.add(id(node))
            pending += [(node, True), *((part, False) for part in parts)]
        if counted and sizes[id(node)] - own > MOST_COPIES:
            raise UnboundedYAML(f"aliases stand for more than {MOST_COPIES} values{_line(node)}")


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _own_size(node: yaml.Node) -> int:
    """1, and more for long texts: copies of these are long too."""
    return 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)


def _check_number(node: yaml.Node) -> None:
    if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
        raise UnboundedYAML(f"a number of {len(node.value)} characters{_line(node)}")


def _line(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
