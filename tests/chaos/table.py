"""What was tried and what survived, as the Markdown table of docs/reliability.md."""

from collections import Counter

from tests.chaos.faults import FAULTS, POISON
from tests.chaos.suite import Played


def to_table(played: list[Played]) -> str:
    """Kind of fault x tried x survived; a fault has survived if all checks of its run have held."""
    tried, survived = Counter[str](), Counter[str]()
    for each in played:
        tried += each.tried
        survived += each.tried if not each.failed else Counter()
    kinds = [kind for kind in (*(fault.kind for fault in FAULTS), *POISON) if tried[kind]]
    rows = [(kind if kind not in POISON else f"poison record: {kind}", tried[kind], survived[kind]) for kind in kinds]
    rows.append(("**all**", tried.total(), survived.total()))
    width = max(len(kind) for kind, _, _ in rows)
    lines = [f"| {kind:{width}} | {count:5} | {well:8} |" for kind, count, well in rows]
    return "\n".join([f"| {'fault':{width}} | tried | survived |", f"|{'-' * (width + 2)}|------:|---------:|", *lines])
