"""Model files: fetched from anywhere, unpacked without trust, cached once for all workers."""

import io
import os
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchpipe.errors import StageStartError
from batchpipe.stages import unpack as unpacking
from batchpipe.stages.model_data import _evict, open_model_data
from batchpipe.stages.unpack import UnpackError, unpack
from tests.opened_stage import make_context, make_job
from tests.s3_server import S3Server

FILES = {"model.txt": b"weights", "code/inference.py": b"print()"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of models, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batchpipe" / "models"


@pytest.fixture
def open_model(cache: Path, tmp_path: Path):
    """Open model data and return its folder; it stays open until the test ends."""
    with ExitStack() as stack:

        def open_it(uri: object, run_id: str = "run1", scratch: Path | None = None, **options: Any) -> Path:
            job = make_job(tmp_path, {"process": {"command": ["x"]}}, **options)
            context = make_context(tmp_path, job, run_id=run_id)
            context = replace(context, scratch=scratch) if scratch else context
            return stack.enter_context(open_model_data(job.stages[0], str(uri), context))

        yield open_it


def tar_gz(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def model_tar(path: Path) -> Path:
    return tar_gz(path, *[(member(name), content) for name, content in FILES.items()])


def model_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in FILES.items():
            packed.writestr(name, content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("make", [model_tar, model_zip])
def test_archive_is_unpacked_whatever_its_name(open_model, tmp_path: Path, make: Callable[[Path], Path]):
    assert contents(open_model(make(tmp_path / "model.bin"))) == FILES


def test_plain_tar_is_unpacked(open_model, tmp_path: Path):
    with tarfile.open(tmp_path / "model.tar", "w") as tar:
        tar.addfile(member("a"), io.BytesIO())

    assert contents(open_model(tmp_path / "model.tar")) == {"a": b""}


def test_local_folder_is_used_where_it_lies(open_model, tmp_path: Path):
    (tmp_path / "model").mkdir()

    assert open_model(tmp_path / "model") == tmp_path / "model"


def test_unpacked_files_are_read_only_and_keep_whether_they_run(open_model, tmp_path: Path):
    archive = tar_gz(tmp_path / "m", (member("run", mode=0o6777), b"x"), (member("data", mode=0o666), b"x"))

    folder = open_model(archive)

    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in ("run", "data")] == [0o555, 0o444]


def test_a_full_cache_is_told_with_how_to_make_room_and_left_empty(open_model, tmp_path: Path, cache: Path):
    cache.mkdir(parents=True)
    archive = tar_gz(tmp_path / "m", (member("weights"), bytes(1 << 20)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", cache], check=True)
    try:
        with pytest.raises(StageStartError, match="No space left on device") as error:
            open_model(archive)
        left = list(contents(cache).values())
    finally:
        subprocess.run(["umount", cache], check=True)

    assert error.value.next.startswith("make room where models are unpacked, ~/.cache/batchpipe, or name a larger")
    assert not any(left)


def test_an_images_own_user_may_read_the_model_whatever_our_umask(open_model, tmp_path: Path, cache: Path):
    before = os.umask(0o077)
    try:
        folder = open_model(model_tar(tmp_path / "m"))
    finally:
        os.umask(before)

    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "code")}
    assert modes == {".": 0o755, "code": 0o755}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


class Web(ThreadingHTTPServer):
    """A web server that has one file."""

    answer: tuple[bytes, dict[str, str]]
    """The file, and the headers that come with it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/m.tar.gz"


class Download(BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        body, headers = self.server.answer
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.answer[0])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server that runs."""
    with Web(("127.0.0.1", 0), Download) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("has_dates", [True, False])
def test_model_on_a_web_server_without_etags_is_never_an_older_one(
    open_model, tmp_path: Path, web: Web, has_dates: bool
):
    for day, content in ((1, b"older"), (2, b"newer")):
        archive = tar_gz(tmp_path / "m", (member("model.txt"), content)).read_bytes()
        headers = {"Last-Modified": f"Sun, 0{day} Nov 2026 10:00:00 GMT"} if has_dates else {}
        web.answer = (archive.ljust(1000, b"\0"), headers)
        (tmp_path / f"worker{day}").mkdir()

        folder = open_model(web.url, f"run{day}", scratch=tmp_path / f"worker{day}")

        assert contents(folder) == {"model.txt": content}


def test_archive_and_folder_on_s3_are_fetched(open_model, s3_server: S3Server, bucket: str, tmp_path: Path):
    client = s3_server.client
    client.put_object(Bucket=bucket, Key="m.tar.gz", Body=model_tar(tmp_path / "m").read_bytes())
    for name, content in FILES.items():
        client.put_object(Bucket=bucket, Key=f"folder/{name}", Body=content)
    options = {"storage_options": {"s3": s3_server.storage_options}}

    for uri in (f"s3://{bucket}/m.tar.gz", f"s3://{bucket}/folder/"):
        assert contents(open_model(uri, **options)) == FILES


def test_second_use_reads_the_cache_and_not_the_archive(open_model, tmp_path: Path, cache: Path):
    archive = model_tar(tmp_path / "m")
    first = open_model(archive)
    inode = (first / "model.txt").stat().st_ino

    assert (open_model(archive, run_id="run2") / "model.txt").stat().st_ino == inode


def test_changed_archive_is_another_model(open_model, tmp_path: Path):
    first = open_model(model_tar(tmp_path / "m"))
    second = open_model(tar_gz(tmp_path / "m", (member("other"), b"x")))

    assert (contents(first), contents(second)) == (FILES, {"other": b"x"})


@pytest.mark.parametrize("damage", [b"w3ights", b"longer than before"])
def test_damaged_cache_is_noticed_by_the_next_run(open_model, tmp_path: Path, damage: bytes):
    archive = model_tar(tmp_path / "m")
    damaged = open_model(archive) / "model.txt"
    damaged.chmod(0o644)
    damaged.write_bytes(damage)

    assert contents(open_model(archive, run_id="run2")) == FILES


def test_foreign_file_in_the_cache_is_noticed(open_model, tmp_path: Path):
    archive = model_tar(tmp_path / "m")
    (open_model(archive) / "extra").touch()

    assert contents(open_model(archive)) == FILES


def test_what_a_killed_download_left_is_replaced(open_model, tmp_path: Path, cache: Path):
    archive = model_tar(tmp_path / "m")
    entry = open_model(archive).parent
    entry.rename(entry.with_suffix(".begun"))

    assert contents(open_model(archive)) == FILES
    assert not entry.with_suffix(".begun").exists()


def test_read_only_home_falls_back_to_scratch(open_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # root may write anywhere else

    assert open_model(model_tar(tmp_path / "m")).is_relative_to(tmp_path / "scratch")


def test_N_workers_unpack_once(tmp_path: Path, cache: Path):
    archive = model_tar(tmp_path / "m")
    code = f"""
from pathlib import Path
from batchpipe.stages.model_data import open_model_data
from tests.opened_stage import make_context, make_job
folder = Path({str(tmp_path)!r}) / __import__("sys").argv[1]
job = make_job(folder, {{"process": {{"command": ["x"]}}}})
with open_model_data(job.stages[0], {str(archive)!r}, make_context(folder, job)) as model:
    print((model / "model.txt").stat().st_ino)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code]

    workers = [
        subprocess.Popen([*command, f"w{i}"], stdout=subprocess.PIPE, env=environment, text=True) for i in range(4)
    ]

    assert len({worker.communicate(timeout=60)[0] for worker in workers}) == 1


def test_cache_is_bounded_and_what_is_in_use_stays(cache: Path, tmp_path: Path):
    job = make_job(tmp_path, {"process": {"command": ["x"]}})
    context = make_context(tmp_path, job)
    folders = []
    with ExitStack() as in_use:
        for name in ("old", "used", "new"):
            archive = tar_gz(tmp_path / name, (member(name), b"x" * 1000))
            model = open_model_data(job.stages[0], str(archive), context)
            folders.append((in_use.enter_context(model) if name == "used" else model.__enter__()).parent)
            if name != "used":
                model.__exit__(None, None, None)
        for age, folder in enumerate(reversed(folders)):
            os.utime(folder, (1_000_000 - age, 1_000_000 - age))

        _evict(folders[2], max_bytes=2500)

    assert [folder.exists() for folder in folders] == [False, True, True]


def test_opening_a_model_keeps_the_cache_within_its_bound(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchpipe.stages.model_data.MAX_CACHE_BYTES", 2500)
    job = make_job(tmp_path, {"process": {"command": ["x"]}})

    for name in "abcd":
        archive = tar_gz(tmp_path / name, (member(name), b"x" * 1000))
        with open_model_data(job.stages[0], str(archive), make_context(tmp_path, job)) as model:
            newest = model

    assert contents(newest) == {"d": b"x" * 1000}
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 2500


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (member("../evil"), "a path out of its folder: '../evil'"),
        (member("/etc/evil"), "a path out of its folder: '/etc/evil'"),
        (member("a/../../evil"), "a path out of its folder: 'a/../../evil'"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "a link out of its folder: 'link'"),
        (member("a/link", tarfile.SYMTYPE, "../../x"), "a link out of its folder: 'a/link'"),
        (member("hard", tarfile.LNKTYPE, "../x"), "a link out of its folder: 'hard'"),
        (member("link", tarfile.SYMTYPE, "missing"), "a link to something that is no file in it: 'link'"),
        (member("loop", tarfile.SYMTYPE, "loop"), "links in a circle: 'loop'"),
        (member("tty", tarfile.CHRTYPE), "a device or pipe: 'tty'"),
        (member("pipe", tarfile.FIFOTYPE), "a device or pipe: 'pipe'"),
    ],
)
def test_dangerous_tar_is_refused_and_leaves_nothing(
    open_model, tmp_path: Path, cache: Path, bad: tarfile.TarInfo, text: str
):
    archive = tar_gz(tmp_path / "m.tar.gz", (member("fine"), b"x"), (bad, b""))

    with pytest.raises(
        StageStartError, match=r"stage 'stage' did not start: its model_data .*m.tar.gz' cannot"
    ) as error:
        open_model(archive)

    assert text in str(error.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert not (tmp_path / "evil").exists()


def test_folder_through_a_link_cannot_lead_out(open_model, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    link = member("d", tarfile.SYMTYPE, "fine")
    archive = tar_gz(tmp_path / "m", (member("fine"), b"x"), (link, b""), (member("d/evil"), b"x"))

    with pytest.raises(StageStartError, match="cannot be used"):
        open_model(archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_link_inside_the_archive_becomes_its_file(open_model, tmp_path: Path, kind: bytes):
    link = member("lib/a.so", kind, "a.so.1" if kind == tarfile.SYMTYPE else "lib/a.so.1")
    archive = tar_gz(tmp_path / "m", (link, b""), (member("lib/a.so.1"), b"code"))

    folder = open_model(archive)

    assert contents(folder) == {"lib/a.so": b"code", "lib/a.so.1": b"code"}
    assert not (folder / "lib/a.so").is_symlink()


def test_zip_with_a_path_or_link_that_leads_out_is_refused(open_model, tmp_path: Path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name, info, content in (("a", zipfile.ZipInfo("../evil"), b"x"), ("b", link, b"/etc/passwd")):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            packed.writestr(info, content)

        with pytest.raises(StageStartError, match="out of its folder"):
            open_model(tmp_path / name)


@pytest.mark.parametrize("make", [model_tar, model_zip])
def test_bomb_is_stopped_by_its_bytes(
    open_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
):
    monkeypatch.setattr(unpacking, "MIN_BYTES", 5)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 0)

    with pytest.raises(StageStartError, match="it unpacks to more than 5 bytes"):
        open_model(make(tmp_path / "m"))


def test_link_counts_as_the_file_that_it_becomes(open_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpacking, "MIN_BYTES", 25_000)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 0)
    links = [(member(f"link{number}", tarfile.SYMTYPE, "large"), b"") for number in range(2)]
    archive = tar_gz(tmp_path / "m", (member("large"), bytes(10_000)), *links)

    with pytest.raises(StageStartError, match="it unpacks to more than 25,000 bytes"):
        open_model(archive)


def large_name(number: int) -> tarfile.TarInfo:
    return member("x" * 3_000_000)


def large_attribute(number: int) -> tarfile.TarInfo:
    info = member(f"a{number}")
    info.pax_headers = {"comment": "x" * 3_000_000}
    return info


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("make", [large_name, large_attribute])
def test_names_and_attributes_of_a_tar_are_bounded(
    open_model, tmp_path: Path, make: Callable[[int], tarfile.TarInfo], tar_format: int
):
    with tarfile.open(tmp_path / "m", "w:gz", format=tar_format) as tar:
        tar.addfile(make(0))

    if (make, tar_format) == (large_attribute, tarfile.GNU_FORMAT):  # it has none
        assert contents(open_model(tmp_path / "m")) == {"a0": b""}
        return
    with pytest.raises(StageStartError, match="it holds names or attributes of more than 1,048,576 bytes"):
        open_model(tmp_path / "m")


def test_attributes_of_all_files_of_a_tar_are_bounded_together(open_model, tmp_path: Path):
    tars = []
    for number in range(3):
        headers = {f"comment{number}": "x" * 400_000}
        with tarfile.open(tmp_path / "one", "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            tar.addfile(member(f"a{number}"))
        tars.append((tmp_path / "one").read_bytes().rstrip(b"\0"))
    padded = [one + bytes(-len(one) % 512) for one in tars]
    (tmp_path / "m").write_bytes(b"".join(padded) + bytes(1024))

    with pytest.raises(StageStartError, match="it holds names or attributes of more than 1,048,576 bytes"):
        open_model(tmp_path / "m")


def test_bomb_is_stopped_by_its_count(open_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpacking, "MAX_FILES", 1)

    with pytest.raises(StageStartError, match="it holds more than 1 files"):
        open_model(model_tar(tmp_path / "m"))


@pytest.mark.parametrize("make", [model_tar, model_zip])
def test_truncated_archive_is_said_to_be_broken(open_model, tmp_path: Path, make: Callable[[Path], Path]):
    archive = make(tmp_path / "m")
    archive.write_bytes(archive.read_bytes()[:-4])

    with pytest.raises(StageStartError, match="it is broken: "):
        open_model(archive)


def test_link_of_a_zip_to_a_name_that_is_no_text_is_refused(open_model, tmp_path: Path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "m", "w") as packed:
        packed.writestr(link, b"\xff\xfe")

    with pytest.raises(StageStartError, match="it is broken: "):
        open_model(tmp_path / "m")


def packed_tar(folder: Path, tar_format: int) -> bytes:
    with tarfile.open(folder / "packed", "w", format=tar_format) as tar:
        for name, content in [*FILES.items(), ("\u00e9" * 120, b"x" * 700)]:
            info = member(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
        tar.addfile(member("link", tarfile.SYMTYPE, "model.txt"))
    return (folder / "packed").read_bytes()


def packed_zip(folder: Path, method: int) -> bytes:
    with zipfile.ZipFile(folder / "packed", "w", method) as packed:
        for name, content in FILES.items():
            packed.writestr(name, content * 20)
    return (folder / "packed").read_bytes()


@pytest.mark.parametrize(
    ("pack", "how"),
    [
        *((packed_tar, how) for how in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
        *((packed_zip, how) for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    ],
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_archive_is_never_more_than_broken(
    tmp_path: Path, pack: Callable[[Path, int], bytes], how: int, data: st.DataObject
):
    damaged = bytearray(pack(tmp_path, how))
    places = st.integers(0, len(damaged) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        damaged[place] = byte
    del damaged[data.draw(st.one_of(st.just(len(damaged)), places)) :]

    with TemporaryDirectory() as folder, suppress(UnpackError, OSError):
        unpack(io.BytesIO(damaged), len(damaged), Path(folder, "model"))


def test_file_that_is_no_archive_is_refused(open_model, tmp_path: Path):
    (tmp_path / "m").write_text("hello")

    with pytest.raises(StageStartError, match=r"it is neither a tar.gz nor a zip"):
        open_model(tmp_path / "m")


def test_missing_model_is_told_by_its_address_without_secrets(open_model, tmp_path: Path):
    text = rf"its model_data '.*/nothing' cannot be used: there is nothing at file://{tmp_path}/nothing"
    with pytest.raises(StageStartError, match=text) as error:
        open_model(tmp_path / "nothing")

    advice = "put a folder, a tar.gz or a zip there, or correct stages.stage.process.model_data: a path is relative "
    assert error.value.next == f"{advice}to the job file's folder"
