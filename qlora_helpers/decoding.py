"""How a model's answers are decoded: how long they may be, and whether the next token is the likeliest or is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers import validation

__all__ = ["Decoding"]


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        max_new_tokens: an answer is cut off after this many tokens; None for 512, or half of the model's context if that
            is less.
        temperature: 0 always takes the likeliest token (greedy decoding). Otherwise the next token is drawn, with
            probabilities softmax(logits / temperature) over the whole vocabulary.
        seed: of what is drawn.

    Raises:
        ValueError: a value is of a wrong kind, or outside its bounds.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            otherwise = "None for 512, or half of the model's context if that is less"
            validation.whole("max_new_tokens", self.max_new_tokens, otherwise=otherwise)
        lowest = 0.0 if self.temperature == 0 else 0.01  # below, the division overflows
        validation.number(
            "temperature", self.temperature, at_least=lowest, at_most=10, otherwise="0 for greedy decoding"
        )
        validation.whole("seed", self.seed, at_least=0, at_most=2**32 - 1)

    def limit(self, context: int | None) -> int:
        """The most tokens of an answer of a model with this context, in tokens; None for a model without a limit.

        Raises:
            ValueError: `max_new_tokens` leaves no room for a question.
        """
        if self.max_new_tokens is None:
            return 512 if context is None else min(512, context // 2)
        if context is not None and self.max_new_tokens >= context:
            raise validation.refuse(
                "max_new_tokens",
                self.max_new_tokens,
                f"must be less than the model's context of {context} tokens, which holds the question, too",
            )
        return self.max_new_tokens
