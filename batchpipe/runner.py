"""`run_job`: what `batchpipe run` and the Python interface do, as a list of steps.

What takes long to import is imported inside, after the first worker process has begun its own imports.
"""

from typing import TYPE_CHECKING

from batchpipe.job import Job, supported_or_raise
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
    with open_host(job.compute) as host:
        from batchpipe.output import open_output
        from batchpipe.plan import list_inputs, make_fingerprint, make_plan
        from batchpipe.run import Run, sweeping_if_killed

        inputs = list_inputs(job.input, host.scratch)
        fingerprint = make_fingerprint(job, inputs)
        run_id = run_id or fingerprint.sha256[:8]
        job = fill_run_id(job, run_id)
        with open_output(job, run_id, fingerprint, host.scratch, restart=restart, wait_s=wait_s) as output:
            if output.manifest:
                return output.manifest
            with sweeping_if_killed(output, host.watcher):
                run = Run(job, run_id, make_plan(inputs, job), output, on_progress)
                run.transform(host)
                run.show("publish")
                manifest = run.publish(inputs)
                run.show("done")
                return manifest
