"""What a run finds in its output when it starts again: journals with scars, pieces that nobody names."""

import tracemalloc
from itertools import repeat
from pathlib import Path

import pytest

from batchpipe.journal import open_journal, read_journal
from batchpipe.manifest import Input, LongTable, Manifest, Part, RunAccounts
from batchpipe.publication import publish_committed, write_draft
from batchpipe.runs import RunFolder, iter_pending, start_of, sweep_run, unfinished_runs
from batchpipe.storage import Pending, Store, open_store


@pytest.fixture
def store() -> Store:
    return open_store("/")


@pytest.fixture
def folder(tmp_path: Path, store: Store) -> RunFolder:
    """An unfinished run with two starts; a kill left half a segment beside them."""
    folder = RunFolder(str(tmp_path), "r1")
    for number in range(2):
        journal = open_journal(store, folder / "journal")
        journal.append("start" if not number else "split", fingerprint={"name": "mine"}, n=number)
        journal.flush()
    Path(folder / "journal", ".000002-00000002.jsonl.1b2c.batchpipe-tmp").write_bytes(b'{"type": "spl')
    return folder


def test_half_a_segment_that_a_kill_left_counts_for_nothing(folder: RunFolder, store: Store):
    assert [entry["type"] for entry in read_journal(store, folder / "journal")] == ["epoch", "start", "epoch", "split"]
    assert open_journal(store, folder / "journal").epoch == 3


def test_an_unfinished_run_is_found_with_what_it_began_with(folder: RunFolder, store: Store):
    assert unfinished_runs(store, folder.root) == ["r1"]
    assert (start_of(store, folder) or {})["fingerprint"] == {"name": "mine"}


def test_G5_a_sweep_discards_the_pieces_that_no_journal_names(folder: RunFolder, store: Store):
    kept, lost = (_write_piece(store, folder, name) for name in ("a.csv", "b.csv"))
    journal = open_journal(store, folder / "journal")
    journal.append("split", piece=kept)
    journal.flush()

    sweep_run(store, folder)

    assert [pending.staging for pending in iter_pending(store, folder)] == [kept["staging"]]
    assert not Path(lost["staging"]).exists()


def test_publishing_takes_no_more_memory_for_more_pieces(folder: RunFolder, store: Store):
    piece = Pending.from_json(_write_piece(store, folder, "a.csv"))
    part = Part(uri="a.csv", records=1, placeholders=0, bytes=4, sha256="0" * 64, splits=(0, 0))
    row = Input(uri="/in/a.csv", bytes=4, version="1", read=1, written=1, quarantined=0, dropped=0)

    def publish(pieces: int) -> int:
        """The most memory at once; the very same piece again and again, for what is published already is left."""
        tracemalloc.start()
        write_draft(store, folder, _manifest(), repeat((piece, part), pieces), repeat(row, pieces))
        published = publish_committed(store, folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (published.parts.rows, published.inputs.bytes) == (pieces, 4 * pieces)
        return peak

    publish(1)  # threads that publish the very same piece at the same time are in each other's way
    small, large = publish(1_000), publish(6_000)

    assert large - small < 5_000 * 500  # held as bytes they took more than a thousand each; the rest is garbage


def _manifest() -> Manifest:
    none = LongTable(uri="", rows=0, bytes=0, sha256="")
    texts = dict.fromkeys(["name", "fingerprint", "output", "output_format", "replaces", "started", "finished"], "")
    numbers = dict.fromkeys(["read_s", "write_s", "worker_seconds", "workers", "splits", "seconds"], 0)
    return Manifest.model_validate(
        {
            **texts,
            **numbers,
            "run_id": "r1",
            "input": [],
            "output_layout": "parts",
            "job": {},
            "inputs": none,
            "parts": none,
            "accounts": RunAccounts(read=0, written=0, quarantined=0, dropped=0),
            "generations": [],
            "stages": {},
            "versions": {},
        }
    )


def _write_piece(store: Store, folder: RunFolder, name: str) -> dict[str, str]:
    with store.open_pending(f"{folder.root}/{name}", staging=folder / "pending", attempt="a1") as sink:
        sink.write(b"data")
        return sink.finish().to_json()
