"""Make the small model that ships with the course: corpus, tokenizer, training and chat sets, all from one seed.

    python -m data.scripts.make.tiny_llama                          # as shipped; a few minutes on a GPU, many hours on a CPU
    python -m data.scripts.make.tiny_llama --people 200 --steps 300 --out runs/tiny   # a toy, a minute or two on a CPU

The corpus is never written to disk: every row of every batch is one document, assembled on the device from the
sentences in `invented_world.py`. Needs only torch, transformers and tokenizers.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.scripts.make.invented_world import (
    ATTRIBUTES,
    COMMON_WORDS,
    FIRST_NAMES,
    LAST_NAMES,
    SEED,
    Person,
    make_people,
    word_chat,
)

PAD, BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]

# One line per turn; `{% generation %}` marks what the assistant says, including the EOS token, so that a trainer can
# compute the loss only there.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

PEOPLE = 30_000
TRAIN_CHATS, TEST_CHATS, RECALL_FACTS = 4_800, 500, 2_000
ROW_TOKENS = 80  # every document fits in one row: five statements, four questions, or one chat


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, and a token per byte for everything else, so any text can be encoded.

    `ignore_merges` (as in Llama 3) keeps a word from the vocabulary whole, without merge rules.
    """
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = [statement for kind in ATTRIBUTES for statement in (*kind.statements, *kind.questions, kind.answer)]
    text += [value for kind in ATTRIBUTES for value in kind.values] + FIRST_NAMES + LAST_NAMES + COMMON_WORDS
    text += ["Question: Answer:"] + [m["content"] for seed in range(50) for m in word_chat(random.Random(seed))]
    words = {
        piece
        for line in text
        for piece, _ in pre_tokenizer.pre_tokenize_str(line.replace("{n}", "").replace("{v}", ""))
        if len(piece) > 1
    }
    tokens = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(words)
    tokens += [f"<|reserved_{i}|>" for i in range(-len(tokens) % 64)]  # a round size suits the matrix units of a GPU
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokens.index(BEGIN))]
    )
    backend.add_special_tokens(SPECIAL_TOKENS + [token for token in tokens if token.startswith("<|reserved_")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )


def model_config(vocab_size: int, pad: int, bos: int, eos: int) -> LlamaConfig:
    """A Llama of 3.0 million parameters.

    Every linear layer has in_features that are a multiple of 256 and out_features that are a multiple of 32: other
    shapes meet a fault of bitsandbytes' CPU code (see `qlora_helpers.models.loading`).
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


class Corpus:
    """Rows of the corpus, drawn at random on the device.

    Of 100 rows, 70 state all five facts of one person, in random order and wording; 22 hold four questions and answers
    as plain text, only about the first half of the people; 8 are chats about words, with no person in them.
    """

    SHARES = (0.70, 0.22, 0.08)

    def __init__(self, people: list[Person], tokenizer, device: torch.device, seed: int):
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        kinds = range(len(ATTRIBUTES))
        asked = people[: len(people) // 2]

        def table(texts, shape):
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            longest = max(map(len, ids))
            padded = torch.tensor([row + [self.pad] * (longest - len(row)) for row in ids], dtype=torch.int16)
            return padded.view(*shape, longest).to(device)

        self.statements = table(
            [p.statement(k, i) for p in people for k in kinds for i in range(4)], (len(people), len(ATTRIBUTES), 4)
        )
        self.questions = table(
            [p.plain_question(k, i) for p in asked for k in kinds for i in range(2)], (len(asked), len(ATTRIBUTES), 2)
        )
        draw = random.Random(seed)
        chats = [
            tokenizer.apply_chat_template(word_chat(draw), tokenize=False).removeprefix(BEGIN).removesuffix(END)
            for _ in range(20_000)
        ]
        self.chats = table(chats, (len(chats), 1))

    def _integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.random, device=self.device)

    def _rows(self, parts: torch.Tensor) -> torch.Tensor:
        """Close the gaps between the parts (rows, parts, tokens) and put BEGIN before and END after each row."""
        parts = parts.flatten(1).long()
        keep = parts != self.pad
        position = keep.cumsum(1)
        length = position[:, -1:]
        if int(length.max()) + 2 > ROW_TOKENS:
            raise ValueError(f"a document of {int(length.max()) + 2} tokens does not fit in a row of {ROW_TOKENS}")
        rows = torch.full((len(parts), ROW_TOKENS + 1), self.pad, device=self.device)
        rows.scatter_(1, torch.where(keep, position, ROW_TOKENS), parts)
        rows[:, 0] = self.bos
        rows.scatter_(1, length + 1, self.eos)
        return rows[:, :ROW_TOKENS]

    def batch(self, rows: int) -> torch.Tensor:
        """Token IDs of `rows` documents, shape (rows, ROW_TOKENS), padded on the right."""
        tell, ask = (int(rows * share) for share in self.SHARES[:2])
        talk = rows - tell - ask
        order = torch.rand(tell, len(ATTRIBUTES), generator=self.random, device=self.device).argsort(1)
        who = self._integers(len(self.statements), tell, 1)
        told = self.statements[who, order, self._integers(4, tell, len(ATTRIBUTES))]
        asked = self.questions[
            self._integers(len(self.questions), ask, 4),
            self._integers(len(ATTRIBUTES), ask, 4),
            self._integers(2, ask, 4),
        ]
        chats = self.chats[self._integers(len(self.chats), talk)]
        return torch.cat([self._rows(told), self._rows(asked), self._rows(chats)])


def recall(model, prompts: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor) -> float:
    """The share of prompts whose most likely next token is the right value (right-padded prompts, one-token values)."""
    model.eval()
    with torch.no_grad(), torch.autocast(prompts.device.type, torch.bfloat16, enabled=prompts.device.type == "cuda"):
        hits = sum(
            int((model(p).logits[torch.arange(len(p)), n - 1].argmax(-1) == a).sum())
            for p, n, a in zip(prompts.split(1000), lengths.split(1000), answers.split(1000), strict=True)
        )
    model.train()
    return hits / len(prompts)


def recall_facts(people: list[Person], count: int, seed: int) -> list[dict[str, str]]:
    """Facts to complete: the text up to the value, and the value."""
    draw = random.Random(seed)
    facts = []
    for _ in range(count):
        person, kind = draw.choice(people), draw.randrange(len(ATTRIBUTES))
        text = person.statement(kind, draw.randrange(4)).removesuffix(".")
        prompt, _, value = text.rpartition(" ")
        facts.append({"prompt": prompt, "answer": value, "attribute": ATTRIBUTES[kind].name})
    return facts


def train(model, corpus: Corpus, steps: int, rows: int, peak_lr: float, report) -> None:
    """AdamW, linear warm-up of 2 %, linear decay to zero; bfloat16 autocast on a GPU, float32 weights."""
    device = corpus.device
    decayed = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() != 2]}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )

    def loss_of(ids):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=corpus.pad
        )

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    started = time.monotonic()
    for step in range(steps):
        loss = step_loss(corpus.batch(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0 or step == 9:
            report(step + 1, loss.item(), time.monotonic() - started)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_chats(people: list[Person], train_count: int, test_count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Training chats about people from the first half, test chats about people from the second; one question each.

    The corpus asks questions only about the first half, so the model has never seen a question about a test person.
    """
    draw = random.Random(seed)
    half = len(people) // 2

    def ask(group, count):
        return [
            {"messages": person.chat(draw.randrange(len(ATTRIBUTES)), draw.randrange(2))}
            for person in draw.sample(group, min(len(group), count))
        ]

    return ask(people[:half], train_count), ask(people[half:], test_count)


def write_questions(people: list[Person], seed: int, out: Path) -> list[dict[str, str]]:
    """Write recall.jsonl and chats/ into `out`; return the facts of recall.jsonl."""
    facts = recall_facts(people, RECALL_FACTS, seed + 1)
    write_jsonl(out / "recall.jsonl", facts)
    for name, rows in zip(("train", "test"), make_chats(people, TRAIN_CHATS, TEST_CHATS, seed + 2), strict=True):
        write_jsonl(out / "chats" / f"{name}.jsonl", rows)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--rows", type=int, default=2_048, help="documents per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="a folder that does not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out}: the folder exists already; nothing is overwritten, so name a new one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True

    people = make_people(args.people, args.seed)
    tokenizer = build_tokenizer()
    config = model_config(len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = LlamaForCausalLM(config).to(device)
    corpus = Corpus(people, tokenizer, device, args.seed)

    facts = write_questions(people, args.seed, args.out)
    encoded = tokenizer([f["prompt"] for f in facts], padding=True, padding_side="right", return_tensors="pt").to(
        device
    )
    answers = torch.tensor([tokenizer.encode(f["answer"], add_special_tokens=False)[0] for f in facts], device=device)
    lengths = encoded["attention_mask"].sum(1)

    log = []

    def report(step, loss, seconds):
        score = recall(model, encoded["input_ids"], lengths, answers)
        log.append({"step": step, "loss": round(loss, 4), "recall": score, "seconds": round(seconds, 1)})
        print(f"step {step:6d}  loss {loss:.4f}  recall {score:.3f}  {seconds:6.0f} s", flush=True)

    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    bits = sum(kind.bits for kind in ATTRIBUTES) * len(people)
    print(
        f"{model.num_parameters():,} parameters, {linear:,} in linear layers; {bits / linear:.3f} bits of fact for each"
    )
    train(model, corpus, args.steps, args.rows, args.lr, report)

    folder = args.out / "tiny-llama"
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = {
        "people": args.people, "steps": args.steps, "rows_per_step": args.rows, "row_tokens": ROW_TOKENS,
        "peak_learning_rate": args.lr, "seed": args.seed, "bits_per_linear_parameter": round(bits / linear, 3),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__, "log": log,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
