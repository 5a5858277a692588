"""Imported once by the server of `forked_kernels.py`: the libraries of the lessons, as a notebook would import them."""

import gc

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

# tqdm looks at its import whether it is in a notebook; the kernel makes a shell of its own.
InteractiveShell.instance(config=Config({"IPKernelApp": {"name": "warm"}, "HistoryManager": {"enabled": False}}))


InteractiveShell.clear_instance()
gc.collect()
gc.freeze()
