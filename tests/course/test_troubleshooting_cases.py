"""The doctor on texts as people paste them: tests/course/cases/*.json. Prints precision and recall with `pytest -s`.

Each case names its source, a public thread; the frames around the error are made up, and so are the words of descriptions.
`answer_must_match` is a pattern that the entry must have, or null if no answer for certain is right. `held_out.json` was set
aside before any of the entries for it was written, and no entry or rule was changed for it.
"""

import json
import re
from dataclasses import dataclass

import pytest

from qlora_helpers.course.troubleshooting import PAGE, Answer, read_entries, report, search
from tests import ROOT

ENTRIES = read_entries(ROOT / PAGE)
FILES = ("reported", "collected", "held_out")
CASES = {
    f"{name}-{case['id']}": case
    for name in FILES
    for case in json.loads((ROOT / f"tests/course/cases/{name}.json").read_text(encoding="utf-8"))
}


def right(case: dict, answer: Answer) -> bool:
    """Whether the answer is the one that is wanted: for certain, or for certain not."""
    wanted, entry = case["answer_must_match"], answer.entry
    if wanted is None:
        return entry is None
    return bool(entry and re.search(wanted, "\n".join((entry.heading, entry.meaning, entry.cure))))


@dataclass(frozen=True)
class Score:
    """Of some cases: how many there are, have an entry, are answered for certain, and are so rightly."""

    cases: int
    with_entry: int
    answered: int
    rightly: int

    @property
    def precision(self) -> float:
        return self.rightly / self.answered if self.answered else 1.0

    @property
    def recall(self) -> float:
        return self.rightly / self.with_entry if self.with_entry else 1.0


def score(cases: list[dict], entries=ENTRIES) -> Score:
    answers = [(case, search(case["text"], entries)) for case in cases]
    return Score(
        len(cases),
        sum(case["answer_must_match"] is not None for case in cases),
        sum(answer.entry is not None for _, answer in answers),
        sum(case["answer_must_match"] is not None and right(case, answer) for case, answer in answers),
    )


def of(*files: str) -> list[dict]:
    return [case for name, case in CASES.items() if name.startswith(files)]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("held_out")])
def test_a_case_is_answered_rightly(name):
    case = CASES[name]
    answer = search(case["text"], ENTRIES)
    assert right(case, answer), (case["right"], answer.entry and answer.entry.heading)


def test_held_out_cases_are_answered_and_none_wrongly():
    cases = of("held_out")
    answers = [search(case["text"], ENTRIES) for case in cases]
    assert len(cases) == 20
    assert sum(map(right, cases, answers)) >= 18
    wrong = [
        case["id"] for case, answer in zip(cases, answers, strict=True) if answer.entry and not right(case, answer)
    ]
    assert not wrong


def test_the_page_gives_precision_and_recall_of_all_cases(capsys):
    everything = score(list(CASES.values()))
    with capsys.disabled():
        for name in FILES:
            part = score(of(name))
            print(f"\n{name}: {part.cases} cases, precision {part.precision:.0%}, recall {part.recall:.0%}", end="")
    sentence = (
        f"Of {everything.cases} such texts, {everything.cases - everything.with_entry} of them about other things, it answers "
        f"{everything.answered} for certain, {everything.rightly} of these rightly (precision {everything.precision:.0%}), "
        f"and finds {everything.rightly} of {everything.with_entry} that have an entry (recall {everything.recall:.0%})."
    )
    assert sentence in " ".join((ROOT / PAGE).read_text(encoding="utf-8").split()), sentence


def test_the_score_sees_wrong_answers():
    """With the entries in place of each other, or without any marks, the figures fall."""
    assert score(of("reported")[:20], ENTRIES[:1]).recall < 0.2
    swapped = [
        case | {"answer_must_match": "no entry has these words"} for case in of("reported") if case["answer_must_match"]
    ]
    assert score(swapped).precision == 0 and score(swapped).answered > 15


def test_each_case_has_an_id_a_source_and_what_is_right():
    for name, case in CASES.items():
        assert case["id"] and case["text"].strip() and case["right"]
        assert name.startswith("reported") or re.fullmatch(r"[\w.-]+/[\w.-]+ #\d+", case["source"])
    assert len({case["text"] for case in CASES.values()}) == len(CASES) == 69


def test_no_held_out_report_is_quoted_only_for_its_case():
    """Personal details are replaced: no home folder but those of made-up users."""
    for case in CASES.values():
        folders = re.findall(r"(?:/home/|/Users/|C:\\Users\\)(\w+)", case["text"])
        assert set(folders) <= {"user", "u"}, (case["id"], folders)


# ---- Which message counts

HARMLESS = "`torch_dtype` is deprecated! Use `dtype` instead!"
UNKNOWN = 'Traceback (most recent call last):\n  File "/v/transformers/x.py", line 1, in f\nRuntimeError: a thing nobody knows'
KNOWN = "RuntimeError: Attempting to unscale FP16 gradients."


