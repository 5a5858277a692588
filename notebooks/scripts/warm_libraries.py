"""Imported once by the server of `forking.py`: the libraries of the lessons, as a notebook would import them."""

import gc

import ipykernel.zmqshell  # noqa: F401  tqdm recognises a notebook by it, so it comes first

import qlora_helpers.training.run  # noqa: F401  torch, transformers, peft, trl, bitsandbytes, datasets

gc.collect()
gc.freeze()
