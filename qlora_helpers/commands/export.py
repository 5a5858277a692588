"""`python -m qlora_helpers export`: what a run has trained as one file for llama.cpp and Ollama, checked hop by hop."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers import validation
from qlora_helpers.adapters.tuned import LATEST, TunedFiles, find_tuned
from qlora_helpers.chats.questions import read_questions
from qlora_helpers.commands.merge import WHICH
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from qlora_helpers.adapters.gguf_export import GGUFFile
    from qlora_helpers.adapters.proven_merge import MergePlan

__all__ = ["add_arguments", "command"]

KINDS = ("f16", "bf16", "f32", "q8_0")
INTO = ("dequantised", "16bit")  # a file takes no weights of bitsandbytes
QUESTIONS = 20  # of the file of --check; more say little more, and each is answered three times
MODELFILE = "Modelfile"
_ANY = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Why is it so?"}]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Merge an adapter into its base and write the result as one GGUF file, which llama.cpp and Ollama load: models of "
        "the families Llama and Qwen2. The tokenizer and the chat template in the file are read back and compared; with "
        "--check, so are weights, logits and answers at each hop. Ends with the commands that serve the file."
    )
    parser.add_argument("adapter", metavar="ADAPTER", help=f"folder of a run, an adapter or a model, such as {LATEST}")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="the new file")
    parser.add_argument("--to", choices=("gguf",), default="gguf", help="the format (default: gguf)")
    parser.add_argument(
        "--type",
        default="f16",
        help="of the matrices: f16, bf16, f32, or q8_0 for 8.5 bits a weight (default: f16)",
    )
    parser.add_argument(
        "--base",
        metavar="M",
        help="the adapter's base: a folder, or a name on the Hub (default: the one that the run's files name)",
    )
    parser.add_argument(
        "--into",
        help="what the adapter is added to, as for merge: dequantised, the 4-bit weights that the run trained on, written "
        f"out; or 16bit, the original weights, which takes little memory. {WHICH}",
    )
    parser.add_argument(
        "--merged", metavar="FOLDER", type=Path, help="keep the merged model, too, in this new folder, as for vLLM"
    )
    parser.add_argument(
        "--modelfile", action="store_true", help="write a Modelfile beside OUT, with the chat template for Ollama"
    )
    parser.add_argument(
        "--check",
        metavar="FILE",
        type=Path,
        help=f"ask the first {QUESTIONS} questions of this file (.txt, .jsonl, .csv) of the adapter, of the merged model and "
        "of the file, and compare",
    )


def command(args: argparse.Namespace) -> int:
    """Export, and return 0; 1 if a check does not hold, and then the file is not kept.

    Raises:
        ValueError, OSError: an option has a fault, there is nothing to export, or it cannot be exported; the message says
            why.
    """
    _check(args)
    questions = [question.chat for question in read_questions(args.check)[:QUESTIONS]] if args.check else []
    try:
        found = find_tuned(args.adapter, args.base)
    except ValueError as error:
        raise ValueError(str(error).replace("--model ", "--base ").replace("model=", "base=")) from error
    print("Loading the libraries …", flush=True)
    from qlora_helpers.adapters.gguf_export import check_exportable, export_gguf, licence_of
    from qlora_helpers.adapters.hops import prove, prove_tokenizer
    from qlora_helpers.adapters.proven_merge import keep_proof
    from qlora_helpers.models.fetched import FETCHABLE
    from qlora_helpers.models.folder_config import read_config
    from qlora_helpers.models.loading import folder_of, load_tokenizer, name_in

    own = found.base or str(found.folder)
    # before weights are fetched
    check_exportable(read_config(folder_of(own, weights=False), own, argument="base"), own)
    fetched = FETCHABLE.get(found.base or "")
    base = found.base if found.base is None or not Path(found.base).is_dir() else name_in(Path(found.base))
    print(f"This is {found}.", flush=True)
    plan = _plan(args, found)
    if plan is not None:
        print(f"Merging into {plan.into}: {plan.why}.", flush=True)
    with _merged(found, plan, args.merged, args.out) as folder:
        file = export_gguf(
            folder,
            args.out,
            args.type,
            name=args.out.stem,
            base=fetched.title if fetched else base,
            licence=fetched.licence if fetched else licence_of(folder_of(own, weights=False)),
        )
        try:
            if questions:
                asked = "the model" if plan is None else "the adapter, the merged model"
                many = f"{len(questions)} question{'s' * (len(questions) != 1)}"
                print(f"Asking {asked} and the file, which is read back, {many} …", flush=True)
                proof = prove(file.path, folder, questions, live=_live(plan))
                broken, said = proof.broken is not None, str(proof)
            else:
                chats = _ANY if file.tokenizer.template else []
                checks = prove_tokenizer(file.path, load_tokenizer(str(folder)), chats)
                wrong = next((check for check in checks if not check.holds), None)
                broken = wrong is not None
                said = f"{wrong.what}: {wrong.measured}; expected: {wrong.expected}" if wrong else ""
        except BaseException:  # a file that was not compared is not kept either
            args.out.unlink()
            raise
        if broken:
            args.out.unlink()
            print(f"{said}\n{args.out} is not kept.")
            return 1
        if plan is not None and questions:
            keep_proof(folder, said)
    _say(args, file, said, found)
    return 0


def _check(args: argparse.Namespace) -> None:
    validation.one_of("--type", args.type, KINDS)
    if args.into is not None:
        validation.one_of("--into", args.into, INTO)
    if args.out.suffix.lower() != ".gguf":
        raise ValueError(f"OUT={str(args.out)!r}: its name must end in .gguf")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"OUT={str(args.out)!r}: there is no folder {args.out.parent}: make it first")
    new = [("OUT", args.out), *[("--merged", args.merged)] * (args.merged is not None)]
    for name, path in [*new, *[("--modelfile", args.out.parent / MODELFILE)] * args.modelfile]:
        if os.path.lexists(path):
            raise FileExistsError(f"{name}={str(path)!r} is there already: name a new one, or move it away")


def _plan(args: argparse.Namespace, found: TunedFiles) -> MergePlan | None:
    """How the adapter is merged; None for a whole model.

    Raises:
        ValueError, OSError: it cannot be merged, or not in this way; or `--merged` is given for a whole model.
    """
    from qlora_helpers.adapters.proven_merge import plan_merge

    if found.base is None:
        for name, given in (("--merged", args.merged), ("--into", args.into)):
            if given is not None:
                raise validation.refuse(name, str(given), f"{found.folder} is a whole model already: leave it out")
        return None
    place = args.merged or args.out.with_name(f".{args.out.name}")  # which disk it will be on
    prove, by_files = args.check is not None, "--into 16bit, without --check"
    into = "dequantised" if args.into is None and found.merge_aware else args.into  # a GGUF file is made from 16 bits
    return plan_merge(found.folder, place, into, base=args.base, prove=prove, by_files=by_files)


@contextmanager
def _merged(found: TunedFiles, plan: MergePlan | None, keep: Path | None, out: Path) -> Iterator[Path]:
    """The folder of the whole model, merged first if it is an adapter; it is kept under the name `keep`, or removed.

    Raises:
        ValueError, OSError: the adapter cannot be merged.
    """
    if plan is None:
        yield found.folder
        return
    from qlora_helpers.adapters.proven_merge import merge_with_proof

    place = (keep or out).absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{(keep or out).name}.", suffix=".qlora-new", dir=place))
    try:
        folder = temporary / "merged"
        merge_with_proof(plan, folder, prove=False)  # the proof follows, of this hop and of the next
        yield folder
        if keep is not None:
            folder.rename(keep)
    finally:
        shutil.rmtree(temporary)


def _live(plan: MergePlan | None) -> Callable | None:
    """Loads the adapter on the weights that it is merged into, with its tokenizer; None for a whole model."""
    if plan is None:
        return None

    def load():
        from qlora_helpers.adapters.effect import tokenizer_of
        from qlora_helpers.adapters.files import load_adapter
        from qlora_helpers.models.loading import load_model

        found = plan.tuned
        if plan.into == "16bit":
            base = load_model(found.base, quantization=None)
        else:
            base = load_model(found.base, found.quantization, found.double_quant).dequantize()
        return load_adapter(base, found.folder), tokenizer_of(found)

    return load


def _say(args: argparse.Namespace, file: GGUFFile, said: str, found: TunedFiles) -> None:
    from qlora_helpers.adapters.gguf_tokenizer import read_tokenizer
    from qlora_helpers.adapters.serving import modelfile, serving_lines
    from qlora_helpers.json_files import write_new
    from qlora_helpers.models.loading import folder_of

    print(f"Written: {file.path}, {in_words(file.bytes)}, {file.tensors} tensors in {file.kind}.")
    print(said or "The tokenizer and the chat template, read back, are the same. --check FILE compares answers, too.")
    for remark in file.remarks:
        print(f"- {remark}")
    reason, written = "", False
    try:
        text = modelfile(file.path, read_tokenizer(file.path), file.tokenizer.add_bos)
    except ValueError as error:
        reason = str(error)
    else:
        if args.modelfile:
            write_new(file.path.parent / MODELFILE, [text.encode("utf-8")])
            written = True
    rank = None
    if found.base is not None:
        from qlora_helpers.adapters.files import describe

        rank = describe(found.folder).rank
    adapter = None if found.base is None else str(found.folder)
    merged = str(args.merged) if args.merged else (str(found.folder) if found.base is None else None)
    base = found.base
    if base is not None and "/" not in base and not Path(base).is_dir():  # a name that only this package knows
        base = str(folder_of(base))
    print(f"\n{serving_lines(file.path, file.tokenizer.template, merged, adapter, base, rank, written, reason)}")