def heading(text: str) -> str | None:
    entry = search(text, ENTRIES).entry
    return entry and entry.heading


@pytest.mark.parametrize("order", [0, 1])
def test_a_message_that_is_no_cause_never_answers_for_an_error(order):
    parts = [HARMLESS, UNKNOWN]
    answer = search("\n".join(parts[::-1] if order else parts), ENTRIES)
    assert answer.entry is None and [entry.heading for entry in answer.also] == ["`torch_dtype` is deprecated"]
    assert "Also in the text, but no cause of an error:\n- `torch_dtype`" in report(answer)
    assert heading(HARMLESS) == "`torch_dtype` is deprecated"
    parts = [HARMLESS, UNKNOWN.replace("a thing nobody knows", "Attempting to unscale FP16 gradients.")]
    assert heading("\n".join(parts[::-1] if order else parts)) == "Attempting to unscale FP16 gradients"


def test_the_last_exception_counts_most_then_those_before_it():
    first, last = "ValueError: No modules were targeted for adaptation.", f"RuntimeError: {KNOWN}"
    chain = "\n\nThe above exception was the direct cause of the following exception:\n\nTraceback (most recent call last):\n"
    frames = 'Traceback (most recent call last):\n  File "/v/peft/x.py", line 1, in f\n'
    assert heading(f"{frames}{first}{chain}{last}") == "Attempting to unscale FP16 gradients"
    assert heading(f"{frames}{last}{chain}{first}") == "No modules were targeted for adaptation"
    assert (
        heading(f"{frames}{first}{chain}RuntimeError: a thing nobody knows")
        == "No modules were targeted for adaptation"
    )


def test_an_exception_that_reports_another_one_is_not_the_last():
    text = f'  File "/v/peft/x.py", line 1, in f\n{KNOWN}\nTraceback (most recent call last):\n  File "/bin/accelerate", line 8\n'
    assert (
        heading(text + "subprocess.CalledProcessError: Command returned 1.") == "Attempting to unscale FP16 gradients"
    )


# ---- Formats

