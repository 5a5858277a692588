"""The options of `chat` and `ask`: which model answers, and how. They are checked before the libraries are loaded."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from qlora_helpers.adapters.tuned import LATEST, is_adapter, locate
from qlora_helpers.commands.settings_options import number_or_text
from qlora_helpers.decoding import Decoding

__all__ = ["add_answer_options", "checked_decoding"]


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the folder to answer from and the options of both commands."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="?",
        default=str(LATEST),
        help="folder of a run, an adapter or a model (default: runs/latest)",
    )
    parser.add_argument(
        "--model",
        help="the adapter's base: a folder, or a name on the Hub (default: the one that the run's files name)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message, which comes before the first question")
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        help="an answer is cut off after so many tokens (default: 512, or half of the model's context if that is less)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        default="0",
        help="0 always takes the likeliest token; above, up to 10, tokens are drawn at random, the more evenly the higher it is (default: 0)",
    )
    parser.add_argument("--seed", metavar="N", default="0", help="of the random draws (default: 0)")


def checked_decoding(args: argparse.Namespace, base: bool) -> Decoding:
    """How to decode. Refuses what can be refused before the libraries are loaded.

    Args:
        base: whether the base is to answer, which a whole model does not have.

    Raises:
        ValueError, OSError: an option has a bad value; or there is nothing in the folder.
    """
    given = {name: vars(args)[name] for name in ("max_new_tokens", "temperature", "seed")}
    decoding = Decoding(**{name: number_or_text(text) for name, text in given.items() if text is not None})
    for name in ("system", "model"):
        if (value := vars(args)[name]) is not None and not value.strip():
            raise ValueError(f"--{name}={value!r}: must not be empty; leave it out for none")
    found = locate(args.adapter)
    if args.model is not None and not Path(args.model).is_dir() and re.match(r"[./~\\]|\w:", args.model):
        raise FileNotFoundError(f"--model={args.model!r}: there is no such folder")
    if args.model is not None and not is_adapter(found):
        raise ValueError(f"--model={args.model!r}: {found} is a whole model, which needs no base: leave it out")
    if base and not is_adapter(found):
        raise ValueError(f"{found} is a whole model, without an adapter: it has no base that would answer otherwise")
    return decoding
