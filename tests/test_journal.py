"""The journal: what was flushed is replayed in order, and a late writer of an older epoch is not believed."""

import pytest

from batchpipe.errors import OutputError
from batchpipe.journal import Journal, open_journal, read_journal, revoke_journal
from batchpipe.storage import Store, open_store


@pytest.fixture
def store() -> Store:
    return open_store("/")


def numbers(entries) -> list[int]:
    return [entry["n"] for entry in entries if entry["type"] == "split"]


def test_a_new_start_replays_what_earlier_ones_flushed(tmp_path, store):
    for start in range(3):
        journal = open_journal(store, str(tmp_path))
        assert numbers(journal.replay()) == list(range(2 * start))
        journal.append("split", n=2 * start)
        journal.flush()
        journal.append("split", n=2 * start + 1)
        journal.flush()

    assert numbers(read_journal(store, str(tmp_path))) == [0, 1, 2, 3, 4, 5]


def test_what_was_not_flushed_is_not_there(tmp_path, store):
    journal = open_journal(store, str(tmp_path))
    journal.append("split", n=1)

    assert numbers(read_journal(store, str(tmp_path))) == []


@pytest.mark.parametrize("settles", [True, False])
def test_what_has_waited_for_a_second_is_durable_whether_more_settles_or_not(tmp_path, store, monkeypatch, settles):
    now = [100.0]
    monkeypatch.setattr("batchpipe.journal.time.monotonic", lambda: now[0])
    journal = open_journal(store, str(tmp_path))
    journal.append("split", n=1)
    assert numbers(read_journal(store, str(tmp_path))) == []

    now[0] += 1.0
    if settles:
        journal.append("split", n=2)
    else:
        journal.flush_if_due()

    assert numbers(read_journal(store, str(tmp_path))) == [1, 2][: 1 + settles]


def test_a_late_writer_of_an_older_epoch_is_not_believed(tmp_path, store):
    late = open_journal(store, str(tmp_path))
    late.append("split", n=1)
    late.flush()
    current = open_journal(store, str(tmp_path))
    late.append("split", n=2)
    late.flush()
    current.append("split", n=3)
    current.flush()

    assert numbers(read_journal(store, str(tmp_path))) == [1, 3]
    assert numbers(open_journal(store, str(tmp_path)).replay()) == [1, 3]


def test_a_late_writer_is_not_believed_where_the_journal_was_dropped_and_its_epoch_begun_again(tmp_path, store):
    late = open_journal(store, str(tmp_path))
    late.append("split", n=1)
    late.flush()
    store.remove_folder(str(tmp_path))
    current = open_journal(store, str(tmp_path))
    late.append("split", n=2)
    late.flush()
    current.append("split", n=3)
    current.flush()
    late.append("split", n=4)
    late.flush()

    assert late.epoch == current.epoch
    assert numbers(read_journal(store, str(tmp_path))) == [3]
    assert numbers(open_journal(store, str(tmp_path)).replay()) == [3]


def test_a_journal_that_was_revoked_has_no_entries_whatever_is_removed_or_added(tmp_path, store):
    late = open_journal(store, str(tmp_path))
    late.append("split", n=1)
    late.flush()

    last = revoke_journal(store, str(tmp_path))
    late.append("split", n=2)
    late.flush()

    assert numbers(read_journal(store, str(tmp_path))) == []
    for found in [found for found in store.iter_folder(str(tmp_path)) if found.uri != last]:
        store.delete([found.uri])
        assert numbers(read_journal(store, str(tmp_path))) == []
    assert numbers(open_journal(store, str(tmp_path)).replay()) == []


def test_two_starts_cannot_share_an_epoch(tmp_path, store):
    first = open_journal(store, str(tmp_path))
    second = Journal(store, str(tmp_path), first.epoch, {})
    second.append("split", n=1)

    with pytest.raises(OutputError, match="the lock was lost: another start of this run has written"):
        second.flush()


def test_a_folder_without_a_journal_has_no_entries(tmp_path, store):
    assert list(read_journal(store, str(tmp_path / "none"))) == []
