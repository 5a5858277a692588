"""Model cards, the README.md of a folder in Hugging Face's format: of a run, from its report alone, and of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from qlora_helpers.models.fetched import FETCHABLE
from qlora_helpers.units import in_words
from qlora_helpers.visible import shortened, visible

__all__ = ["merged_card", "model_card"]

LONGEST = 300  # characters of a text that are shown
CURVE = 8  # points of a loss curve that are shown
NOT_MEASURED = "not measured"
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# what Markdown, or a site that shows it, would take for more than a sign, where it stands
_MARKS = re.compile(
    r"""
    [`|$\[]                          # code, a cell's end, a formula, a link
    | \\(?=[^\w\s]|_|$)              # an escape
    | (?<!\s)\* | \*(?=\S) | ^\*     # emphasis; white space on both sides makes it a star
    | (?<![^\W_])_ | _(?![^\W_])     # emphasis, but not inside a word
    | ~(?=\S) | (?<=\S)~             # struck through
    | <(?=[A-Za-z/!?]) | ^>          # a tag, a quotation
    | &(?=\#?\w+;)                   # an entity
    | (?<![^\s\#])\#                 # a heading's beginning, or its end
    | :(?=//) | :(?=[\w+-]+:)        # an address, an emoji's name
    | (?<=mailto): | (?<=xmpp):
    | @(?=\w)                        # an address of mail, a person
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SETTINGS = {  # the names that a card shows, in this order
    "method": "method", "epochs": "epochs", "steps": "optimizer steps", "batch_size": "batch size",
    "accumulation": "batches per step", "max_length": "longest sequence in tokens", "learning_rate": "peak learning rate",
    "warmup_steps": "warm-up steps", "schedule": "schedule", "max_grad_norm": "gradients clipped at the norm",
    "optimizer": "optimizer", "rank": "LoRA rank", "alpha": "LoRA alpha", "dropout": "LoRA dropout",
    "target_modules": "layers with adapters", "merge_aware": "share of the steps with merged weights", "double_quant": "double quantisation",
    "gradient_checkpointing": "gradient checkpointing", "compute_dtype": "compute dtype", "seed": "seed",
}  # fmt: skip
_OF_ADAPTERS = ("rank", "alpha", "dropout", "target_modules", "merge_aware", "double_quant")


def model_card(report: Mapping[str, Any]) -> str:
    """The model card of a run, in Markdown: what it was made from, how, and what it was measured to do.

    A table of scores whose part of the report is missing is left out; another figure that is missing or None is called
    "not measured". Texts of users are escaped, and shown on one line of up to 300 characters. No licence is stated, since
    that is for whoever publishes the model; the card says so.

    Args:
        report: what a run has put together, with plain values as JSON has them. Only `model` and `settings` must be there.
            - model: the base's name: "owner/model" of the Hub, or a folder's, of which only the last part is shown;
            - settings: `dataclasses.asdict` of the run's `Settings`;
            - gear: "cpu", "t4" or "ampere"; hardware: the device's name;
            - data_file (only its name is shown), data_form, data_rows, data_tokens, data_answer_tokens; data_dropped: how
              many rows were left out; data_changed: {what was changed: in how many rows}; validation_rows; test_rows;
            - loss_history, validation_history: [[step, loss], …]; best_step: of the checkpoint that was kept;
            - trainable_parameters, all_parameters, train_seconds, total_seconds, peak_memory_bytes,
              predicted_memory_bytes;
            - scores: `qlora_helpers.evaluation.Comparison.as_dict()`; commonest_answer_rate: the exact match of always
              giving the commonest answer, from 0 to 1;
            - forgetting: `qlora_helpers.evaluation.Kept.as_dict()`;
            - versions: {package: version}.

    Raises:
        ValueError: `model` or `settings` is missing.
    """
    from huggingface_hub import ModelCardData

    for name in ("model", "settings"):
        if not report.get(name):
            raise ValueError(f"report[{name!r}] is missing: a card needs the name of the base and the run's settings")
    base, method = report["model"], report["settings"].get("method", "qlora")
    on_the_hub = bool(_ON_THE_HUB.fullmatch(base))
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        library_name="transformers" if method == "full" else "peft",
        pipeline_tag="text-generation",
        tags=["sft", "trl", *([] if method == "full" else ["lora"]), *(["qlora"] if method == "qlora" else [])],
    )
    shown = base if on_the_hub else _file_name(base)
    kind = {"full": "All weights", "lora": "A LoRA adapter", "qlora": "A QLoRA adapter"}.get(method, _text(method))
    title = f"{shown}, tuned on {_file_name(report['data_file'])}" if report.get("data_file") else f"{shown}, tuned"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_text(title)}\n",
        f"{kind} of {_text(shown)}, fine-tuned on chats. This card was made from the run's own report.\n",
        "No licence is stated here. The licence of the base and the rights in the data decide what you may do; whoever "
        "publishes this adds `license:` to the lines above.\n",
        *_section("Data", _table(_data(report))),
        *_section("Training", _table(_training(report)), *_curves(report)),
        *_section("Scores", *_scores(report.get("scores"), report.get("commonest_answer_rate"))),
        *_section("Sample answers", *_samples(report.get("scores"))),
        *_section("What it has forgotten", *_forgotten(report.get("forgetting"))),
        *_section("How to load it", *_loading(shown, report)),
        *_section("Limits", _limits(report)),
        *_section("Versions", _table(sorted((report.get("versions") or {}).items()))),
    ]
    return "\n".join(parts).rstrip() + "\n"


def merged_card(report: Mapping[str, Any]) -> str:
    """The model card of a merged model, in Markdown.

    It says what was merged into what, and what was found when plain transformers loaded it. If that was not as it should
    be, or was not done, the card begins with it.

    Args:
        report: as `qlora_helpers.adapters.proven_merge` keeps it in merge.json: base, base_fingerprint, adapter,
            adapter_fingerprint, rank, alpha, modules, into, why, trained_on, base_licence; proof, with holds and said, or None;
            and proof_failed, if the proof could not be made.
    """
    from huggingface_hub import ModelCardData

    base, proof, failed = report["base"], report.get("proof"), report.get("proof_failed")
    on_the_hub = bool(_ON_THE_HUB.fullmatch(base))
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merged"],
    )
    if failed:
        warning = f"**Not proven.** The proof could not be made: {_text(failed)}\n"
    elif proof is None:
        warning = "**Not proven.** It was merged without looking whether it answers as its adapter does.\n"
    else:
        warning = (
            "" if proof["holds"] else "**Not as it should be.** It does not do what its adapter does; see below.\n"
        )
    licence = report.get("base_licence")
    rows = [
        ("base", _file_name(base) if not on_the_hub else base),
        ("fingerprint of the base", report["base_fingerprint"]),
        ("adapter", report["adapter"]),
        ("fingerprint of the adapter", report["adapter_fingerprint"]),
        ("rank, alpha", f"{report['rank']}, {report['alpha']:g}"),
        ("layers changed", ", ".join(report["modules"])),
        (
            "the adapter was trained on",
            f"the base in 4 bits ({report['trained_on']})"
            if report["trained_on"] != "unquantised"
            else "the unquantised base",
        ),
        ("merged into", f"{report['into']}: {report['why']}"),
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_text(base if on_the_hub else _file_name(base))}, with the adapter {_text(report['adapter'])} merged into it\n",
        warning,
        (
            f"The base's licence, by its own card, is {_text(licence)}. "
            if licence
            else "The base's licence is not known here. "
        )
        + "It and the rights in the adapter's data decide what you may do; whoever publishes this adds `license:` to the lines "
        "above.\n",
        *_section("What was merged", _table(rows)),
        *_section("What was measured", *(_points(proof["said"].splitlines()) if proof else [NOT_MEASURED])),
        *_section("How to load it", _code(_LOAD_PLAINLY)),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _points(lines: Iterable[str]) -> list[str]:
    return ["\n".join(f"- {_text(line, 1_000)}" for line in lines)]


_LOAD_PLAINLY = [
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")',
    'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
]


def _section(title: str, *parts: str) -> list[str]:
    """A heading and what is under it; nothing if that is empty."""
    parts = [part for part in parts if part]
    return [f"## {title}\n", *(f"{part}\n" for part in parts)] if parts else []


def _file_name(path: str) -> str:
    """The last part of a path of any system: the folders above are nobody else's business."""
    return PureWindowsPath(path).name or "a folder"


def _text(value: object, longest: int = LONGEST) -> str:
    """A text that Markdown, in a table or out of it, shows as it is. What it would show so anyway is not escaped."""
    text = shortened(visible(str(value)).strip(), longest)
    text = _MARKS.sub(r"\\\g<0>", text)
    return re.sub(r"(?i)(www)\.", r"\1\\.", text)  # else some sites make it a link


def _number(value: float | None, form: str = ",", unit: str = "") -> str:
    return NOT_MEASURED if value is None else f"{value:{form}}{unit}"


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ("", "")) -> str:
    """A table of escaped cells; "" for one without rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---"] * len(head)] + [[_text(cell) or "(nothing)" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _data(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if report.get("data_file"):
        rows.append(("file", _file_name(report["data_file"])))
    if report.get("data_form"):
        rows.append(("form", report["data_form"]))
    rows.append(("chats trained on", _number(report.get("data_rows"))))
    for name, label in (("data_tokens", "their tokens"), ("data_answer_tokens", "tokens of their answers")):
        if report.get(name):
            rows.append((label, _number(report[name])))
    if report.get("data_dropped"):
        rows.append(("rows left out", _number(report["data_dropped"])))
    rows += [(what, f"{count:,} rows") for what, count in (report.get("data_changed") or {}).items()]
    rows += [
        (label, f"{report[name]:,}")
        for name, label in (("validation_rows", "chats for validation"), ("test_rows", "chats for the scores below"))
        if report.get(name)
    ]
    return rows


def _training(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = report["settings"]
    skipped = _OF_ADAPTERS if settings.get("method") == "full" else ()
    rows = [
        (label, _setting(settings[name]))
        for name, label in _SETTINGS.items()
        if settings.get(name) is not None and name not in skipped
    ]
    trained, of = report.get("trainable_parameters"), report.get("all_parameters")
    rows.append(("trained parameters", f"{trained:,} of {of:,}" if trained and of else _number(trained)))
    if report.get("best_step"):
        rows.append(("weights kept from step", _number(report["best_step"])))
    rows.append(("device", report.get("hardware") or report.get("gear") or NOT_MEASURED))
    rows.append(("seconds of training", _number(report.get("train_seconds"), ",.0f")))
    rows.append(("seconds in all", _number(report.get("total_seconds"), ",.0f")))
    for name, label in (("predicted_memory_bytes", "predicted"), ("peak_memory_bytes", "measured")):
        size = report.get(name)
        rows.append((f"peak memory, {label}", f"not {label}" if size is None else in_words(size)))
    return rows


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _curves(report: Mapping[str, Any]) -> list[str]:
    """A few points of each loss curve, the first and the last among them."""
    curves = []
    for name, label in (("loss_history", "training loss"), ("validation_history", "validation loss")):
        points = [(step, loss) for step, loss in report.get(name) or [] if loss is not None]
        if len(points) > CURVE:
            points = [points[round(n * (len(points) - 1) / (CURVE - 1))] for n in range(CURVE)]
        if points:
            steps = [f"{step:,}" for step, _ in points]
            curves.append(_table([(label, *(f"{loss:.3f}" for _, loss in points))], ("step", *steps)))
    return curves


def _scores(scores: Mapping[str, Any] | None, commonest: float | None) -> list[str]:
    if not scores:
        return [f"Answers and loss were {NOT_MEASURED}."]
    before, after = scores["before"], scores["after"]
    rows = [("loss, nats per token", *_pair(before, after, "loss", ".3f"), f"{before['tokens']:,} tokens")]
    if before["exact_match"] is not None:
        rows.append(
            ("exact match", *_pair(before, after, "exact_match", ".1%"), f"{before['short_rows']:,} short answers")
        )
    if before["overlap"] is not None:
        rows.append(
            (
                "overlap (chrF, of 100)",
                *_pair(before, after, "overlap", ".1f"),
                f"{before['long_rows']:,} longer answers",
            )
        )
    rows.append(("answers cut off", f"{before['cut_off']:,}", f"{after['cut_off']:,}", f"of {before['rows']:,}"))
    said = "± is one standard error. Answers are greedy, and cut off at the length that the right ones need."
    if (chance := scores.get("exact_match_chance")) is not None:
        said += f" Chance alone changes exact match as much with a probability of {chance:.2g} (McNemar's exact test)."
    for name, label in (("loss_change", "The loss"), ("overlap_change", "The overlap")):
        if (change := scores.get(name)) and None not in change:
            said += f" {label} changed by {change[0]:+.3g} ± {change[1]:.2g} (95 % interval)."
    if commonest is not None:
        said += f" Always giving the commonest answer would match {commonest:.1%}."
    return [_table(rows, ("", "base", "tuned", "on")), said]


def _pair(before: Mapping[str, Any], after: Mapping[str, Any], name: str, form: str) -> list[str]:
    """A score before and after, each with its standard error."""
    found = []
    for scores in (before, after):
        value, error = scores[name], scores.get(f"{name}_error")
        known = "not a finite number" if value is None else f"{value:{form}}"
        found.append(known if value is None or error is None else f"{known} ± {error:{form}}")
    return found


def _samples(scores: Mapping[str, Any] | None) -> list[str]:
    """The examples, with those that the tuned model answers worst marked as such."""
    head = ("question", "right answer", "base", "tuned")
    parts = []
    for name, said in (("first", "The first chats:"), ("worst", "Of the others, the worst answers after training:")):
        if rows := (scores or {}).get(name):
            cells = [(row["question"], row["right"], row["before"], row["after"]) for row in rows]
            parts += [said, _table(cells, head)]
    return parts


def _forgotten(kept: Mapping[str, Any] | None) -> list[str]:
    if not kept:
        return [f"What it still knows of what its base knew was {NOT_MEASURED}."]
    before, after = kept["before"], kept["after"]
    rows = [
        ("right, of 4 choices", *_pair(before, after, "right", ".1%"), f"{kept['facts']:,} {kept['what']}"),
        (
            "loss, nats per token",
            *_pair(before, after, "loss", ".3f"),
            f"{kept['items']:,} facts{' and texts' * (kept['items'] > kept['facts'])}",
        ),
    ]
    return [_table(rows, ("", "base", "tuned", "on")), _text(" ".join(kept["said"].split()), 2_000)]


def _loading(base: str, report: Mapping[str, Any]) -> list[str]:
    """How to load the result, in code that uses PEFT and transformers alone, and in this package's."""
    settings = report["settings"]
    method = settings.get("method", "qlora")
    name = json.dumps(visible(base), ensure_ascii=False)
    code = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if method == "full":
        code += [
            "",
            'model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        ]
        ours = [
            'folder = "this-folder"',
            "model, tokenizer = load_model(folder, quantization=None), load_tokenizer(folder)",
        ]
        imports = []
    else:
        code.insert(0, "from peft import PeftModel")
        options = 'dtype="auto"'
        if method == "qlora":
            code[1] += ", BitsAndBytesConfig"
            nested = settings.get("double_quant", True)
            code += ["", "in_4_bits = BitsAndBytesConfig("]
            dtype = settings.get("compute_dtype") or {"t4": "float16", "cpu": "float32"}.get(
                report.get("gear"), "bfloat16"
            )
            code += [f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={nested},']
            code += [f'    bnb_4bit_compute_dtype="{dtype}",', ")"]
            options += ", quantization_config=in_4_bits"
        code.append("")
        code += [
            f"base = AutoModelForCausalLM.from_pretrained({name}, {options})",
            'model = PeftModel.from_pretrained(base, "this-folder")',
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
        ]
        quantization = '"nf4"' if method == "qlora" else "None"
        ours = [
            f"base = load_model({name}, quantization={quantization})",
            f'model, tokenizer = load_adapter(base, "this-folder"), load_tokenizer({name})',
        ]
        imports = ["from qlora_helpers.adapters.files import load_adapter"]
    imports += [
        "from qlora_helpers.evaluation import answer",
        "from qlora_helpers.models.loading import load_model, load_tokenizer",
    ]
    ask = 'print(answer(model, tokenizer, [[{"role": "user", "content": "…"}]], max_new_tokens=200)[0])'
    where = ""
    if method != "full" and base in FETCHABLE:
        where = f"`python -m qlora_helpers fetch {base}` says where {base} is on a disk: write that path there. "
    elif method != "full" and not _ON_THE_HUB.fullmatch(base):
        where = f"{_text(base)} is a folder: write its path there. "
    return [
        f"{where}With transformers" + ("" if method == "full" else " and PEFT") + " alone:",
        _code(code),
        "With the course's package, which also makes sure that the base is the right one and stops at the end of an answer:",
        _code([*imports, "", *ours, ask]),
    ]


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _limits(report: Mapping[str, Any]) -> str:
    rows = report.get("test_rows") or ((report.get("scores") or {}).get("before") or {}).get("rows")
    on = f"on {rows:,} chats" if rows else "not at all"
    warning = report.get("data_warning")
    return "\n".join(
        [
            *([f"- {_text(warning)}."] if warning else []),
            f"- It was scored {on}, of the kind that it was trained on. What it does with other questions is not known.",
            "- Exact match and overlap compare wordings. They do not know whether another answer is right, too.",
            "- What was forgotten was looked for in a small fixed set. Abilities outside it may have been lost.",
            "- Nothing was measured about harmful, biased or invented answers; those of the base remain possible.",
        ]
    )
