"""The shared code of the QLoRA course. Each module is one concept, and the package's rooms group them:

- here: `quantize`, `settings` and what all rooms use;
- `chats`: chat data, from a file to tokens;
- `models`: load a model, look into it, save it;
- `training`: a run, its checkpoints, and what can go wrong in it;
- `adapters`: adapters as files, and merging them;
- `evaluation`: how well a model does, and what it has forgotten;
- `memory`: predict what a run takes, and measure it;
- `course`: the lessons' checks, exercises, tables, figures and sliders, and the troubleshooting page;
- `commands`: what `python -m qlora_helpers` runs.

Importing the package loads no library. It prepares two things that must be there before the libraries are: how torch's
threads wait (`threads`), and which of the libraries' messages are dropped (`library_messages`).
"""

from qlora_helpers import library_messages as _library_messages
from qlora_helpers import threads as _threads

__version__ = "0.1.0"

_threads.wait_passively()
_library_messages.quieten()
