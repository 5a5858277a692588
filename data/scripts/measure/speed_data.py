"""Chats of chosen lengths, for measurements of speed, and a tokenizer that takes one token for each of their words."""

import math
import random
from statistics import NormalDist

__all__ = ["chats_of", "lengths_for", "make_tokenizer", "mixed_lengths"]

MEDIAN, PERCENTILE_95 = 60, 250  # tokens of mixed chats
LONG, SHARE_OF_LONG = 1_000, 0.01
SHORTEST = 4  # a question of one word, an answer of two, the end
SPECIAL = ("<pad>", "</s>", "<unk>")
# The question is one word. Only the answer and its end are marked as the assistant's.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def make_tokenizer(vocabulary: int, pad_token: str = "<pad>"):
    """A tokenizer whose tokens are the words "w3", "w4" and so on, up to `vocabulary`, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token=pad_token,
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="right",
    )


def mixed_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths in tokens as of short answers: lognormal, median 60, 95th percentile 250, and one in a hundred of 1,000.

    They are evenly spaced quantiles in a random order, so that few chats have this distribution, too.
    """
    spread = math.log(PERCENTILE_95 / MEDIAN) / NormalDist().inv_cdf(0.95)
    quantiles = [NormalDist().inv_cdf((place + 0.5) / count) for place in range(count)]
    lengths = [max(SHORTEST, round(MEDIAN * math.exp(spread * z))) for z in quantiles]
    long = max(1, round(SHARE_OF_LONG * count))
    lengths[-long:] = [LONG] * long
    random.Random(seed).shuffle(lengths)
    return lengths


def lengths_for(row: dict, steps: int) -> list[int]:
    """As many lengths as these steps need, so that no batch is cut off by the end of the data."""
    if row["variant"] != "ours" and row["settings"].get("packing"):  # rows that are packed before the run
        needed, count = row["batch_size"] * row["accumulation"] * row["max_length"] * steps, 100
        while sum(mixed_lengths(count)) < 1.1 * needed:  # they are not always full
            count += 100
    else:
        count = row["batch_size"] * row["accumulation"] * steps
    if row["data"] == "full":
        return [row["max_length"]] * count
    return [min(length, row["max_length"]) for length in mixed_lengths(count)]


def chats_of(lengths: list[int], vocabulary: int, seed: int = 0) -> list:
    """Chats of exactly so many tokens, all but the first of them in the answer."""
    drawn = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{drawn.randrange(len(SPECIAL), vocabulary)}" for _ in range(count))

    return [
        [{"role": "user", "content": words(1)}, {"role": "assistant", "content": words(length - 2)}]
        for length in lengths
    ]
