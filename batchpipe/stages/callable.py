"""A stage that is a Python callable: a function, or a class constructed once per worker, on a thread of its own."""

import asyncio
import difflib
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from batchpipe import convert
from batchpipe.batch import ByteRecords, Records
from batchpipe.content import ContentError
from batchpipe.errors import JobError, StageStartError
from batchpipe.redact import mask, secrets_at_work
from batchpipe.stages import Answer, InvocationFailed, Remedy, sender_of, watchdog
from batchpipe.stages.logs import is_user_code
from batchpipe.stages.tables import can_be_table, to_table

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


class CallableStage:
    """An open callable. Entered by one dedicated thread, never twice at once, unless the job says `thread_safe`."""

    def __init__(
        self,
        stage: "StageSpec",
        function: Callable[..., Any],
        kind: convert.Kind,
        *,
        sender: str,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.name = stage.name
        self.concurrency = threads._max_workers  # the executor has no public word for it
        self.is_exclusive = self.concurrency == 1
        self.takes_table = kind.is_tabular
        self.takes_frames = kind in (convert.Kind.DATAFRAME, convert.Kind.UNSTATED)
        self.hands_on_frames = False
        """Set where the next stage takes DataFrames too: they then pass from one to the other as they are."""
        self._function = function
        self._kind = kind
        self._sender = sender
        self._may_drop = stage.may_drop
        self._timeout_s = stage.invocations_timeout_s
        self._threads = threads

    def takes_one(self, records: Records) -> bool:  # noqa: ARG002 - as HTTP stages have it
        """No: a callable is called with a mini-batch as it comes."""
        return False

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:  # noqa: ARG002 - as HTTP stages have it
        """Call the function with the records in the shape its annotation asks for."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, records)

    def call(self, records: Records) -> Answer:
        """Call the function and wait: what `invoke` does, for who has no event loop."""
        return self._threads.submit(self._call, records).result()

    def close(self) -> None:
        """Give the thread back; a call that is still running keeps it until the call ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _call(self, records: Records) -> Answer:
        count = len(records)
        try:
            argument = self._argument(records)
            with watchdog.within(self._timeout_s):
                result = self._function(argument)
        except BaseException as error:  # noqa: BLE001 - the boundary to user code; Rust's panics are no Exception
            raise self._failed(error) from None
        kept = None
        if self._may_drop:
            result, kept = self._split_result(result, count)
        return self._answer(result, count, kept)

    def _argument(self, records: Records) -> Any:
        try:
            return convert.to_argument(self._parsed(records), self._kind)
        except TypeError as error:
            raise TypeError(f"stage {self.name!r} {error}; they come from {self._sender}") from error
        except ContentError as error:
            raise ContentError(f"{error}; it comes from {self._sender}") from error

    def _parsed(self, records: Records) -> Records:
        """Text that an HTTP stage answered as a table, where the callable takes one."""
        if self.takes_table and isinstance(records, ByteRecords) and can_be_table(records):
            return to_table(records)
        return records

    def _split_result(self, result: Any, count: int) -> tuple[Any, Any]:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._broken(f"must return (result, kept), as may_drop is set, not {_describe(result)}")
        kept = np.asarray(result[1])
        if kept.dtype != np.bool_ or kept.shape != (count,):
            have = f"{kept.dtype} of shape {kept.shape}"
            raise self._broken(f"must return kept as {count} booleans, one for each record sent, not {have}")
        return result[0], kept

    def _answer(self, result: Any, count: int, kept: Any) -> Answer:
        expected = count if kept is None else int(kept.sum())
        try:
            records = convert.from_answer(result, keeps_frame=self.hands_on_frames)
        except TypeError as error:
            raise self._broken(str(error)) from error
        except Exception as error:  # values that no one type holds: halves may be of one each
            reason, where = type(error).__name__, _defined_at(self._function)
            raise InvocationFailed(reason, _text_of(error), Remedy.ISOLATE, location=where) from error
        if len(records) != expected:
            what = "sent" if kept is None else "kept"
            may_drop = "; to drop records state may_drop: true and return (result, kept)"
            advice = may_drop if kept is None and len(records) < expected else ""
            raise self._broken(f"answered {len(records):,} records for {expected:,} {what}{advice}")
        if kept is None and convert.index_was_reordered(result, count):
            raise self._broken(f"answered {count:,} records with their index in another order: answers go by place")
        return Answer(records, kept)

    def _failed(self, error: BaseException) -> InvocationFailed:
        remedy = Remedy.RETRY if getattr(error, "retry", False) is True else Remedy.ISOLATE
        return InvocationFailed(
            type(error).__name__,
            _text_of(error),
            remedy,
            location=user_location(error),
            traceback=_printable("".join(traceback.format_exception(error))),
        )

    def _broken(self, message: str) -> InvocationFailed:
        """Halving would find no record to blame, and might find halves that pass by accident (G8)."""
        text = f"stage {self.name!r} {message}"
        return InvocationFailed("WrongAnswer", text, Remedy.NONE, location=_defined_at(self._function))


def _text_of(error: BaseException) -> str:
    """What an exception of user code says, fit for a file of UTF-8; its class where it cannot even say that."""
    try:
        return _printable(str(error))
    except Exception:  # noqa: BLE001 - user code, too
        return f"({type(error).__name__} cannot be shown as text)"


def _printable(text: str) -> str:
    """Lone surrogates, which no file of UTF-8 takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def open_callable(stage: "StageSpec", job: "Job") -> CallableStage:
    """Import the callable and construct it if it is a class.

    Raises JobError (2) where it cannot be imported and StageStartError (4) where its constructor raises, or params
    do not fit.
    """
    assert stage.callable is not None
    target = import_callable(stage.callable, job.import_folders, stage.name)
    concurrency = stage.max_concurrent_transforms or job.batch.max_concurrent_transforms or 1
    threads = ThreadPoolExecutor(concurrency if stage.thread_safe else 1, thread_name_prefix=f"stage {stage.name}")
    # Constructed on the thread that will call it: some libraries bind to the thread they start on.
    constructing = threads.submit(_construct, target, stage.params)
    if (error := constructing.exception()) is not None:
        threads.shutdown(wait=False)
        what = mask(_text_of(error), secrets_at_work(job))
        msg = f"stage {stage.name!r} did not start: {type(error).__name__}: {what}"
        where = user_location(error) or _defined_at(target)
        advice = f"mend the code, or correct the params ({_shown(stage.params)}); then run it again"
        raise StageStartError(msg, where=where, next=advice) from error
    function = constructing.result()
    try:
        kind = _wanted(function, stage.callable)
    except TypeError as error:
        threads.shutdown(wait=False)
        advice = "name a function, or a class with __call__; its first parameter is one of these, or not annotated"
        raise JobError(f"stage {stage.name!r} {error}", where=_defined_at(target), next=advice) from error
    return CallableStage(stage, function, kind, sender=sender_of(stage, job), threads=threads)


def _construct(target: Any, params: Mapping[str, Any]) -> Any:
    if inspect.isclass(target):
        return target(**params)
    _check_params(target, params)
    return functools.partial(target, **params) if params else target


def _check_params(function: Any, params: Mapping[str, Any]) -> None:
    """Raise TypeError where a function does not take the params: it would fail only when it is first called."""
    try:
        # Not that of what a decorator wraps: it may give it arguments of its own.
        signature = inspect.signature(function, follow_wrapped=False)
    except (ValueError, TypeError):  # a builtin without a signature; what cannot be called is told later
        return
    signature.bind(None, **params)


def _shown(params: Mapping[str, Any]) -> str:
    return ", ".join(params) or "none are stated"


def _wanted(function: Any, reference: str) -> convert.Kind:
    if not callable(function):
        raise TypeError(f"cannot be called: {reference!r} is a {_describe(function)}")
    return convert.wanted(_annotation(function))


def import_callable(reference: str, python_path: Sequence[str], stage: str) -> Any:
    """The object named by ``module:attribute``, found on `python_path` first.

    The folders stay on ``sys.path``: stage code may import its siblings when it is called.
    Raises JobError that says why it cannot be imported.
    """
    for folder in reversed([f for f in python_path if f not in sys.path]):
        sys.path.insert(0, folder)
        _added_folders.append(folder)
    module_name, _, attribute = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        msg = f"stage {stage!r}: cannot import {reference!r}: {type(error).__name__}: {error}"
        where = user_location(error) or f"looked in {', '.join(python_path)} and the installed packages"
        raise JobError(msg, where=where, next=_import_advice(error, module_name)) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            msg = f"stage {stage!r}: cannot import {reference!r}: {module_name!r} has no {name!r}{hint}"
            meant = f"{module_name}:{attribute.replace(name, near[0])}" if near else "one that it has"
            raise JobError(
                msg, where=getattr(found, "__file__", None) or "", next=f"correct it to {meant}, or define it"
            )
        found = getattr(found, name)
    return found


def _import_advice(error: Exception, module: str) -> str:
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if not missing:
        return f"mend the module: python -c 'import {module}' in its folder fails alike"
    if f"{module}.".startswith(f"{missing}."):
        return "put it into one of these folders, name its own in python_path, or correct the module's name"
    return f"install what has the module {missing!r} where the stage runs, as by pip install"


_added_folders: list[str] = []


def forget_imports() -> None:
    """Let modules of earlier jobs go, so that a process which serves many runs imports each one's own, as it is now."""
    folders = tuple(f"{folder}/" for folder in _added_folders)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(folders) and is_user_code(file):
            del sys.modules[name]
    sys.path[:] = [folder for folder in sys.path if folder not in _added_folders]
    _added_folders.clear()
    importlib.invalidate_caches()


def user_location(error: BaseException) -> str:
    """``file.py:41 in Model.__call__``: the deepest frame of the user's own code, empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_code(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    if not frames:
        return ""
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"


def _annotation(function: Callable[..., Any]) -> Any:
    """What the first parameter is annotated with; None where it is not."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # a name that only type checkers import: its text says enough
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without a signature
        return None
    first = next(iter(signature.parameters.values()), None)
    return None if first is None or first.annotation is inspect.Parameter.empty else first.annotation


def _defined_at(target: Any) -> str:
    """``file.py:12``: where a function or class of the user's is defined."""
    while isinstance(target, functools.partial):
        target = target.func
    known = target if inspect.isroutine(target) or inspect.isclass(target) else type(target)
    try:
        return f"{inspect.getsourcefile(known)}:{inspect.getsourcelines(known)[1]}"
    except (OSError, TypeError):
        return ""


def _describe(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
