"""From a GGUF file to a model's folder as plain transformers loads it, in 16 bits, with its tokenizer.

transformers reads a GGUF file into full precision, but saves no model that it read from one, and of the tokenizer it
leaves out how text is parted before the merges. Both are completed here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.library_messages import silenced, without_short_bars
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MARKED_TURN", "TURN", "marked", "read_gguf", "write_from_gguf"]

# A turn of a chat as many templates write it, and the same text with marks on what the assistant says.
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_TURN = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}"
    "{% else %}" + TURN + "{% endif %}"
)


def marked(template: str) -> str:
    """A chat template with marks on the answers, if it writes its turns as `TURN` does; else as it is."""
    return template.replace(TURN, MARKED_TURN) if template.count(TURN) == 1 else template


def read_gguf(file: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, its weights decoded and rounded to float16, and its tokenizer.

    Raises:
        ValueError: it parts text in a way that is not known here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(file)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(trust_remote_code=False, **where)
    _part_text(tokenizer, _field(file, "tokenizer.ggml.pre"), file)
    if tokenizer.chat_template:
        tokenizer.chat_template = marked(tokenizer.chat_template)
    with silenced(), without_short_bars(0):  # the reader's own bar is shown
        read = AutoModelForCausalLM.from_pretrained(dtype=torch.float16, trust_remote_code=False, **where)
    config = copy.deepcopy(read.config)
    # what stops it from being saved; and a title within the file, which is no name of a model
    for stale in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(stale, None)
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16, trust_remote_code=False)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer


def write_from_gguf(file: str | Path, folder: str | Path) -> None:
    """Write the model of a GGUF file into a folder that is there, as safetensors in float16, with its tokenizer."""
    model, tokenizer = read_gguf(file)
    with without_short_bars(0):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _field(file: Path, name: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(name)
    return None if field is None else field.contents()


def _part_text(tokenizer: PreTrainedTokenizerBase, kind: str | None, file: Path) -> None:
    """Part text before the merges as the file's tokenizer does."""
    from tokenizers import pre_tokenizers

    if kind == "smollm":  # each digit by itself, then as GPT-2
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind not in (None, "default", "gpt-2"):  # which transformers sets
        raise refuse("file", str(file), f"its tokenizer parts text as {kind!r} does, which is not known here")
