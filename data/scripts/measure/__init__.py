"""Measurements on a CPU and on a GPU: each script writes one file in `data/measured/`."""
