"""The shared code of the QLoRA course. Each module is one concept; importing this package imports none of them."""

__version__ = "0.1.0"