IN_EVALUATION = """OutOfMemoryError                          Traceback (most recent call last)
Cell In[7], line 1
File /v/transformers/trainer.py:4289, in Trainer.evaluation_loop(self, dataloader)
OutOfMemoryError: CUDA out of memory. Tried to allocate 3.21 GiB."""
FORMATS = {
    "colour codes": ("\x1b[31mValueError\x1b[0m: \x1b[1mAttempting to unscale\x1b[0m FP16 gradients.", "Attempting to"),
    "colours without their escape": ("[0;31mValueError[0m: Attempting to unscale [1;33mFP16 gradients.", "Attempting to"),
    "line numbers": ("12 | Traceback (most recent call last):\n13 | ValueError: Attempting to unscale\n14 | FP16 gradients.", "Attempting to"),
    "ranks": ("[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: Attempting to\n[rank1]: unscale FP16 gradients.", "Attempting to"),
    "a Windows path": ('File "C:\\v\\transformers\\x.py", line 3, in prepare_model_for_kbit_training\ntorch.OutOfMemoryError: CUDA out of memory.', "Out of memory in prepare"),
    "translated quotes": ("ValueError: Your setup doesn’t support bf16/gpu. You need to assign «use_cpu»", "Your setup"),
    "German quotes": ("„use_cache=True“ is incompatible with gradient checkpointing. Setting ‚use_cache=False‘", "`use_cache"),
    "a screenshot's line breaks": ("ValueError: Attempting to un\nscale FP16 gradi\nents.", "Attempting to"),
    "a screenshot's ligatures and wide signs": ("ValueError： You cannot perform ﬁne-tuning on purely quantized models.", "You cannot perform"),
    "cut in the middle": ('File "/v/peft/x.py", line 1\nValueError: No modules were targeted for adaptation. This might be ca', "No modules were"),
    "cut before its end": ("ValueError: You cannot perform fine-tuning on purely quan", "You cannot perform"),
    "cut at its beginning": ("form fine-tuning on purely quantized models. Please attach", "You cannot perform"),
    "IPython 9's frames": (IN_EVALUATION, "Out of memory in evaluation"),
    "AcceleratorError": ("torch.AcceleratorError: CUDA error: out of memory", "CUDA out of memory (OOM)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_a_message_is_found_in_this_format(kind):
    text, begins = FORMATS[kind]
    assert (heading(text) or "nothing").startswith(begins)


# ---- One message, several causes

NO_KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
ASSERT = "RuntimeError: CUDA error: device-side assert triggered"
CAUSES = [
    ("NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible", NO_KERNEL, "newer than this torch"),
    ("NVIDIA B200 with CUDA capability sm_100 is not compatible", NO_KERNEL, "newer than this torch"),
    ("Tesla P100-PCIE-16GB with CUDA capability sm_60 is not compatible", NO_KERNEL, "older than this torch"),
    ("The current PyTorch install supports CUDA capabilities sm_50 sm_60 sm_70 sm_90 sm_100 sm_120.", NO_KERNEL, "No kernel image is available"),
    ("", NO_KERNEL, "No kernel image is available"),
    ("Indexing.cu:1255: indexSelectSmallIndex: block: [0,0,0] Assertion `srcIndex < srcSelectDimSize` failed.", ASSERT, "a token ID without a row"),
    ("Loss.cu:245: nll_loss_forward_reduce_cuda_kernel_2d: Assertion `t >= 0 && t < n_classes` failed.", ASSERT, "a label that is no token"),
    ("TensorCompare.cu:110: Assertion `probability tensor contains either `inf`, `nan` or element < 0` failed.", ASSERT, "probability tensor"),
    ("", ASSERT, "index out of range in self, or device-side"),
]  # fmt: skip


def test_a_frame_of_the_loss_does_not_make_a_label_of_a_token():
    frame = 'File "/v/transformers/loss_utils.py", line 1, in nll_loss\n'
    line = CAUSES[5][0]
    assert "a token ID without a row" in heading(f"{line}\n{frame}{ASSERT}")


@pytest.mark.parametrize(("line", "error", "wanted"), CAUSES)
def test_what_else_is_in_the_text_tells_the_cause(line, error, wanted):
    text = f'{line}\nTraceback (most recent call last):\n  File "/v/transformers/x.py", line 1, in f\n{error}'
    assert wanted in (heading(text) or "nothing")


def test_what_is_missing_is_asked_for():
    for error, asked in ((NO_KERNEL, "sm_"), (ASSERT, "Assertion")):
        answer = search(error, ENTRIES)
        assert asked in answer.entry.asks and f"To be sure\n{answer.entry.asks}" in report(answer)
    assert "To be sure" not in report(search(CAUSES[0][0] + "\n" + NO_KERNEL, ENTRIES))


# ---- Texts about other things

FOREIGN = {
    "pandas": "File \"/v/pandas/core/frame.py\", line 4102, in __getitem__\nKeyError: 'text'",
    "a CNN": 'File "cnn.py", line 3, in forward\nRuntimeError: CUDA error: device-side assert triggered',
    "a loader of images": 'File "images.py", line 3\nValueError: num_samples should be a positive integer value, but got num_samples=0',
    "a full disk": 'File "backup.py", line 3\nOSError: [Errno 28] No space left on device',
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_message_that_others_print_too_is_only_offered(kind):
    answer = search(FOREIGN[kind], ENTRIES)
    assert answer.entry is None and answer.perhaps
    shown = report(answer)
    assert f"If this comes from fine-tuning with them, then: {answer.perhaps.heading}" in shown
    assert answer.perhaps.meaning in shown and answer.perhaps.cure in shown
    assert heading(FOREIGN[kind].replace('File "', 'File "/v/transformers/')) == answer.perhaps.heading


def test_the_nearest_share_a_rare_word():
    resnet = "RuntimeError: size mismatch for fc.weight in ResNet: copying a param with shape torch.Size([1000, 512])"
    assert search(resnet, ENTRIES).entry is None
    django = 'File "/v/django/db/x.py", line 3, in execute\ndjango.db.utils.OperationalError: no such table: users'
    assert search(django, ENTRIES) == Answer(None, ())
    assert not search("npm ERR! code ERESOLVE\nnpm ERR! unable to resolve dependency tree", ENTRIES).others


# ---- Problems without a message, in words of one's own

DESCRIBED = [
    ("vllm serve returns base model answers even though I passed --lora-modules", "vLLM or Ollama"),
    ("Ollama ignores my fine-tuning and answers like the original model", "vLLM or Ollama"),
    ("gguf model talks garbage in ollama, but is fine in python", "GGUF gibberish"),
    ("qwen3-30b-a3b with load_in_4bit uses 56 GB of GPU memory instead of 16", 'A "4-bit" model comes mostly'),
    ("Mixtral in 4-bit does not fit, its memory is as large as in bf16", 'A "4-bit" model comes mostly'),
    ("the model starts its answers with <think> blocks after fine-tuning without reasoning", "Thinking is on"),
    ("my merged model lost everything it learned, it answers like before training", "Merging into a 4-bit"),
    ("the adapter seems to have no effect after loading, the output is the same as base", "Found missing adapter"),
]
OTHER_QUESTIONS = [
    "how do I stop the ollama service",
    "I would like to serve the base model with vllm, without lora",
    "I think training is slow, shall I start again",
    "how to merge two datasets with different columns",
    "which model should I train with thinking",
    "can I load a lora adapter in ComfyUI",
    "pick a random model in lm studio",
]


@pytest.mark.parametrize(("text", "begins"), DESCRIBED)
def test_a_description_is_understood(text, begins):
    assert (heading(text) or "nothing").startswith(begins)


@pytest.mark.parametrize("text", OTHER_QUESTIONS)
def test_another_question_with_the_same_words_is_not_taken_for_it(text):
    assert heading(text) is None
