"""Take apart what a learner pastes: which lines are exceptions, which is the last, and whose code it is.

A paste can be a traceback of Python or IPython, several of them, the log of a terminal with one in the middle, the text of
a screenshot, or a description. Nothing here knows an error by name, but for those that only report another one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

__all__ = ["Pasted", "plain", "take_apart"]

# What a terminal or a forum puts before a line: pytest's margin, a quoted mail's, a launcher's rank, line numbers, frames.
MARGIN = re.compile(
    r"^(?:E {2,}|(?:> )+|\[?rank ?\d+\]?:? ?|\([\w, =]*pid[ =]\d+\) ?|\s*\d+\s*[|│](?!\|) ?|[\s│┃|]+(?=\S))+"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\[\d{1,2}(?:;\d{1,2})*m")
IGNORED = re.compile(r"[\s\"'`´‘’‚‛“”„‟«»‹›「」│┃╭╮╰╯─━]+")
ERROR = re.compile(r"(?:[\w.]+\.)?_?[A-Za-z]\w*(?:Error|Exception|Interrupt)\b\s*(?::|$)", re.I)
END = re.compile(
    r"Traceback \(most recent|During handling of the above|The above exception was the direct|\s*File [\"“]|File \S+:\d+|-{20,}"
)
TELLS = re.compile(
    r"\b\w+(?:Error|Exception)\b\s*:|ERR!|\berror:|Traceback \(most|Assertion .{0,200}failed|^Killed$", re.I | re.M
)
REPORTERS = (
    "ChildFailedError",
    "CalledProcessError",
    "ProcessRaisedException",
    "SystemExit",
    "KeyboardInterrupt",
    "NonZeroExitCode",
)

OURS = re.compile(
    r"transformers|\btrl\b|\bpeft|bitsandbytes|\bbnb|accelerate|unsloth|axolotl|llama|qwen|mistral|gemma|\bphi-?[234]|"
    r"\bq?lora|\bsft|from_pretrained|hugging ?face|tokenizer|chat_template|language model|\bllm|4-?bit|8-?bit|nf4|"
    r"fine-?tun|CausalLM|input_ids|Training_?Arguments|trainer\.train\(|bfloat16|c10::Half|\.generate\(|qlora_helpers",
    re.I,
)
OTHERS = re.compile(
    r"pandas|django|sklearn|scikit|keras|tensorflow|node_modules|\bnpm\b|torchvision|resnet|\bcnn\b|yolo|\bsql", re.I
)
CODE = re.compile(r"^\s*(?:File \"|File \S+:\d+|Cell In|-+> ?\d|<ipython-input|[\w\[\]'\".]+ = .*\(|npm |\$ )", re.M)


@dataclass(frozen=True)
class Pasted:
    """A text that was taken apart.

    Attributes:
        text: all of it, as it was pasted.
        plain: all of it, as `plain` makes it.
        exceptions: where in `plain` each exception's line begins and ends, with what belongs to it; the last one that does
            not merely report another one is last.
        errors: the lines of these exceptions.
        tells_of_an_error: whether anything in the text is an error, not only a log or a description.
        foreign: whether the text shows code or names another stack, and nothing in it is of this one.
    """

    text: str
    plain: str
    exceptions: tuple[tuple[int, int], ...]
    errors: str
    tells_of_an_error: bool
    foreign: bool

    def rank(self, end: int) -> int:
        """2 if a message that ends there is in the last exception, 1 if it is in one before it, 0 if it is in none."""
        inside = [begin < end <= stop for begin, stop in self.exceptions]
        return 2 if inside and inside[-1] else int(any(inside))


def plain(text: str) -> str:
    """A text without what can differ when a message is printed again: white space, quotes, colours, frames, case.

    The class before a method is left out, too, since IPython prints `in Trainer.train(` where Python prints `in train`.
    """
    return "".join(map(_plain_line, _lines(text)))


def _lines(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", COLOUR.sub("", text))  # screenshots have ligatures, forums have wide colons
    return [MARGIN.sub("", line) for line in text.splitlines()]


def _plain_line(line: str) -> str:
    line = re.sub(r"\bin (?:[A-Za-z_]\w*\.)+(\w+)\(", r"in \1(", line)
    return IGNORED.sub("", line).lower()


def take_apart(text: str) -> Pasted:
    """Find the exceptions of a text. An exception's line begins with its class; it goes on until the next frame."""
    lines = _lines(text)
    found: list[list[int]] = []  # the first line of each, and the line behind its last
    inside = False
    for number, line in enumerate(lines):
        if ERROR.match(line):
            found.append([number, number + 1])
            inside = True
        elif END.match(line):
            inside = False
        elif inside:
            found[-1][1] = number + 1
    real = [span for span in found if not any(name in lines[span[0]] for name in REPORTERS)] or found
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(_plain_line(line)))
    return Pasted(
        text=text,
        plain="".join(map(_plain_line, lines)),
        exceptions=tuple((starts[first], starts[behind]) for first, behind in real),
        errors="\n".join(line for first, behind in real for line in lines[first:behind]),
        tells_of_an_error=bool(found) or bool(TELLS.search(text)),
        foreign=bool(CODE.search("\n".join(lines)) or OTHERS.search(text)) and not OURS.search(text),
    )
