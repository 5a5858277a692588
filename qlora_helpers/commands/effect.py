"""`python -m qlora_helpers effect`: whether an adapter took effect, and if it did not, why."""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_helpers.adapters.tuned import locate
from qlora_helpers.commands.merge import add_proof_options
from qlora_helpers.commands.settings_options import number_or_text
from qlora_helpers.validation import whole
from qlora_helpers.visible import harmless

__all__ = ["add_arguments", "command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Did the adapter take effect? Asks the base, the adapter and, if given, a merged model the same questions, compares "
        "answers and logits, and says why nothing has changed, if that is so: names of tensors that PEFT does not find, a B "
        "that is zero, a scale of zero, another base, a merge that rounded all of it away."
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run or of an adapter")
    parser.add_argument("--merged", type=Path, metavar="FOLDER", help="a model into which the adapter was merged")
    add_proof_options(parser)


def command(args: argparse.Namespace) -> int:
    """Compare, and say what was found.

    Returns:
        0 if the adapter takes effect, also in the merged model; else 1.

    Raises:
        ValueError, OSError: there is nothing to compare; the message says what to do.
    """
    limit = whole("--max-new-tokens", number_or_text(args.max_new_tokens))
    locate(args.adapter)
    if args.merged is not None and not args.merged.is_dir():
        raise FileNotFoundError(f"--merged={str(args.merged)!r}: there is no such folder")
    print("Loading the libraries …", flush=True)
    from qlora_helpers.adapters.effect import effect_of

    asked = "the base and the adapter" if args.merged is None else "the base, the adapter and the merged model"
    print(f"Asking {asked} …", flush=True)
    found = effect_of(args.adapter, merged=args.merged, questions=args.questions, base=args.model, max_new_tokens=limit)
    if found.questions:
        print(f"Asked: {found.questions}.")
    print(harmless(str(found)))
    return 0 if found.took_effect else 1
