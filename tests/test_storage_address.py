import glob
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.storage import Found, join, open_store, relative, resolve
from batchpipe.storage.listing import sorted_by_uri

# Few names and few characters, so that names and patterns meet often.
NAME = st.text("ab.-[", min_size=1, max_size=3).filter(lambda name: name[0] not in "._")
PATHS = st.lists(st.lists(NAME, min_size=1, max_size=4), max_size=8)
COMPONENT = st.sampled_from(["**", "*", "?", "a*", "*b", "[ab]*", "[!a]", "[", "a", "b", "[[]", "**"])
PATTERN = st.lists(COMPONENT, min_size=1, max_size=4).filter(
    lambda parts: any(set(part) & set("*?[") for part in parts)
)


@given(PATHS, PATTERN)
def test_globs_find_what_python_s_own_glob_finds(paths: list[list[str]], pattern: list[str]):
    with TemporaryDirectory() as folder:
        make_files(Path(folder), paths)
        expected = set(glob.glob("/".join(pattern), root_dir=folder, recursive=True, include_hidden=True))  # noqa: PTH207 - our oracle
        files = sorted(name for name in expected if Path(folder, name).is_file())
        found = [relative(one.uri, folder) for one in open_store(folder).find(join(folder, *pattern))]
        assert found == files


@given(PATHS)
def test_a_folder_is_listed_as_sorting_its_paths_would(paths: list[list[str]]):
    with TemporaryDirectory() as folder:
        make_files(Path(folder), paths)
        uris = [found.uri for found in open_store(folder).find(folder)]
        assert uris == sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def make_files(folder: Path, paths: list[list[str]]) -> None:
    for path in paths:
        file = folder.joinpath(*path)
        if not file.exists() and not any(above.is_file() for above in file.parents):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


@given(st.lists(st.text(max_size=3)), st.integers(1, 5))
def test_a_listing_longer_than_memory_is_sorted_all_the_same(names: list[str], run_length: int):
    listing = [Found(name, 0, "") for name in names]
    assert [found.uri for found in sorted_by_uri(listing, run_length)] == sorted(names)


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("file:///data/x/", "/data/x"),
        ("x", str(Path.cwd() / "x")),
        ("s3a://bucket/x/", "s3://bucket/x"),
        ("s3://bucket", "s3://bucket"),
        ("memory://", "memory://"),
    ],
)
def test_a_uri_has_one_spelling(uri: str, resolved: str):
    assert resolve(uri) == resolved


@pytest.mark.parametrize(("uri", "joined"), [("s3://b", "s3://b/x/y"), ("/", "/x/y"), ("memory://", "memory://x/y")])
def test_joining_and_taking_apart(uri: str, joined: str):
    assert join(uri, "x", "y") == joined
    assert relative(joined, uri) == "x/y"


def test_what_is_not_below_a_folder_has_no_path_there():
    with pytest.raises(ValueError, match="'/data/xy' is not below '/data/x'"):
        relative("/data/xy", "/data/x")
