"""The processes of one run, which `accelerate launch` or `torchrun` started beside each other, or one that was started alone.

What runs on them reads the same for one as for many: `first` for what is done once (files, decisions), `each` for what every
process does by itself, `together` for what they do with collectives. All three tell every process what came of it: where it
raises in one process it raises in all, and nobody waits for a process that has failed.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .secrets import masked

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

WAIT = datetime.timedelta(days=1)  # for what another process is at: a process that ends is noticed at once
GRACE = 30.0  # seconds for the others to fail as well, after which one that failed ends, so that its launcher ends them
SEEN = 60.0  # seconds until a network file system has shown to one node what another wrote


def processes() -> PartialState:
    """What `accelerate launch` or `torchrun` started beside this process, and the device that is its own."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())  # which otherwise sees one process on a CPU


class OtherProcess(RuntimeError):
    """Another process of the run has failed, and raises what this one was told."""


class ProcessGone(OtherProcess):
    """Another process of the run has ended without a word to this one."""


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is; see the module."""

    rank: int = 0
    count: int = 1
    _group: Any = field(default=None, repr=False)  # gloo: no GPU is kept waiting

    @classmethod
    def connected(cls) -> Ranks:
        """As `started`, where nothing has connected the processes yet."""
        processes()
        return cls.started()

    @classmethod
    def started(cls) -> Ranks:
        """The processes that accelerate knows of, as training arguments have set it up; all of them call this.

        Raises ValueError where more were started than accelerate has connected.
        """
        from accelerate import PartialState

        state, asked = PartialState(), int(os.environ.get("WORLD_SIZE", "1"))
        if asked != state.num_processes:
            raise ValueError(
                f"{asked} processes were started, but {state.num_processes} works here on {state.device}: on a CPU they need "
                "use_cpu: true, on GPUs `accelerate launch` or `torchrun`"
            )
        if state.num_processes == 1:
            return cls()
        import torch.distributed as dist

        return cls(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=WAIT))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mine(self, items: list[T]) -> list[T]:
        """This process's share of items that are dealt out in turn."""
        return items[self.rank :: self.count]

    def first(self, act: Callable[[], T]) -> T:
        """What act() gives in the first process, in all of them."""
        if self.count == 1:
            return act()
        import torch.distributed as dist

        outcome = _outcome_of(act) if self.is_first else _Outcome()
        said: list[Any] = [(outcome.said, outcome.value)]
        with _noticing(outcome.error):
            dist.broadcast_object_list(said, src=0, group=self._group)
        ((why, value),) = said
        if why is not None:
            raise outcome.error or OtherProcess(f"process 0 {why}")
        return value

    def each(self, act: Callable[[], T]) -> T:
        """The result of act() in this process, once all processes are done. act has no collectives: where it fails in one
        process, the others finish theirs."""
        return self._done_in_all(act)[0]

    def together(self, act: Callable[[], T]) -> T:
        """As `each`, for an act with collectives: a process in which it fails does not wait long for the others, since they may
        be waiting for it."""
        return self._done_in_all(act, patience=GRACE)[0]

    def all(self, act: Callable[[], T]) -> list[T]:
        """The results of act() in all processes, given to each of them."""
        return self._done_in_all(act, lambda value: value)[1]

    @contextmanager
    def first_within(self, context: AbstractContextManager) -> Iterator[None]:
        """The first process enters the context (a lock, say) for all of them."""
        with ExitStack() as stack:
            self.first(lambda: stack.enter_context(context) and None)
            yield

    @contextmanager
    def warn_once(self) -> Iterator[None]:
        """Only the first process warns."""
        with warnings.catch_warnings():
            if not self.is_first:
                warnings.simplefilter("ignore")
            yield

    def _done_in_all(
        self, act: Callable[[], T], told: Callable[[T], Any] = lambda value: None, patience: float | None = None
    ) -> tuple[T, list[Any]]:
        """What act() gives here, and of each process what is told of that."""
        if self.count == 1:
            value = act()
            return value, [told(value)]
        outcome = _outcome_of(act)
        with _noticing(outcome.error):
            wait = None if outcome.error is None else patience
            found = _within(wait, self._gather, (outcome.said, told(outcome.value)))
        failed = [(rank, why) for rank, (why, _) in enumerate(found or []) if why is not None]
        if outcome.error is not None and (
            not failed or failed[0][0] == self.rank
        ):  # of several that failed the first one raises its own error
            raise outcome.error
        if failed:
            raise OtherProcess(f"process {failed[0][0]} {failed[0][1]}") from outcome.error
        return outcome.value, [value for _, value in found]

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    # --- what has to be equal, and shared

    def refuse_different(self, what: Mapping[str, Any]) -> None:
        """Raises ValueError where a value, or the code, is another one in another process, naming it; secrets are masked."""
        if self.count == 1:
            return
        what = code_versions() | dict(what)
        everybodys = self.all(lambda: {name: _short(repr(value), name) for name, value in what.items()})
        for rank, theirs in enumerate(everybodys):
            names = [name for name in everybodys[0] | theirs if everybodys[0].get(name) != theirs.get(name)]
            if names:
                pairs = ((name, everybodys[0].get(name), theirs.get(name)) for name in names)
                said = "; ".join(f"{name} is {a} in process 0 and {b} in {rank}" for name, a, b in pairs)
                raise ValueError(f"the processes of one run must be started alike, but {said}")

    def refuse_separate(self, folder: Path, name: str) -> None:
        """Raises ValueError where what the first process writes in a folder is not seen by all."""
        if self.count == 1:
            return

        def write() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            written = folder / f".seen-{os.getpid()}-{time.time_ns()}"
            written.touch()
            return written.name

        token = folder / self.first(write)
        hosts = self.all(lambda: None if shown(token).exists() else socket.gethostname())
        self.first(lambda: token.unlink(missing_ok=True))
        blind = [f"{rank} ({host})" for rank, host in enumerate(hosts) if host is not None]
        if blind:
            raise ValueError(
                f"{name}={str(folder)!r} must be one folder for all processes, on a file system that their machines share: "
                f"what process 0 writes there is not seen by process {', '.join(blind)}"
            )


