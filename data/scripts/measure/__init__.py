"""What was measured, on a CPU and on a GPU: each script fills one file of `data/measured/`."""
