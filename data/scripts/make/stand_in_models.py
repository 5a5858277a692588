"""A stand-in for a model on the Hub: a known shape with random weights, and a tokenizer with the same chat template.

    python -m data.scripts.make.stand_in_models Qwen2.5-1.5B FOLDER

Its answers are nonsense, but it takes the same memory and time as the real model: for tests and measurements offline.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora_helpers.memory import known_config
from qlora_helpers.paths import data_path
from qlora_helpers.safe_folders import whole_folder

SHARD = "2GB"  # small shards keep main memory use low while a model is loaded


def make_tokenizer():
    """Byte-level BPE, trained on the course's questions, in the chat format of Qwen2.5."""
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen2_5_chat_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [
        message["content"]
        for line in data_path("chats", "qlora", "train.jsonl").read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4_000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=qwen2_5_chat_template
    )


def write(model_name: str, folder: Path, device: str | None = None) -> Path:
    """Write a model folder like one from the Hub, in bfloat16; an existing folder is kept."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if folder.exists():
        return folder
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = known_config(model_name) | {"max_position_embeddings": 32_768}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    tokenizer = make_tokenizer()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    # as in Qwen2.5's own file, so that greedy answers are tested against it
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        repetition_penalty=1.05,
        eos_token_id=tokenizer.eos_token_id,
    )
    with whole_folder(folder) as part:
        model.save_pretrained(part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)
    return folder


def chats(count: int, tokens: int, tokenizer) -> list:
    """Chats of exactly this many tokens, nearly all in the answer."""
    from qlora_helpers.chats import count_tokens

    vocabulary = [w for w in (tokenizer.decode([i]) for i in range(len(tokenizer))) if w[:1] == " " and w[1:].isalpha()]
    vocabulary = [w for w in vocabulary if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1]
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        picked = torch.randint(len(vocabulary), (tokens,), generator=generator).tolist()

        def chat(length, picked=picked):
            answer = "".join(vocabulary[i] for i in picked[:length])
            return [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]

        made.append(chat(tokens - (count_tokens(chat(tokens), tokenizer) - tokens)))
        if (length := count_tokens(made[-1], tokenizer)) != tokens:
            raise RuntimeError(f"made a chat of {length} tokens, not {tokens}")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hub name that `qlora_helpers.memory.known_config` knows")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write(args.model, args.folder)
