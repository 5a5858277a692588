"""Which chats a run trains on, and which it is validated on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_chats, read_chats
from qlora_helpers.chats.split import shared_questions, split
from qlora_helpers.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chats_of_the_run"]


def chats_of_the_run(
    chats: list[Chat],
    validation_chats: list[Chat] | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> tuple[list[Chat], list[Chat]]:
    """The training and the validation chats of a run, and say how many there are; without validation the latter are [].

    Args:
        chats: all that were given to train on.
        validation_chats: those that were given to validate on; None for what the settings say.

    Raises:
        ValueError: there are no chats; validation is described twice, or not at all where another setting needs it; or
            the chats cannot be split.
        OSError: the file of `settings.validation` cannot be read.
    """
    if not chats:
        raise ValueError(f"chats={chats!r}: there is nothing to learn. Pass a list of chats, as read_chats returns")
    _check_what_is_given(validation_chats, settings)
    held_out = settings.validation
    if validation_chats is None and held_out is None:
        return chats, []
    check_chats(chats)
    if isinstance(held_out, str):
        validation_chats = read_chats(held_out, tokenizer, settings.max_length)
    elif held_out is not None:
        chats, validation_chats = _split(chats, held_out, settings.seed)
    check_chats(validation_chats, "validation chat")
    if held_out is not None:  # else the caller knows
        source = held_out if isinstance(held_out, str) else f"{100 * held_out:g} % of the chats"
        print(f"Validation on {source}: {len(validation_chats):,} chats; {len(chats):,} are trained on.")
    if shared := shared_questions(chats, validation_chats):
        print(
            f"{shared:,} of the {len(validation_chats):,} validation chats begin with a question that is trained on, too: their "
            "loss says little about new questions."
        )
    return chats, validation_chats


def _check_what_is_given(validation_chats: list[Chat] | None, settings: Settings) -> None:
    if validation_chats is not None:
        if settings.validation is not None:
            cure = "validation_chats are given, too. Leave out one of the two"
            raise validation.refuse("validation", settings.validation, cure)
        if not validation_chats:
            raise validation.refuse(
                "validation_chats", validation_chats, "there is nothing to validate on. Leave them out"
            )
    for name in ("eval_steps", "patience"):
        if validation_chats is None and settings.validation is None and getattr(settings, name) is not None:
            cure = "there is nothing to validate on. Set validation, pass validation_chats, or leave it out"
            raise validation.refuse(name, getattr(settings, name), cure)


def _split(chats: list[Chat], share: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    try:
        return split(chats, share, seed)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from None
