"""The command line: parse, call, print, exit code. Only click is imported before a verb runs."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import click

from batchpipe.console import Stopped, answer, drop_stdout, report, signals_as_exceptions, tell, working_folder_or_raise

if TYPE_CHECKING:
    from batchpipe.job import Job
    from batchpipe.manifest import Manifest
    from batchpipe.schedule import Progress
    from batchpipe.storage import Store

OK = 0
RESUMABLE = ("run", "redrive")


def main() -> NoReturn:
    """Entry point: run the command line and exit with its code."""
    code = run_command_line(sys.argv[1:])
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed: 2>&-
        with suppress(OSError):
            stream.flush()
    # Everything is released. To take Dask apart object by object would need longer than a small job's splits.
    os._exit(code)


def run_command_line(arguments: list[str]) -> int:
    """Run one command; print errors; return the exit code."""
    try:
        working_folder_or_raise()
        with signals_as_exceptions():
            commands.main(arguments, prog_name="batchpipe", standalone_mode=False)
        return OK
    except Stopped as stopped:
        resumes = "; the same command resumes" if _verb(arguments) in RESUMABLE else ""
        tell(f"stopped by {stopped}: everything is released{resumes}")
        return stopped.exit_code
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except BrokenPipeError:
        drop_stdout()
        return 128 + signal.SIGPIPE  # as of a program that the signal ends
    except Exception as error:  # noqa: BLE001 - the last boundary: nobody is shown a traceback unasked
        return report(error, arguments)


def _verb(arguments: list[str]) -> str:
    return next((argument for argument in arguments if not argument.startswith("-")), "")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="batchpipe")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of unexpected errors.")
def commands(verbose: bool) -> None:  # `report` looks for it in the arguments, as it does for --json
    """Run a dataset through a chain of stages: outputs, a manifest, and all compute given back."""


def _job_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key, such as output.uri=..."
        ),
        click.option(
            "--var", "variables", multiple=True, metavar="NAME=VALUE", help="Give ${NAME} of the job file a value."
        ),
        click.argument("job", metavar="JOB", type=click.Path()),
    ):
        command = option(command)
    return command


def _load(job: str, variables: tuple[str, ...], settings: tuple[str, ...], workers: int | None = None) -> "Job":
    from batchpipe.jobfile import load_job

    if workers is not None:
        settings = (*settings, f"compute.workers={workers}")
    return load_job(job, set=settings, vars=_pairs(variables, "--var"))


def _pairs(given: tuple[str, ...], option: str) -> Mapping[str, str]:
    wrong = [each for each in given if "=" not in each]
    if wrong:
        raise click.UsageError(f"{option} takes NAME=VALUE, not {wrong[0]!r}")
    return dict(each.split("=", 1) for each in given)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `run` and `redrive` share."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of unexpected errors."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        click.option(
            "--progress", type=click.Choice(["auto", "bar", "log", "none"]), default="auto", help="On stderr."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON object."),
        click.option("--workers", type=click.IntRange(1), metavar="N", help="Workers, in place of compute.workers."),
        click.option(
            "--wait",
            "wait_s",
            type=float,
            default=0.0,
            metavar="S",
            help="Seconds to wait for another run in the output.",
        ),
        click.option(
            "--restart", is_flag=True, help="Begin anew: drop an unfinished run in the output, or one with lost parts."
        ),
    ):
        command = option(command)
    return command


@commands.command()
@_job_options
@click.option("--run-id", help="The run's id; by default it follows from the job and its inputs.")
@_run_options
def run(**options: Any) -> None:
    """Run a job, or resume it; a no-op if it is done."""
    from pathlib import Path

    from batchpipe.runner import run_job
    from batchpipe.summary import summarize

    job, manifest, moved = _run(run_job, options)
    redrive = _as_typed(job, options, "redrive")
    _print_result(manifest, options, summarize(manifest, Path.cwd(), was_done=not moved, redrive=redrive))


@commands.command()
@_job_options
@click.option("--run-id", help="The run to redrive, where output.uri has ${run_id} in it.")
@_run_options
def redrive(**options: Any) -> None:
    """Send the quarantined records of a finished run through the job as it is now, or resume that."""
    from pathlib import Path

    from batchpipe.runner import redrive_job
    from batchpipe.summary import summarize

    job, manifest, moved = _run(redrive_job, options)
    if moved or manifest.accounts.quarantined:
        text = summarize(manifest, Path.cwd(), was_done=not moved, redrive=_as_typed(job, options, "redrive"))
    else:
        text = f"{manifest.name} {manifest.run_id}: no record is quarantined, nothing to redrive"
    _print_result(manifest, options, text)


def _run(function: Callable[..., "Manifest"], options: Mapping[str, Any]) -> tuple["Job", "Manifest", bool]:
    """Run a job by `run_job` or `redrive_job`; the job, its manifest, and whether anything had to be done for it."""
    from batchpipe.progress import open_progress
    from batchpipe.redact import mask, secrets_of

    job = _load(options["job"], options["variables"], options["settings"], options["workers"])
    command = mask(_command_line(), secrets_of(job))
    given = {name: options[name] for name in ("run_id", "restart", "wait_s")}
    steps = set()
    with open_progress("none" if options["quiet"] else options["progress"], command) as show:

        def watch(progress: "Progress") -> None:
            steps.add(progress.step)
            show(progress)

        return job, function(job, **given, on_progress=watch), bool(steps)


def _print_result(manifest: "Manifest", options: Mapping[str, Any], text: str) -> None:
    if options["as_json"]:
        answer(manifest.model_dump_json())
    elif not options["quiet"]:
        answer(text)


def _as_typed(job: "Job", options: Mapping[str, Any], verb: str) -> str:
    """The command that does `verb` with the job as it was typed, with secrets masked."""
    import shlex

    from batchpipe.redact import mask, secrets_of

    same = [f"--var={each}" for each in options["variables"]] + [f"--set={each}" for each in options["settings"]]
    return mask(shlex.join(["batchpipe", verb, options["job"], *same]), secrets_of(job))


def _command_line() -> str:
    import shlex

    return shlex.join(["batchpipe", *(argument for argument in sys.argv[1:] if argument != "--restart")])


@commands.command()
@_job_options
def plan(job: str, variables: Any, settings: Any) -> None:
    """Show what a job would read and how it would be cut, without running it."""
    from batchpipe.preflight import plan_job
    from batchpipe.summary import describe_plan

    loaded = _load(job, variables, settings)
    with plan_job(loaded) as (planned, run_id):
        answer(describe_plan(planned, loaded, run_id))


@commands.command()
@_job_options
def check(job: str, variables: Any, settings: Any) -> None:
    """Try everything a run needs, one mini-batch included, and leave nothing behind."""
    from batchpipe.preflight import check_job

    for line in check_job(_load(job, variables, settings)):
        answer(line)


def _output_argument(command: Callable[..., None]) -> Callable[..., None]:
    argument = click.argument("output", metavar="OUTPUT", type=click.Path())
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON object.")
    return argument(as_json(command))


def _open_output(output: str) -> tuple["Store", str]:
    """The store and folder of an output: a folder or URL, or the job file that names it."""
    from batchpipe.storage import open_store, resolve

    if output.endswith((".yaml", ".yml", ".json")):
        spec = _load(output, (), ()).output
        return open_store(spec.uri, spec.storage_options), spec.uri
    return open_store(output), resolve(output)


def _print_manifest(manifest: "Manifest", as_json: bool, head: str) -> None:
    from pathlib import Path

    from batchpipe.summary import summarize

    if as_json:
        answer(manifest.model_dump_json())
    else:
        answer(head + summarize(manifest, Path.cwd()))


@commands.command()
@_output_argument
def show(output: str, as_json: bool) -> None:
    """Show the manifest of OUTPUT: a folder, a URL, or the job file that names it."""
    from batchpipe.verify import load_manifest

    _print_manifest(load_manifest(*_open_output(output)), as_json, "")


@commands.command()
@_output_argument
def verify(output: str, as_json: bool) -> None:
    """Read OUTPUT again and compare every checksum and count with its manifest."""
    from batchpipe.verify import verify_output

    _print_manifest(verify_output(*_open_output(output)), as_json, "verified: every part is as it was published\n")


def _note(text: str) -> None:
    tell(f"note: {text}")


@commands.command()
@click.argument("output", required=False, type=click.Path())
def ps(output: str | None) -> None:
    """List what runs hold on this host, and in OUTPUT: containers, scratch folders, unfinished runs, pending pieces."""
    from batchpipe.leftovers import find_in_output, find_on_host

    held = [*find_on_host(_note), *(find_in_output(*_open_output(output)) if output else [])]
    for found in held:
        answer(str(found))
    if not held:
        answer("nothing held")


@commands.command()
@click.argument("output", required=False, type=click.Path())
@click.option(
    "--unfinished",
    is_flag=True,
    help="Drop unfinished runs of OUTPUT too, or finish one that has begun to publish; they stay otherwise.",
)
def clean(output: str | None, unfinished: bool) -> None:
    """Remove what nobody owns any more, as a power cut leaves it: on this host, and in OUTPUT."""
    from batchpipe.leftovers import clean_host, clean_output

    removed = clean_host(_note)
    if output:
        removed += clean_output(*_open_output(output), drops_unfinished=unfinished, note=_note)
    for found in removed:
        answer(f"removed {found}")
    if not removed:
        answer("nothing to clean")


@commands.command()
@click.argument("reference", metavar="MODULE:ATTRIBUTE")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A keyword argument, as in YAML.")
@click.option("--columns", default="", metavar="A,B,...", help="Names of the fields of CSV without a header.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads that may call it at once.")
@click.option("--host", help="The address to listen on; 127.0.0.1, but all of them as an image that is told to serve.")
@click.argument("contract", required=False, type=click.Choice(["serve"]), metavar="")
def serve(
    reference: str, params: tuple[str, ...], columns: str, threads: int, host: str | None, contract: str | None
) -> None:
    """Serve a callable as a stage: /ping, /execution-parameters and /invocations.

    The port is that of the environment variable SAGEMAKER_BIND_TO_PORT, 8080 where it is not set; the largest request
    has SAGEMAKER_MAX_PAYLOAD_IN_MB, 100 by default. A run sets the port of its stages itself.
    """
    import yaml

    from batchpipe.serve import EVERYWHERE, LOOPBACK
    from batchpipe.serve import serve as serve_callable

    host = host or (EVERYWHERE if contract else LOOPBACK)  # engines append `serve` to an image's command

    try:
        values = {name: yaml.safe_load(value) for name, value in _pairs(params, "--param").items()}
    except yaml.YAMLError as error:
        raise click.UsageError(
            f"--param takes a value as in YAML, with quotes around text that is none: {error}"
        ) from error
    names = [name for name in columns.split(",") if name]
    serve_callable(reference, values, names, threads=threads, host=host, say=tell)


@commands.command()
@click.argument("document", type=click.Choice(["job", "manifest"]), default="job")
def schema(document: str) -> None:
    """Print the JSON Schema of job files, for editors, or of the manifest."""
    from batchpipe.jobfile.schema import job_schema
    from batchpipe.manifest import manifest_schema

    answer(json.dumps(job_schema() if document == "job" else manifest_schema(), indent=2))
