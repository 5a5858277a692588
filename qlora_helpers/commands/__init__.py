"""The commands of `python -m qlora_helpers`, one module each, with `add_arguments` and `command`. None needs an installed package to start."""
