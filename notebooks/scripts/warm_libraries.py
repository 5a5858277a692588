"""Imported once by the server of `forking.py`: the libraries of the lessons, as a notebook would import them."""

import gc

import ipykernel.zmqshell

import qlora_helpers.training.run

gc.collect()
gc.freeze()
