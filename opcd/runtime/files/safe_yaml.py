"""YAML of unknown origin, read within bounds.

An alias repeats the value of its anchor: a few lines of nested aliases stand for billions of values. Loading them is
fast; code that walks through the value never ends.
"""

from typing import Any

import yaml

from opcd.runtime.errors import UserError

MOST_COPIES = 50_000
"""Most values that all aliases of a text may stand for."""
MOST_LEVELS = 100
"""Most levels of nested lists and mappings."""
LONGEST_NUMBER = 400
"""Most characters of a number or a date: for longer ones Python takes quadratic time, or raises."""
NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnboundedYAML(yaml.YAMLError):
    """A YAML text beyond the bounds, or one on which PyYAML fails."""


def load_yaml(text: str, source: str, loader: Any = Loader) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        source: the file or option that it comes from, for messages.
        loader: one of PyYAML's loaders.

    Raises:
        UserError: the text is no YAML, or beyond the bounds (`check_yaml`).
    """
    try:
        return bounded(lambda: yaml.load(text, Loader=loader), text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from error


def bounded(load: Any, text: str) -> Any:
    """Check a text, then call `load`.

    Raises:
        yaml.YAMLError: no other exception leaves.
    """
    try:
        check_yaml(text)
        return load()
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML has many for `!!int x`, the 99th of a month, half a surrogate pair
        raise UnboundedYAML(f"a value cannot be read: {error!s:.200}") from error


def check_yaml(text: str) -> None:
    """Check that the values of a text can be read in reasonable time.

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
            size = 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)  # long copies count more
            sizes[id(node)] = size + sum(sizes[id(part)] for part in parts)
            own += size
        elif id(node) in open_nodes:
            raise UnboundedYAML(f"an anchor holds an alias of itself{_line(node)}")
        elif id(node) not in sizes:
            if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise UnboundedYAML(f"a number of {len(node.value)} characters{_line(node)}")
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


def _line(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
