"""`run_job` and `redrive_job`: what the command line and the Python interface do, as lists of steps.

What takes long to import is imported inside, after the first worker process has begun its own imports.
"""

from typing import TYPE_CHECKING

from batchpipe.job import Job, run_id_or_raise, supported_or_raise
from batchpipe.jobfile import fill_run_id
from batchpipe.processes import open_host
from batchpipe.schedule import OnProgress, ignore

if TYPE_CHECKING:
    from batchpipe.manifest import Manifest


def run_job(
    job: Job,
    *,
    run_id: str | None = None,
    on_progress: OnProgress = ignore,
    restart: bool = False,
    wait_s: float = 0.0,
) -> "Manifest":
    """Read, transform, write, prove, publish; give all compute back on every path.

    Without a `run_id` it follows from the job and its inputs, so that running again resumes what is unfinished and
    is a no-op for what is done. Raises a BatchpipeError, whose `exit_code` is the command's.
    """
    supported_or_raise(job)
    if run_id is not None:
        run_id_or_raise(run_id)
    with open_host(job.compute) as host:
        from batchpipe.claim import open_output
        from batchpipe.fingerprint import make_fingerprint
        from batchpipe.plan import list_inputs, make_plan
        from batchpipe.run import Run
        from batchpipe.sweep import sweeping_if_killed

        inputs = list_inputs(job.input, host.scratch)
        fingerprint = make_fingerprint(job, inputs)
        job = _told_run_id(job, run_id)
        run_id = run_id or fingerprint.run_id
        job = fill_run_id(job, run_id)
        with open_output(job, run_id, fingerprint, host.scratch, restart=restart, wait_s=wait_s) as output:
            if output.manifest:
                return output.manifest
            with sweeping_if_killed(output.folder, job.output.storage_options, host.watcher):
                plan = make_plan(inputs, job, output.begun.get("split_bytes"))
                return Run(job, run_id, plan, output, on_progress).finish(host)


def redrive_job(
    job: Job,
    *,
    run_id: str | None = None,
    on_progress: OnProgress = ignore,
    restart: bool = False,
    wait_s: float = 0.0,
) -> "Manifest":
    """Send the quarantined records of the finished run in the job's output through the job, and publish both as one.

    `run_id` is that run's, where the output's name has it in it. With nothing quarantined there is nothing to do.
    Raises a BatchpipeError, whose `exit_code` is the command's: JobError (2) where the job reads or writes otherwise
    than the run did, InputError (3) where an object with quarantined records has changed, OutputError (7) where no run
    is finished.
    """
    supported_or_raise(job)
    if run_id is not None:
        run_id_or_raise(run_id)
    with open_host(job.compute) as host:
        from batchpipe.claim import open_output
        from batchpipe.fingerprint import make_fingerprint
        from batchpipe.plan import list_inputs
        from batchpipe.redrive import find_finished, open_redriven, plan_redrive
        from batchpipe.run import Run
        from batchpipe.sweep import sweeping_if_killed

        finished, is_done = find_finished(job, run_id, wait_s)
        if is_done:
            return finished
        redriven = open_redriven(job, finished)
        listed = list_inputs(job.input, host.scratch)
        redriven = redriven.among(listed)
        plan = plan_redrive(job, redriven, listed, host.scratch)
        fingerprint = redriven.fingerprint_of(make_fingerprint(job, plan.inputs))
        job = fill_run_id(_told_run_id(job, run_id), finished.generations[0].run_id)
        with open_output(
            job, redriven.run_id, fingerprint, host.scratch, restart=restart, wait_s=wait_s, redrives=finished
        ) as output:
            if output.manifest:
                return output.manifest
            with sweeping_if_killed(output.folder, job.output.storage_options, host.watcher):
                return Run(job, redriven.run_id, plan, output, on_progress, redriven).finish(host)


def _told_run_id(job: Job, run_id: str | None) -> Job:
    """The job, whose commands name the run id where it was given: it follows from nothing else."""
    return job.with_options(("--run-id", run_id)) if run_id else job