ALONE = Ranks()


def shown(path: Path) -> Path:
    """The path, as soon as it is there, or after SEEN seconds: what another machine wrote may show late."""
    end = time.monotonic() + SEEN
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None

    @property
    def said(self) -> str | None:
        return None if self.error is None else f"failed with {type(self.error).__name__}: {masked(str(self.error))}"


def _outcome_of(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(act())
    except Exception as error:
        return _Outcome(error=error)


@contextmanager
def _noticing(own: Exception | None) -> Iterator[None]:
    """Around an exchange: where another process is gone, this one's own error counts, or that."""
    try:
        yield
    except RuntimeError as lost:
        gone = ProcessGone(
            "another process of this run is gone: its own message says why, or that of what started it. The same command goes "
            "on from what was done"
        )
        raise gone from own or lost


def _within(seconds: float | None, act: Callable[..., T], *given: Any) -> T | None:
    """What act gives, or None if it takes longer: it is left to itself, in a thread that does not keep the process."""
    if seconds is None:
        return act(*given)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_outcome_of(functools.partial(act, *given))), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return None
    if found[0].error is not None:
        raise found[0].error
    return found[0].value


def _short(value: str, name: str) -> str:
    """A value to be compared and shown: of a long one its beginning, and a digest of all of it."""
    shown = str(masked(value, name))
    return shown if len(shown) <= 80 else f"{shown[:40]}... (sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]})"


@functools.cache
def code_versions() -> dict[str, str]:
    """What would make two processes different programs: the sources of these packages, and the versions of those below."""
    from importlib import metadata

    digest = hashlib.sha256()
    for package in ("larpo", "larpo_kernels"):
        root = Path(__file__).parents[2] / package
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    own = {"the code of larpo": digest.hexdigest()[:12]}
    return own | {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")}
