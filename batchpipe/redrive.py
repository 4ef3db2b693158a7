"""A redrive: the quarantined records of a finished run, through the present job file, as a run of its own.

Here is what it reads of that run: its settings, its columns, which records failed and in which objects these lie.
What runs, journals and publishes them is what runs any job; a split of a redrive is picks of objects.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from batchpipe.claim import finished_run
from batchpipe.errors import InputError, JobError, OutputError
from batchpipe.fingerprint import Fingerprint
from batchpipe.formats.lines import is_seekable_text
from batchpipe.job import Job, fingerprint_document
from batchpipe.jobfile import fill_run_id
from batchpipe.jobfile.variables import RUN_ID
from batchpipe.manifest import Accounts, Failure, Input, Manifest, RunAccounts
from batchpipe.orders import Schemas
from batchpipe.plan import LARGEST_SPLIT, MAX_OBJECTS_PER_SPLIT, SPLITS_NEEDED, Inputs
from batchpipe.publication import INPUTS
from batchpipe.published import read_description
from batchpipe.quarantine import read_failures
from batchpipe.redact import clean_uri
from batchpipe.runs import RunFolder
from batchpipe.split import InputObject, Picks, Split, find_object, pick
from batchpipe.storage import Store, open_store
from batchpipe.tables import iter_table

_COMPARED = ("input", "output")
FEWEST_PICKS = 256
MOST_PICKS = 10_000
"""How many records a split of a redrive holds: a description of them is sent to its worker."""

_Failed: TypeAlias = tuple[str, str, int, int]
"""Object, version, record and first byte of a quarantined record."""
_Picked: TypeAlias = tuple[list[Any], list[int], list[int]]
"""An object's fields, and its picks."""


@dataclass(frozen=True, slots=True)
class Redriven:
    """The finished run that a redrive goes on from: its manifest, and the columns that it proved."""

    manifest: Manifest
    schemas: Schemas
    folder: RunFolder
    store: Store
    listing: dict[str, Any]
    """The inputs of the run that all began with, as its fingerprint has them."""

    @property
    def run_id(self) -> str:
        """The redrive's own id: of the run that all began with, and the redrive's number."""
        return f"{self.manifest.generations[0].run_id}-redrive-{self.number}"

    @property
    def number(self) -> int:
        """1 for the first redrive of a run."""
        return len(self.manifest.generations)

    def fingerprint_of(self, mended: Fingerprint) -> Fingerprint:
        """That of the job as it is now over all inputs of the run: what `run` would find, so that it is done then.

        It need not tell the objects that are redriven: the quarantine does, and they are as they were.
        """
        return Fingerprint({**mended.document, "inputs": self.listing})

    def among(self, listed: Iterable[InputObject]) -> "Redriven":
        """The same, with the record that the run showed to be answered in its object as it is listed now, if it is."""
        if (answered := self.schemas.answered) is None:
            return self
        found = find_object(listed, answered.object.shown, answered.object.version)
        known = replace(answered, object=found) if found else None
        return replace(self, schemas=replace(self.schemas, answered=known))

    def accounts_with(self, new: Accounts) -> RunAccounts:
        """The accounts of the run and its redrive together."""
        return RunAccounts(**asdict(_together(self.manifest.accounts, new)))

    def inputs_with(self, inputs: Iterable[InputObject], of_object: Callable[[int], Accounts]) -> Iterator[Input]:
        """The input objects of the run, with what became of the records that are redriven."""
        redriven = iter(inputs)
        found = next(redriven, None)
        for line in iter_table(self.store, self.folder / INPUTS):
            row = Input.model_validate_json(line)
            if found and row.uri == found.shown:
                row = row.model_copy(update=asdict(_together(row, of_object(found.index))))
                found = next(redriven, None)
            yield row


def _together(before: RunAccounts | Input, new: Accounts) -> Accounts:
    return Accounts(before.read, before.written + new.written, new.quarantined, before.dropped + new.dropped)


