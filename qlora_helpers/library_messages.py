"""Hide five harmless messages of the libraries, each recognised by its words, and a log; and bars that nobody can read.

All other messages are shown; `printed` shows those of one library on the page.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["printed", "quieten", "silenced", "without_short_bars"]

# bitsandbytes at import, on a CPU with AVX512-BF16: an optional package that this course does not use.
_BITSANDBYTES = "Failed to load CPU gemm_4bit_forward"
# transformers, for its own default arguments and for TRL's: a renamed option that the course does not set.
_RENAMED = r"`(is_)?gradient_checkpointing` is deprecated"
# transformers, when the trainer gives the model the tokenizer's special tokens: information, not a warning.
_ALIGNED = "The tokenizer has new PAD/BOS/EOS tokens"
# transformers, when a model is dequantised as requested.
_DEQUANTISED = "The modules are dequantized in"
# transformers, when two checkpoints are less than a second apart, as on a fast GPU: it then sorts them by number.
_NO_SECOND_APART = "mtime may not be reliable on this filesystem"
# The log of torch's profiler, which from torch 2.13 on says on stderr that it begins and ends, at a level above
# that of errors. Errors of the profiler that matter are raised.
_PROFILER, _NOTHING = "KINETO_LOG_LEVEL", "6"


class _Drop(logging.Filter):
    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def quieten() -> None:
    """Install the filters. Safe to call more than once; call it before importing bitsandbytes."""
    os.environ.setdefault(_PROFILER, _NOTHING)
    for logger, beginning in (
        ("bitsandbytes.backends.cpu.ops", _BITSANDBYTES),
        ("transformers.trainer_utils", _ALIGNED),
        ("transformers.trainer_utils", _NO_SECOND_APART),
        ("transformers.integrations.bitsandbytes", _DEQUANTISED),
    ):
        filters = logging.getLogger(logger).filters
        if not any(isinstance(old, _Drop) and old.beginning == beginning for old in filters):
            logging.getLogger(logger).addFilter(_Drop(beginning))
    warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)


_SOON_DONE = 10**8  # bytes of weights that are read or written in less than a second


@contextmanager
def without_short_bars(size: int) -> Iterator[None]:
    """Hide the progress bars of transformers while a small model is loaded or saved: they would stay behind as clutter.

    Args:
        size: of the weights in bytes. With 0.1 GB or more, which take longer, the bars are shown.
    """
    from transformers.utils import logging as transformers_logging

    hide = size < _SOON_DONE and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


@contextmanager
def silenced() -> Iterator[None]:
    """Hide all messages of the libraries while they work on a model that is neither loaded nor trained.

    Their errors are raised as ever.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def printed(logger: str, beginning: str) -> Iterator[None]:
    """Print what a library's logger warns of, as lines of the page, and not on the terminal.

    Args:
        logger: its name, such as "trl.trainer.sft_trainer".
        beginning: what each line begins with.
    """

    class OnThePage(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(beginning, record.getMessage())

    log, handler = logging.getLogger(logger), OnThePage()
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
