"""YAML text -> plain values and the line each stands on. The only door to PyYAML.

Scalars are those of YAML 1.2's core schema: `NO`, `on` and `yes` are text. Keys are always text.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

Place = tuple[str | int, ...]
"""Where a value stands: the keys and indices that lead to it."""

MAX_VALUES = 100_000
"""Bounds what aliases of aliases may expand to."""

MAX_DEPTH = 64
"""Far deeper than any job file, far above where JSON or the stack give up."""

_INT = re.compile(r"[-+]?[0-9]{1,1000}|0o[0-7]{1,1000}|0x[0-9a-fA-F]{1,1000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# What PyYAML says -> what to do. It names a character or a token, never a value, so nothing secret is repeated.
_ADVICE = [
    (r"scanning an alias|undefined alias", 'a value that begins with * is an alias to YAML: quote it, as in "*.csv"'),
    (r"scanning an anchor|duplicate anchor", "a value that begins with & is an anchor to YAML: quote it"),
    (r"'\\t'", "YAML takes no tabs here: indent with spaces"),
    (r"found character '(.)'", r"a value cannot begin with \1: quote it"),
    (r"mapping values are not allowed", "a value that holds ': ' must be quoted; or the line is indented wrongly"),
    (r"parsing a flow", "a value inside {} or [] that holds one of {}[], must be quoted; or a bracket is missing"),
    (r"could not find expected ':'", "expected 'key: value'"),
    (r"parsing a block.*found '<scalar>'", "text follows a closing quote or bracket: quote the whole value"),
    (r"parsing a block", "the line is indented wrongly"),
    (r"double-quoted scalar", "in \"double quotes\" a \\ begins an escape, and this is none; use 'single quotes'"),
    (r"scanning a quoted scalar", "a quote is not closed"),
    (r"single document", "a job file holds one YAML document; this begins a second"),
]


class YamlTextError(Exception):
    """The text is not YAML: what is wrong, and on which line (0 if unknown)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message, line)
        self.message, self.line = message, line


class Unquoted(str):
    """Text written without quotes that holds a variable: it is typed once the variable is known."""

    __slots__ = ()


@dataclass
class YamlDocument:
    """A YAML document as plain values, the line of every place in it, and what is wrong with single places."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)


def read_yaml(text: str) -> YamlDocument:
    """Read one YAML document. Raises YamlTextError if the text is not YAML; single places go to `problems`."""
    document = YamlDocument()
    try:
        node = _NodeLoader(_without_json_tabs(text)).get_single_node()
        if node is not None:
            document.value = _Walk(document).read(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlTextError(f"character #x{error.character:04x} cannot stand in YAML", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlTextError(
            _advice(f"{error.context or ''}: {error.problem or ''}"), mark.line + 1 if mark else 0
        ) from None
    except RecursionError:
        raise YamlTextError("nested too deeply", 0) from None
    return document


def read_scalar(text: str) -> Any:
    """Type an unquoted scalar by YAML 1.2's core schema: null, bool, int, float, or text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _without_json_tabs(text: str) -> str:
    # JSON may be indented with tabs, YAML may not; a line of JSON never begins inside a text.
    if not text.lstrip().startswith("{"):
        return text
    return re.sub(r"^[ \t]+", lambda indent: " " * len(indent[0]), text, flags=re.MULTILINE)


def _join_surrogates(text: str) -> str:
    # JSON writes "\ud83d\ude00" for one character; PyYAML makes two halves of it.
    return re.sub(
        "[\ud800-\udbff][\udc00-\udfff]", lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )


def _advice(complaint: str) -> str:
    for pattern, advice in _ADVICE:
        if found := re.search(pattern, complaint):
            return found.expand(advice)
    return f"not YAML: {complaint.strip(': ')}"


class _NodeLoader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to its node graph, which still knows lines, quotes and tags."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def resolve(self, kind: type[Node], _value: Any, implicit: Any) -> str:  # asked for what states no tag
        return "unquoted" if kind is ScalarNode and implicit[0] else "quoted"


class _Walk:
    """One walk over a node graph that fills a document; a node that aliases share is read at each of its places."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.values = 0
        self.open_nodes: list[Node] = []

    def read(self, node: Node, place: Place) -> Any:
        """Return the value of *node*, which stands at *place*, and note the lines of all it holds."""
        self._count(node)
        self.document.lines.setdefault(place, node.start_mark.line + 1)
        if node in self.open_nodes:
            self._problem(place, "an alias makes this value contain itself")
            return None
        if len(self.open_nodes) > MAX_DEPTH:
            raise YamlTextError("nested too deeply", node.start_mark.line + 1)
        self.open_nodes.append(node)
        try:
            if isinstance(node, MappingNode):
                return {key: self.read(value, (*place, key)) for key, value in self._pairs(node, place).items()}
            if isinstance(node, SequenceNode):
                return [self.read(item, (*place, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, place)
        finally:
            self.open_nodes.pop()

    def _scalar(self, node: Node, place: Place) -> Any:
        if node.tag == "unquoted":
            return Unquoted(node.value) if "${" in node.value else read_scalar(node.value)
        if node.tag in ("quoted", "tag:yaml.org,2002:str"):
            return _join_surrogates(node.value)
        self._problem(place, f"YAML tags are not taken here: remove {node.tag!r}")
        return None

    def _pairs(self, node: MappingNode, place: Place) -> dict[str, Node]:
        """Return the values of a mapping by key, its own before those that `<<` merges in."""
        self._count(node)
        pairs: dict[str, Node] = {}
        merged: list[Node] = []
        for key_node, value in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem(place, "a key must be text, and here is a list or mapping")
                continue
            key, line = _join_surrogates(key_node.value), key_node.start_mark.line + 1
            if key == "<<" and key_node.tag == "unquoted":
                merged += value.value if isinstance(value, SequenceNode) else [value]
            elif key in pairs:
                self._problem((*place, key), f"stated twice, also on line {line}")
            else:
                pairs[key] = value
                self.document.lines.setdefault((*place, key), line)
        for mapping in merged:
            if isinstance(mapping, MappingNode):
                pairs = self._pairs(mapping, place) | pairs
            else:
                self._problem((*place, "<<"), "expected an alias of a mapping, or a list of them")
        return pairs

    def _count(self, node: Node) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise YamlTextError(f"aliases expand to more than {MAX_VALUES:,} values", node.start_mark.line + 1)

    def _problem(self, place: Place, text: str) -> None:
        self.document.problems.append((place, text))
