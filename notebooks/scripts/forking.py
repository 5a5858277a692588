"""Processes and kernels forked from a server that has imported the libraries: this saves each of them eight seconds.

The modules are those in `warm_libraries.py`. A forked process is like a fresh one, except for what its environment
would have changed during these imports.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from notebooks.scripts import ROOT

AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
GPU_GEARS = ("t4", "ampere")


def context() -> BaseContext:
    """The one server of this process, started by the first call.

    On Windows there is none: each process imports the libraries itself. So does one that QLORA_GEAR sends to a GPU: the
    libraries touch the GPU when they are imported, and CUDA cannot be used in a process that was forked after that.
    """
    if not AVAILABLE or os.environ.get("QLORA_GEAR") in GPU_GEARS:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["notebooks.scripts.warm_libraries"])
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), before.get("PYTHONPATH")])
    )  # a module that is not found is not an error
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is forked cannot use a GPU, so it finds none
    try:
        forkserver.ensure_running()
    finally:
        for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
    return found


def start(target: Callable, *arguments) -> BaseProcess:
    """Start `target(*arguments)`, a module-level function, in a new process; `exitcode` is negative after a signal."""
    process = context().Process(target=target, args=arguments)
    process.start()
    return process


def _kernel(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """In the forked process: what `python -m ipykernel_launcher` does."""
    os.setsid()  # signals to the kernel's group reach the processes it has started, and not the server
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))  # it ends when the server does
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["ipykernel_launcher", *arguments]

    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


class _Popen:
    """A forked kernel with the part of `subprocess.Popen` that `jupyter_client` uses."""

    stdin = stdout = stderr = None

    def __init__(self, process):
        self.process, self.pid = process, process.pid
        while process.is_alive() and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)  # until it leads its own group: before, a signal to its group would reach us

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def launch_kernel(command: list[str], *, env: dict | None = None, cwd: str | None = None, **streams) -> _Popen:
    """Replaces `jupyter_client.launcher.launch_kernel`; the kernel's standard streams go nowhere."""
    arguments = command[command.index("-f") :]
    return _Popen(start(_kernel, arguments, cwd or os.getcwd(), dict(os.environ if env is None else env)))
