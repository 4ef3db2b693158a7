"""`python -m tests.chaos`, which `make chaos` runs: plays the episodes, prints the table, exits 1 if anything broke."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.faults import FAULTS, POISON
from tests.chaos.setting import lacks, open_setting
from tests.chaos.suite import Played, deal, play_all
from tests.chaos.table import to_table
from tests.jobs import hear_signals


def main() -> int:
    hear_signals()
    arguments, began = parse(), time.monotonic()
    episodes = deal(arguments.seed, arguments.faults, arguments.only)
    if arguments.episode is not None:
        episodes = [episodes[arguments.episode]]
    lacking = {kind: why for kind in {each.scene for each in episodes} if (why := lacks(kind))}
    for kind, why in lacking.items():
        print(f"left out: {kind}, which needs {why}")
    episodes = [each for each in episodes if each.scene not in lacking]
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, open_setting(Path(folder)) as setting:
        played = []
        for each in play_all(setting, arguments.seed, episodes, arguments.at_once):
            tell(each)
            played.append(each)
        released_s = sorted(setting.released_s)
    minutes = (time.monotonic() - began) / 60
    print(f"\nseed {arguments.seed}: {len(played)} runs, {len(released_s)} starts, {minutes:.0f} minutes\n")
    if released_s:
        print(f"released after {released_s[len(released_s) // 2]:.1f} s (median), {released_s[-1]:.1f} s (longest)\n")
    print(to_table(played))
    return int(any(each.failed for each in played))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what is done follows from it alone (1)")
    parser.add_argument("--faults", type=int, default=200, help="inject at least so many (200)")
    kinds = [fault.kind for fault in FAULTS] + [*POISON]
    parser.add_argument("--only", default="", choices=kinds, metavar="KIND", help=f"one of: {', '.join(kinds)}")
    parser.add_argument("--at-once", type=int, default=1, help="episodes that are played side by side (1)")
    parser.add_argument("--episode", type=int, help="play only this one of the run, with the same other arguments")
    return parser.parse_args()


def tell(played: Played) -> None:
    episode = played.episode
    what = ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in played.tried.items())
    state = "FAILED" if played.failed else "ok"
    print(f"episode {episode.number:3} {episode.scene:10} {played.seconds:5.1f} s  {state:6}  {what}", flush=True)
    if played.failed:
        print(played.failed, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
