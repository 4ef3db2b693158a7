"""Secrets by place (G7): cleaned where they stand, masked by value in what is copied."""

import json
from base64 import b64encode
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.redact import MASK, clean_document, clean_listed, clean_uri, mask, secrets_of

PASSWORD = 'p@ss w"rd/é'


def job(**blocks: Any) -> dict[str, Any]:
    return {"input": {"uri": "in"}, "stages": [], "output": {"uri": "out"}, **blocks}


@pytest.mark.parametrize(
    ("uri", "cleaned"),
    [
        ("https://user:pw@host/a.csv?sig=abc&x=1", "https://host/a.csv"),
        ("https://user:p@ss?w#rd@host/a.csv", "https://host/a.csv"),
        ("s3://key:secret@bucket/a@b.csv", "s3://bucket/a@b.csv"),
        ("s3://bucket/a.csv?versionId=abc", "s3://bucket/a.csv"),
        ("s3://bucket/part-?.csv?X-Amz-Signature=abc", "s3://bucket/part-?.csv"),
        ("zip://a.csv::https://user:pw@host/a.zip?sig=abc", "zip://a.csv::https://host/a.zip"),
        ("https://host/a?token", "https://host/a"),
        ("wss and https://host?token=abc here", "wss and https://host here"),
    ],
)
def test_uri_loses_userinfo_and_query(uri: str, cleaned: str):
    assert clean_uri(uri) == cleaned


@pytest.mark.parametrize("uri", ["s3://bucket/part-??.csv", "/data/what?.csv", "a@b/c", "s3://b/**/x=1/*.csv", "*.csv"])
def test_wildcards_and_local_paths_stay(uri: str):
    assert clean_uri(uri) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a.csv?day=1",
        "s3://bucket/https://host/a?day=1",
        "s3://bucket/a://b@c.csv",
        "gs://bucket/a?day=1",
        "/data/a?day=1",
    ],
)
def test_name_of_a_listed_object_stays_whole(uri: str):
    assert clean_listed(uri) == uri


@pytest.mark.parametrize(
    ("uri", "cleaned"),
    [
        ("https://user:pw@host/a.csv?sig=abc&x=1", "https://host/a.csv"),
        ("HTTP://host/a.csv?token", "HTTP://host/a.csv"),
        ("ftp://user:pw@host/a.csv?day=1", "ftp://host/a.csv?day=1"),
        ("zip://a.csv::https://user:pw@host/a.zip?sig=abc", "zip://a.csv::https://host/a.zip"),
    ],
)
def test_listed_object_loses_userinfo_and_the_query_that_http_has(uri: str, cleaned: str):
    assert clean_listed(uri) == cleaned


def test_document_masks_every_value_at_a_secret_place_and_keeps_the_keys():
    written = job(
        storage_options={
            "s3": {"key": "AKIA", "client_kwargs": {"endpoint_url": "http://h"}, "anon": False, "n": None}
        },
        stages=[{"container": {"image": "i", "environment": {"PIN": 1}}}, {"endpoint": {"headers": {"X": ["a"]}}}],
    )

    cleaned = clean_document(written)

    assert cleaned["storage_options"] == {
        "s3": {"key": MASK, "client_kwargs": {"endpoint_url": MASK}, "anon": MASK, "n": None}
    }
    assert cleaned["stages"] == [
        {"container": {"image": "i", "environment": {"PIN": MASK}}},
        {"endpoint": {"headers": {"X": [MASK]}}},
    ]


def test_document_masks_what_is_no_mapping_where_one_should_be():
    assert clean_document({"environment": "PW=hunter2"}) == {"environment": MASK}


def test_document_cleans_urls_anywhere_else():
    assert clean_document({"params": {"db": "pg://me:pw@host/db", "n": 1}}) == {
        "params": {"db": "pg://host/db", "n": 1}
    }


@pytest.mark.parametrize(
    "spelled",
    [PASSWORD, json.dumps(PASSWORD)[1:-1], repr(PASSWORD)[1:-1], quote(PASSWORD, safe=""), quote_plus(PASSWORD)],
)
def test_secret_is_masked_as_logs_may_spell_it(spelled: str):
    secrets = secrets_of(job(storage_options={"s3": {"secret": PASSWORD}}))

    assert mask(f"login with {spelled} failed", secrets) == f"login with {MASK} failed"


def test_secrets_of_headers_urls_and_multiline_values_are_masked_apart():
    secrets = secrets_of(
        job(
            input={"uri": "https://user:hunter22@host/a?sig=si%2Fgnature&x=1"},
            stages=[{"endpoint": {"headers": {"Authorization": "Bearer token123"}}}],
            storage_options={"gs": {"token": {"private_key": "first line\nsecond line\n"}}},
        )
    )

    assert {"user:hunter22", "hunter22", "si%2Fgnature", "si/gnature", "token123", "Bearer token123"} <= secrets
    assert {"first line", "second line"} <= secrets


@pytest.mark.parametrize(
    ("userinfo", "sent"), [("bob:hunter%2F2secret", b"bob:hunter/2secret"), ("only-a-token", b"only-a-token:")]
)
def test_password_of_a_url_is_masked_as_it_is_sent(userinfo: str, sent: bytes):
    secrets = secrets_of({"stages": [{"endpoint": {"url": f"http://{userinfo}@host/x"}}]})

    assert mask(f"Authorization: Basic {b64encode(sent).decode()}", secrets) == f"Authorization: Basic {MASK}"


@pytest.mark.parametrize("spelled", ["a\\/b&c<secret", "a/b\\u0026c\\u003csecret", "a/b&amp;c&lt;secret"])
def test_secret_is_masked_as_other_languages_write_it(spelled: str):
    assert (
        mask(f'{{"token":"{spelled}"}}', secrets_of({"environment": {"T": "a/b&c<secret"}})) == f'{{"token":"{MASK}"}}'
    )


def test_trivial_values_are_not_masked_by_value():
    environment = {"A": "abc", "B": "8080", "C": "true", "D": "None", "E": "123456", "F": "debug"}

    assert secrets_of({"environment": environment}) == {"123456", "debug"}


def test_short_secret_is_masked_only_where_it_stands_alone():
    secrets = frozenset({"info", "longsecret"})

    assert mask("level=info information xlongsecretx", secrets) == f"level={MASK} information x{MASK}x"


def test_longest_secret_is_masked_first():
    assert mask("abcdefgh-suffix", frozenset({"abcdefgh", "abcdefgh-suffix"})) == MASK


@settings(deadline=None)
@given(secret=st.text(min_size=8), before=st.text(), after=st.text())
def test_no_text_shows_a_masked_secret(secret: str, before: str, after: str):
    secrets = secrets_of({"storage_options": {"s3": {"secret": secret}}})

    masked = mask(f"{before}{secret}{after}", secrets)

    assert not any(found in masked.replace(MASK, "") for found in secrets if len(found) >= 8 and found in masked)
