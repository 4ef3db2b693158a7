"""Secrets by place: what stands there is never written or printed, and is masked by value in text we copy.

The places are the values under `storage_options`, `environment` and `headers`, and a URL's userinfo and query.
Pure: knows mappings and text, not the models.
"""

import html
import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

if TYPE_CHECKING:
    from pydantic import BaseModel

SECRET_KEYS = frozenset({"storage_options", "environment", "headers"})
"""Every value under one of these keys is a secret, at any depth; the keys below them are not."""

MASK = "***"

# The last @ before the first slash ends the userinfo, so a password that holds an unquoted @, ? or # goes whole.
_USERINFO = re.compile(r"(?<=://)([^/\s]*)@")
_HTTP_QUERY = re.compile(r"(https?://[^?#\s]*)\?([^#\s]*)", re.IGNORECASE)
# Elsewhere ? is a wildcard or part of a key, so a query is what reads like one: ?name=value.
_OTHER_QUERY = re.compile(r"(://\S*?)\?([\w.~-]+=[^#\s]*)")
_AUTH_SCHEME = re.compile(r"(?:basic|bearer|digest|negotiate|token|apikey)\s+(\S.*)", re.IGNORECASE | re.DOTALL)
_TRIVIAL = re.compile(r".{0,3}|\d{1,5}|true|false|none|null", re.IGNORECASE | re.DOTALL)
_SHORT = 8
_AS_GO_WRITES_JSON = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})


def clean_uri(uri: str) -> str:
    """Return *uri* without its userinfo and query; a local path, a wildcard `?` and an S3 key come back unchanged."""
    uri = _USERINFO.sub("", uri)
    uri = _HTTP_QUERY.sub(r"\1", uri)
    return _OTHER_QUERY.sub(r"\1", uri)


def clean_listed(uri: str) -> str:
    """Return the URI of an object that a store has listed without its userinfo and, over HTTP alone, its query.

    Elsewhere `?` is a part of the object's name, without which it would be another's; and what is listed has no query
    from the job file, where `?` is a wildcard. On S3 all is bucket and key, be the key a URL itself.
    """
    return uri if uri.startswith("s3://") else _HTTP_QUERY.sub(r"\1", _USERINFO.sub("", uri))


def clean_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of *document* with every value at a secret place masked and every URL in it cleaned.

    Whatever stands under a secret key is masked, also where it is not the mapping it should be.
    """
    return {key: _mask_leaves(value) if key in SECRET_KEYS else _clean(value) for key, value in document.items()}


def basic_credentials(userinfo: str) -> str:
    """What is sent of a URL's ``user:password``, or of a user alone: Basic authentication, RFC 7617."""
    user, _, password = userinfo.partition(":")
    return b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


def mask(text: str, secrets: frozenset[str]) -> str:
    """Return *text* with every one of *secrets* replaced; one below 8 characters only where it stands alone."""
    return _pattern(secrets).sub(MASK, text) if secrets else text


def secrets_at_work(job: "BaseModel | Mapping[str, Any]") -> frozenset[str]:
    """`secrets_of` a job, and each long variable of the environment that is a part of one, as ``${NAME}`` makes it.

    For what stages say and print: what they find in their environment is a user's first thought.
    """
    secrets = secrets_of(job)
    parts = {value for value in os.environ.values() if len(value) >= _SHORT}
    return secrets | {part for part in parts if any(part in secret for secret in secrets)}


def secrets_of(job: "BaseModel | Mapping[str, Any]") -> frozenset[str]:
    """Return what `mask` should hide of *job*: its secret values as logs and error bodies may spell them.

    That is each value as it stands, its lines, what follows an authentication scheme (`Bearer ...`), a URL's user and
    password as they are sent, and the JSON, Python, HTML and percent-encoded spellings of these. Left out, because
    hiding them would garble any log: fewer than 4 characters, numbers below six digits, and true, false, none and
    null. They are still never written by place.
    """
    document = job if isinstance(job, Mapping) else job.model_dump(by_alias=True)
    spellings = {spelling for secret in _iter_secrets(document) for spelling in _iter_spellings(secret)}
    return frozenset(spelling for spelling in spellings if not _TRIVIAL.fullmatch(spelling))


def _clean(value: Any) -> Any:
    match value:
        case str():
            return clean_uri(value)
        case Mapping():
            return clean_document(value)
        case list():
            return [_clean(item) for item in value]
        case tuple():
            return tuple(_clean(item) for item in value)
    return value


def _mask_leaves(value: Any) -> Any:
    match value:
        case None:
            return None
        case Mapping():
            return {key: _mask_leaves(item) for key, item in value.items()}
        case list() | tuple():
            return [_mask_leaves(item) for item in value]
    return MASK


def _iter_secrets(value: Any, *, under_secret: bool = False) -> Iterator[str]:
    match value:
        case Mapping():
            for key, item in value.items():
                yield from _iter_secrets(item, under_secret=under_secret or key in SECRET_KEYS)
        case list() | tuple():
            for item in value:
                yield from _iter_secrets(item, under_secret=under_secret)
        case str():
            yield from _iter_url_secrets(value)
            if under_secret:
                yield value
        case int() | float() if under_secret:
            yield str(value)


def _iter_url_secrets(text: str) -> Iterator[str]:
    for userinfo in _USERINFO.findall(text):
        yield userinfo
        yield userinfo.partition(":")[2]
        yield basic_credentials(userinfo)
    for pattern in (_HTTP_QUERY, _OTHER_QUERY):
        for _, query in pattern.findall(text):
            yield query
            yield from (parameter.partition("=")[2] for parameter in query.split("&"))


def _iter_spellings(secret: str) -> Iterator[str]:
    stripped = secret.strip()
    parts = {stripped, *(line.strip() for line in stripped.splitlines()), unquote(stripped), unquote_plus(stripped)}
    if scheme := _AUTH_SCHEME.fullmatch(stripped):
        parts.add(scheme[1])
    for part in parts:
        in_json = json.dumps(part)[1:-1]
        yield from (part, quote(part, safe=""), quote_plus(part), in_json, repr(part)[1:-1], html.escape(part))
        yield in_json.replace("/", "\\/")  # as PHP writes JSON
        yield in_json.translate(_AS_GO_WRITES_JSON)


@lru_cache(maxsize=16)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(secrets, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join(_standing_alone(secret) for secret in longest_first))


def _standing_alone(secret: str) -> str:
    literal = re.escape(secret)
    return literal if len(secret) >= _SHORT else rf"(?<![A-Za-z0-9]){literal}(?![A-Za-z0-9])"