def find_finished(job: Job, run_id: str | None, wait_s: float) -> tuple[Manifest, bool]:
    """The finished run in the job's output, and whether there is nothing left to do.

    There is not where nothing is quarantined, and where this was a redrive that had begun to publish and does not any
    more. Raises OutputError (7) where no run is finished, JobError (2) where it is not the run that is named.
    """
    if run_id is None and RUN_ID in job.output.uri:
        msg = "output.uri has the run id in it, and a redrive cannot know it"
        raise JobError(msg, where=str(job.path), next="name the run that is to be redriven: --run-id")
    if run_id is not None:
        job = fill_run_id(job, run_id)
    manifest, is_late = finished_run(job, wait_s)
    where = clean_uri(job.output.uri)
    if manifest is None:
        next_ = f"finish one first: {job.command('run')}"
        raise OutputError("there is no finished run whose records could be redriven", where=where, next=next_)
    first = manifest.generations[0].run_id
    if run_id not in (None, first):
        raise JobError(f"the output holds run {first}, and not {run_id}", where=where, next=f"--run-id {first}")
    return manifest, not manifest.accounts.quarantined or (is_late and manifest.is_redriven)


def open_redriven(job: Job, manifest: Manifest) -> Redriven:
    """Read what a redrive must know of a finished run; `job` still has the run id to be filled in.

    Raises JobError (2) where the job's input or output is another than the run's: its records would be others.
    """
    output = fill_run_id(job, manifest.generations[0].run_id).output
    store, folder = open_store(output.uri, output.storage_options), RunFolder(output.uri, manifest.run_id)
    document, schemas = read_description(store, folder.root, manifest)
    mine, theirs = (
        {key: each.get(key, {}) for key in _COMPARED} for each in (fingerprint_document(job), document["job"])
    )
    if changes := Fingerprint(mine).differences(theirs):
        msg = f"a redrive reads and writes as run {manifest.run_id} did, and the job does not" + "".join(
            f"\n  changed: {change}" for change in changes[:5]
        )
        raise JobError(msg, where=str(job.path), next="undo the change; or run the job into another output.uri")
    return Redriven(manifest, Schemas.from_json(schemas), folder, store, document["inputs"])


@dataclass(frozen=True, slots=True)
class RedrivePlan:
    """The splits of a redrive: iterate for them, in order. `inputs` are the objects with quarantined records."""

    inputs: Inputs
    spool: Path
    count: int
    split_bytes: None = None
    """Its splits are filled by what was quarantined."""

    def __iter__(self) -> Iterator[Split]:
        with self.spool.open() as lines:
            for index, line in enumerate(lines):
                yield Split(index, tuple(pick(InputObject(*place), *picks) for place, *picks in json.loads(line)))


