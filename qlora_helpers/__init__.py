"""The shared code of the QLoRA course. Each module is one concept; importing this package loads no library.

It makes one setting, which must be there before torch is: see `qlora_helpers.threads`.
"""

from qlora_helpers import threads as _threads

__version__ = "0.1.0"

_threads.wait_passively()
