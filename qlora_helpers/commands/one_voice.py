"""Of several processes that a launcher has started, the first speaks; another only where a fault is its own.

A fault of the settings, the data or the folder is the same in every process, and is said once. When a process fails alone, it
says so with its number, and what breaks in the others because of that is left unsaid: the launcher ends them. They learn of
each other's faults through the launcher's own store, which outlives them (`torch.distributed.TCPStore`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from qlora_helpers.launch import Launch, launch_of_this_process

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["Voice", "one_voice"]

WAIT = timedelta(seconds=5)  # for what the first process says
_FAULT = "qlora_helpers/fault"


@dataclass
class Voice:
    """How this process says what went wrong.

    Attributes:
        launch: which of the processes it is.
        code: what it exits with where nothing else decides.
    """

    launch: Launch = field(default_factory=Launch)
    code: int = 1

    def say(self, text: str) -> None:
        """Print a fault to standard error, unless the first process says the same, or another one failed before."""
        if self.launch.processes == 1:
            print(text, file=sys.stderr)
            return
        if self.launch.leads:
            self.tell(text)
            print(text, file=sys.stderr, flush=True)
        elif self._said_by_first() != text:
            self.tell(text)
            print(f"process {self.launch.rank} of {self.launch.processes}: {text}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Tell the other processes what went wrong here."""
        with contextlib.suppress(RuntimeError, OSError):  # the launcher has ended already, and its store with it
            self._store().set(f"{_FAULT}/{self.launch.rank}", text)

    def another_failed(self) -> bool:
        """Whether another process has told of a fault: what breaks here is then its consequence.

        A process tells before it ends, and so before its connections break.
        """
        others = [rank for rank in range(self.launch.processes) if rank != self.launch.rank]
        with contextlib.suppress(RuntimeError, OSError):
            store = self._store()
            return any(store.check([f"{_FAULT}/{rank}"]) for rank in others)
        return False

    def _said_by_first(self) -> str | None:
        with contextlib.suppress(RuntimeError, OSError):
            store = self._store()
            store.wait([f"{_FAULT}/0"], WAIT)
            return store.get(f"{_FAULT}/0").decode()
        return None

    def _store(self) -> Store:
        from torch.distributed import TCPStore

        host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
        return TCPStore(host, port, None, False, WAIT)  # not the master


@contextlib.contextmanager
def one_voice() -> Iterator[Voice]:
    """Run a command in each of the processes, of which the first prints.

    An error that the command does not explain ends the process with its traceback, except where another process has failed
    and this one only lost its connection to it.
    """
    try:
        voice = Voice(launch_of_this_process())
    except ValueError:  # the command says it, where it matters
        voice = Voice()
    if voice.launch.processes == 1:
        yield voice
        return
    with contextlib.ExitStack() as quiet:
        if not voice.launch.leads:
            quiet.enter_context(
                contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w", encoding="utf-8")))
            )
        try:
            yield voice
        except RuntimeError as error:
            if voice.another_failed():
                return
            voice.tell(str(error))
            raise
        except Exception as error:
            voice.tell(str(error))
            raise
