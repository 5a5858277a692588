"""`python -m qlora_helpers merge`: from an adapter to a merged model, with proof that it answers as the adapter does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qlora_helpers.adapters.tuned import locate
from qlora_helpers.commands.command_line import command_line
from qlora_helpers.commands.settings_options import number_or_text
from qlora_helpers.validation import whole
from qlora_helpers.visible import harmless

__all__ = ["add_arguments", "add_proof_options", "command"]

WAYS = ("16bit", "dequantised", "4bit")
WHICH = (  # also for other commands that merge; `adapters.merge.way_of_merging` chooses
    "The default is what was trained: dequantised for a run on a 4-bit base, 16bit for one on an unquantised base.\n"
    "Only then does the result answer as the model did that the run has scored."
)
_DESCRIPTION = f"""\
Merges an adapter into its base, and proves it: transformers alone loads the merged folder and is asked the same
questions as the adapter. OUT appears complete or not at all.

  dequantised  the 4-bit weights that were trained on, decoded, plus the adapter: what was trained, in 16 bits
  16bit        the original weights plus the adapter, from file to file: exact arithmetic, on weights that a run in 4 bits
               has never seen
  4bit         the 4-bit weights plus the adapter, rounded to 4 bits again: small changes are lost, unless the run was
               trained for it (--merge-aware; then it is the default), as lesson 6 shows

{WHICH}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, _DESCRIPTION
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run or of an adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder for the merged model")
    parser.add_argument("--into", choices=WAYS, help="the way of merging, as above (default: what was trained)")
    add_proof_options(parser)
    parser.add_argument(
        "--no-proof",
        action="store_true",
        help="merge only; the card then says that nothing was proven. With --into 16bit it needs little memory",
    )


def add_proof_options(parser: argparse.ArgumentParser) -> None:
    """Add what says where the base is, and which questions are asked; also for other commands that compare models."""
    parser.add_argument(
        "--base",
        "--model",
        dest="model",
        metavar="M",
        help="the adapter's base: a folder, or a name on the Hub (default: the one that the run's files name)",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="ask the questions of a file, as `ask --file` takes it (default: a few of the run's own data, if it is still there, "
        "else of general knowledge)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", default="64", help="an answer is cut off after so many tokens (default: 64)"
    )


def command(args: argparse.Namespace) -> int:
    """Merge, and say what was found.

    Returns:
        0; or 1 if the proof does not hold: the merged model is then kept under another name.

    Raises:
        ValueError, OSError: it cannot be merged, or not in this way; the message says what to do.
    """
    limit = whole("--max-new-tokens", number_or_text(args.max_new_tokens))
    if args.no_proof and args.questions:
        raise ValueError("--no-proof asks no questions: leave out one of --no-proof and --questions")
    locate(args.adapter)
    print("Loading the libraries …", flush=True)
    from qlora_helpers.adapters.proven_merge import CARD, PROOF, NotProven, merge_with_proof, plan_merge

    plan = plan_merge(args.adapter, args.out, args.into, base=args.model, prove=not args.no_proof)
    print(f"Merging {harmless(str(plan.tuned))},\ninto {plan.into}: {plan.why}.", flush=True)
    try:
        proof = merge_with_proof(
            plan, args.out, questions=args.questions, max_new_tokens=limit, prove=not args.no_proof, say=_say
        )
    except NotProven as error:
        sys.stdout.flush()
        print(f"\n{harmless(str(error))}.", file=sys.stderr)
        return 1
    print(f"\n{harmless(str(proof))}" if proof else "\nNot proven: --no-proof.")
    print(f"The merged model is in {args.out}, with its card ({CARD}) and these figures ({PROOF}).")
    print(f"To talk to it: {command_line('chat', args.out)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
