"""Looking before leaping: what a run would do (`plan`), and whether it could (`check`). Both leave nothing behind."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from uuid import uuid4

from batchpipe.errors import RecordsFailedError
from batchpipe.failures import first_failed, is_beyond_records, too_many_failed
from batchpipe.fingerprint import make_fingerprint
from batchpipe.job import Job, supported_or_raise
from batchpipe.jobfile import fill_run_id
from batchpipe.numbering import line_of, object_of
from batchpipe.orders import HIDDEN, TRIAL, Orders, Place, Schemas
from batchpipe.plan import Plan, list_inputs, make_plan
from batchpipe.probe import Unproved, probe
from batchpipe.processes import open_host
from batchpipe.redact import clean_uri
from batchpipe.run import PROBED_AT_ONCE
from batchpipe.runs import RunFolder
from batchpipe.schedule import Tally
from batchpipe.split import isolated
from batchpipe.storage import join, open_store
from batchpipe.summary import count
from batchpipe.worker_chain import close_worker_chain

NO_CONDITIONAL_PUT = ", but the store overwrites when told not to: two runs at once are not kept apart there"


@contextlib.contextmanager
def plan_job(job: Job) -> Iterator[tuple[Plan, str]]:
    """What a run would do and the run id it would have. The plan can be read inside the block."""
    supported_or_raise(job)
    with open_host() as host:
        inputs = list_inputs(job.input, host.scratch)
        yield make_plan(inputs, job), make_fingerprint(job, inputs, pulls=False).run_id


def check_job(job: Job) -> Iterator[str]:
    """Try all that a run needs, in this process: list, read, write, open the stages, one mini-batch; a line for each.

    Leaves nothing. Raises what a run would raise.
    """
    with plan_job(job) as (plan, run_id):
        job = fill_run_id(job, run_id)
        objects, splits = count(plan.inputs.count, "object"), count(plan.count, "split")
        yield f"input     {objects}, {plan.inputs.bytes:,} bytes, {splits}"
        store = open_store(job.output.uri, job.output.storage_options)
        is_safe = store.supports_conditional_put(join(job.output.uri, HIDDEN))
        yield f"output    {clean_uri(job.output.uri)} can be written" + ("" if is_safe else NO_CONDITIONAL_PUT)
        # A run id of its own, so that what it must write is told from what a run has written.
        place = Place(job, f"{TRIAL}{uuid4().hex[:8]}", "part-", "check")
        orders = Orders(place, Schemas())
        try:
            # In child processes: a record that kills must not end this process, which no worker stands for.
            found = probe(isolated(islice(plan, PROBED_AT_ONCE)), orders, is_all=True, is_strict=True)
        finally:
            close_worker_chain(place.run_id)
            store.remove_folder(RunFolder(job.output.uri, place.run_id).uri)
        if isinstance(found, Unproved):
            raise _failed(job, found, plan)
        yield f"stages    {', '.join(stage.name for stage in job.stages)}: opened, one mini-batch went through"
        if found.output is not None:
            yield "columns   " + ", ".join(f"{field.name}: {field.type}" for field in found.output)


def _failed(job: Job, found: Unproved, plan: Plan) -> RecordsFailedError:
    accounts, failures = found.result.accounts, found.result.failures
    is_hopeless = found.is_hopeless or not is_beyond_records(job.on_error, accounts.quarantined)
    named = found.at_fault if is_hopeless else failures[0]
    lies_in = object_of(named, plan.inputs)
    line = line_of(lies_in, named.offset, job.input) if lies_in else None
    if is_hopeless:
        return first_failed(job, named, line)
    tally = Tally(splits=plan.count, accounts=accounts, failures=list(failures))
    return too_many_failed(job, tally, line=line)