def plan_redrive(job: Job, redriven: Redriven, listed: Inputs, scratch: Path) -> RedrivePlan:
    """Find the quarantined records of a run in the objects that are listed now, and put them into splits.

    Raises InputError (3) where an object is gone or has changed, OutputError (7) where the quarantine has.
    """
    spool, inputs, wanted = scratch / "picks.spool", scratch / "redriven.spool", redriven.manifest.accounts.quarantined
    most, count, picked = min(max(wanted // SPLITS_NEEDED, FEWEST_PICKS), MOST_PICKS), 0, 0
    with inputs.open("w") as lines, spool.open("w") as splits:
        for split in _pack(_list(_matched(redriven, listed), redriven.number, lines), job, most):
            splits.write(json.dumps(split) + "\n")
            count, picked = count + 1, picked + sum(len(records) for _, records, _ in split)
    if picked != wanted:
        run = redriven.manifest.run_id
        msg = f"the quarantine of run {run} holds {picked:,} records, and its manifest says {wanted:,}"
        raise OutputError(msg, where=clean_uri(redriven.folder / "quarantine"), next="put back what was changed there")
    return RedrivePlan(_inputs_of(inputs), spool, count)


def _iter_failed(redriven: Redriven) -> Iterator[_Failed]:
    """The quarantined records in the order of the input; memory is that of one split's."""
    store = redriven.store
    for uri in sorted(found.uri for found in store.iter_folder(redriven.folder / "quarantine")):
        yield from sorted(_place_of(failure, uri) for failure in read_failures(store, uri))


def _place_of(failure: Failure, uri: str) -> _Failed:
    if failure.record is None and failure.offset < 0:
        msg = f"a quarantined record of {failure.object!r} cannot be found again: nothing tells its place"
        hint = "pieces of its run were removed while it was unfinished: run the job again into another output.uri"
        raise OutputError(msg, where=uri, next=hint)
    return failure.object, failure.version, -1 if failure.record is None else failure.record, failure.offset


def _matched(redriven: Redriven, listed: Iterable[InputObject]) -> Iterator[tuple[InputObject, Picks]]:
    """Each object with quarantined records, as it is listed now; both are in order."""
    objects = iter(listed)
    for (uri, version), failed in groupby(_iter_failed(redriven), key=itemgetter(0, 1)):
        picks = Picks(array("q"), array("q"))
        for _, _, record, offset in failed:
            picks.records.append(record)
            picks.offsets.append(offset)
        found = next((one for one in objects if one.shown == uri), None)
        if found is None or found.version != version:
            count = (
                f"{len(picks):,} of whose records are quarantined"
                if len(picks) > 1
                else "a record of which is quarantined"
            )
            what = "is gone" if found is None else "has changed"
            msg = f"input object {uri!r}, {count}, {what} since run {redriven.manifest.run_id}"
            raise InputError(msg, where=uri, next="put it back as it was; or run the job again into another output.uri")
        yield found, picks


def _list(
    matched: Iterable[tuple[InputObject, Picks]], number: int, lines: TextIO
) -> Iterator[tuple[InputObject, Picks]]:
    """Write down the objects as the inputs of the redrive, in order."""
    for index, (found, picks) in enumerate(matched):
        # Under mirror its answers are another object beside those of the run, and named like it.
        one = replace(found, index=index, name=f"{found.name}.redrive-{number}")
        lines.write(json.dumps([one.uri, one.size, one.version, one.name]) + "\n")
        yield one, picks


def _inputs_of(spool: Path) -> Inputs:
    digest, count, size = hashlib.sha256(), 0, 0
    with spool.open("rb") as lines:
        for line in lines:
            digest.update(line)
            count, size = count + 1, size + json.loads(line)[1]
    return Inputs(spool, count, size, digest.hexdigest())


def _pack(objects: Iterable[tuple[InputObject, Picks]], job: Job, most: int) -> Iterator[list[_Picked]]:
    """Put picks into splits of about `most` records: what must be read from its beginning is cut less often.

    An object in several splits shares none of them with another, as in every plan. Under `layout: mirror` each has one.
    """
    waiting, filled = list[_Picked](), 0.0
    for found, picks in objects:
        is_cut = job.input.format == "parquet" or is_seekable_text(found, job.input)
        place, step = list(astuple(found)), most if is_cut else MOST_PICKS
        alone = job.output.layout == "mirror" or len(picks) > step
        step = len(picks) if job.output.layout == "mirror" else step
        share = max(len(picks) / most, found.size / LARGEST_SPLIT if job.input.format == "object" else 0)
        if waiting and (alone or filled + share > 1 or len(waiting) >= MAX_OBJECTS_PER_SPLIT):
            yield waiting
            waiting, filled = [], 0.0
        some = [
            (place, picks.records[start : start + step].tolist(), picks.offsets[start : start + step].tolist())
            for start in range(0, len(picks), step)
        ]
        if alone:
            yield from ([each] for each in some)
        else:
            waiting, filled = waiting + some, filled + share
    if waiting:
        yield waiting
