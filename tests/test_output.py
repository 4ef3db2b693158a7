"""What a run finds in its output when it starts again: journals with scars, pieces that nobody names."""

from pathlib import Path

import pytest

from batchpipe.journal import open_journal, read_journal
from batchpipe.runs import RunFolder, iter_pending, start_of, sweep_run, unfinished_runs
from batchpipe.storage import Store, open_store


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
    assert start_of(store, folder) == {"name": "mine"}


def test_G5_a_sweep_discards_the_pieces_that_no_journal_names(folder: RunFolder, store: Store):
    kept, lost = (_write_piece(store, folder, name) for name in ("a.csv", "b.csv"))
    journal = open_journal(store, folder / "journal")
    journal.append("split", piece=kept)
    journal.flush()

    sweep_run(store, folder)

    assert [pending.staging for pending in iter_pending(store, folder)] == [kept["staging"]]
    assert not Path(lost["staging"]).exists()


def _write_piece(store: Store, folder: RunFolder, name: str) -> dict[str, str]:
    with store.open_pending(f"{folder.root}/{name}", staging=folder / "pending", attempt="a1") as sink:
        sink.write(b"data")
        return sink.finish().to_json()
