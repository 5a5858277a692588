"""The questions by which models are compared: given ones, a few of those that a run was trained for, or general ones."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.adapters.tuned import TunedFiles
from qlora_helpers.chats import Chat, read_file, split_question
from qlora_helpers.chats.questions import read_questions
from qlora_helpers.chats.tokens import faults_for
from qlora_helpers.models.loading import SHIPPED_MODEL
from qlora_helpers.paths import data_path
from qlora_helpers.training.run_folder import read_record
from qlora_helpers.validation import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Questions", "questions_for"]

COUNT = 8
LONGEST = 1024  # tokens of a chat that is chosen here; those of a file that is named may have any length


@dataclass(frozen=True)
class Questions:
    """Questions to ask.

    Attributes:
        chats: each ends with a question.
        source: where they come from, in words, such as "8 questions of faq.csv".
    """

    chats: list[Chat]
    source: str


def questions_for(
    tuned: TunedFiles, tokenizer: PreTrainedTokenizerBase, file: str | Path | None = None, count: int = COUNT
) -> Questions:
    """Questions for what a run has trained.

    Args:
        tuned: from `qlora_helpers.adapters.tuned.find_tuned`.
        tokenizer: chats that it cannot take are not chosen.
        file: a file of questions, as `qlora_helpers.chats.questions.read_questions` takes it: all of them. By default
            `count` questions are chosen, evenly spaced, from the run's validation file or data, if its record names them and
            they are still there; else from the shipped test chats, if the base is the shipped model; else from the general
            knowledge that comes with the package.

    Raises:
        ChatError, ValueError, OSError: `file` cannot be read, or `count` is no positive whole number.
    """
    count = whole("count", count)
    if file is not None:
        given = [question.chat for question in read_questions(file)]
        return Questions(given, _in_words(len(given), f"of {Path(file).name}"))
    for path, form in _files_of_the_run(tuned):
        chats = read_file(path, form=form, on_bad="drop").chats
        if chosen := _some([split_question(chat)[0] for chat in chats], tokenizer, count):
            return Questions(chosen, _in_words(len(chosen), f"of {path.name}"))
    from qlora_helpers.evaluation.knowledge import general_items

    prompts = [[{"role": "user", "content": item.prompt}] for item in general_items() if item.prompt]
    chosen = _some(prompts, tokenizer, count)
    if not chosen:
        raise ValueError("this model's chat template takes none of the general questions: name a file with --questions")
    return Questions(chosen, _in_words(len(chosen), "of general knowledge"))


def _in_words(count: int, source: str) -> str:
    return f"{count} question{'' if count == 1 else 's'} {source}"


def _files_of_the_run(tuned: TunedFiles) -> list[tuple[Path, str | None]]:
    """Where a run's chats are, with the form of each file, the validation chats first; nothing that is gone."""
    request = (read_record(tuned.folder.parent) or {}).get("request")
    request = request if isinstance(request, dict) else {}
    named = [name for name in (request.get("validation"), request.get("data")) if isinstance(name, str)]
    found = [(Path(name), request.get("form")) for name in named if Path(name).exists()]
    if not named and tuned.base is not None and Path(tuned.base).name == SHIPPED_MODEL:
        with suppress(FileNotFoundError):  # the package is used without the course
            found.append((data_path("chats", "test.jsonl"), None))
    return found


def _some(chats: list[Chat], tokenizer: PreTrainedTokenizerBase, count: int) -> list[Chat]:
    """So many chats, evenly spaced, of those that the tokenizer takes; of a large file only some are looked at."""
    looked_at = dict(enumerate(_spaced(chats, 8 * count)))
    faults = faults_for(tokenizer, looked_at, LONGEST)
    return _spaced([chat for number, chat in looked_at.items() if number not in faults], count)


def _spaced(chats: list[Chat], count: int) -> list[Chat]:
    count = min(count, len(chats))
    return [chats[place * len(chats) // count] for place in range(count)]
