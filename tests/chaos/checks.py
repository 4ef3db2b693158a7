"""What holds after every run, whatever was done to it: bytes, accounts, quarantine, and nothing left behind."""

import json

from batchpipe.storage import open_store
from batchpipe.verify import verify_output
from tests.chaos.poison import ROWS, TOTAL, Poison
from tests.chaos.scene import Scene


def check(scene: Scene, undisturbed: dict[str, bytes]) -> None:
    """Raise AssertionError unless the run ended as if nothing had been done to it."""
    published = scene.published()
    assert sorted(published) == sorted(undisturbed)
    different = [name for name, data in published.items() if data != undisturbed[name]]
    assert not different, f"other bytes than the undisturbed run's: {different}"
    hidden = scene.hidden()
    check_accounts(hidden, scene.run_id, scene.poison)
    assert quarantined(hidden) == scene.poison.quarantine()
    left = scene.leftovers() + [name for name in hidden if not is_kept(name)]
    assert not left, left
    verify_output(open_store(scene.out, scene.storage_options), scene.out)


def is_kept(name: str) -> bool:
    """Whether a file stays below the hidden folder of a finished output."""
    _, _, rest = name.partition("/")
    return (
        name == "manifest.json"
        or rest in ("run.json", "inputs.jsonl", "parts.jsonl")
        or rest.startswith(("quarantine/", "logs/"))
    )


def check_accounts(hidden: dict[str, bytes], run_id: str, poison: Poison) -> None:
    """Every record of every object is written or quarantined, and is counted once."""
    manifest, bad = json.loads(hidden["manifest.json"]), len(poison)
    assert manifest["accounts"] == {"read": TOTAL, "written": TOTAL - bad, "quarantined": bad, "dropped": 0}
    for line in map(json.loads, hidden[f"{run_id}/inputs.jsonl"].splitlines()):
        name = line["uri"].rpartition("/")[2]
        rows, bad = ROWS[name], poison.of_file(name)
        found = {key: line[key] for key in ("read", "written", "quarantined", "dropped")}
        assert found == {"read": rows, "written": rows - bad, "quarantined": bad, "dropped": 0}, name


def quarantined(hidden: dict[str, bytes]) -> list[tuple[str, int, str]]:
    """Object, record and reason of everything in quarantine."""
    files = [data for name, data in hidden.items() if "/quarantine/" in name]
    lines = [json.loads(line) for data in files for line in data.splitlines()]
    return sorted((line["object"].rpartition("/")[2], line["record"], line["reason"]) for line in lines)
