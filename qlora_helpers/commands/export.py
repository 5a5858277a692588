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
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from qlora_helpers.adapters.gguf_export import GGUFFile

__all__ = ["add_arguments", "command"]

KINDS = ("f16", "bf16", "f32", "q8_0")
INTO = ("16bit", "dequantised")
QUESTIONS = 20  # of the file of --check; more say little more, and each is answered three times
MODELFILE = "Modelfile"
_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
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
        default="16bit",
        help="what the adapter is added to: 16bit, the original weights; or dequantised, the 4-bit weights that the run "
        "trained on, written out (default: 16bit)",
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
    from qlora_helpers.adapters.gguf_export import check_exportable, export_gguf
    from qlora_helpers.adapters.hops import prove, prove_tokenizer
    from qlora_helpers.models.fetched import FETCHABLE
    from qlora_helpers.models.folder_config import read_config
    from qlora_helpers.models.loading import folder_of, load_tokenizer, name_in

    own = found.base or str(found.folder)
    # before weights are fetched
    check_exportable(read_config(folder_of(own, weights=False), own, argument="base"), own)
    fetched = FETCHABLE.get(found.base or "")
    base = found.base if found.base is None or not Path(found.base).is_dir() else name_in(Path(found.base))
    print(f"This is {found}.", flush=True)
    with _merged(found, args.into, args.merged, args.out) as folder:
        file = export_gguf(
            folder,
            args.out,
            args.type,
            name=args.out.stem,
            base=fetched.title if fetched else base,
            licence=fetched.licence if fetched else None,
        )
        try:
            if questions:
                proof = prove(file.path, folder, questions, live=_live(found, args.into))
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
    _say(args, file, said, found)
    return 0


def _check(args: argparse.Namespace) -> None:
    validation.one_of("--type", args.type, KINDS)
    validation.one_of("--into", args.into, INTO)
    if args.out.suffix.lower() != ".gguf":
        raise ValueError(f"OUT={str(args.out)!r}: its name must end in .gguf")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"OUT={str(args.out)!r}: there is no folder {args.out.parent}: make it first")
    new = [("OUT", args.out), *[("--merged", args.merged)] * (args.merged is not None)]
    for name, path in [*new, *[("--modelfile", args.out.parent / MODELFILE)] * args.modelfile]:
        if os.path.lexists(path):
            raise FileExistsError(f"{name}={str(path)!r} is there already: name a new one, or move it away")


@contextmanager
def _merged(found: TunedFiles, into: str, keep: Path | None, out: Path) -> Iterator[Path]:
    """The folder of the whole model, merged first if it is an adapter; it is kept under the name `keep`, or removed.

    Raises:
        ValueError, OSError: `keep` is given for a whole model, or the adapter cannot be merged.
    """
    if found.base is None:
        if keep is not None:
            raise validation.refuse("--merged", str(keep), f"{found.folder} is a whole model already: leave it out")
        yield found.folder
        return
    place = (keep or out).absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{(keep or out).name}.", suffix=".qlora-new", dir=place))
    try:
        folder = temporary / "merged"
        _merge(found, into, folder)
        for name in _OF_TOKENIZERS:  # that with which it was trained
            if (found.folder / "tokenizer.json").is_file():
                (folder / name).unlink(missing_ok=True)
                if (found.folder / name).is_file():
                    shutil.copyfile(found.folder / name, folder / name)
        yield folder
        if keep is not None:
            folder.rename(keep)
    finally:
        shutil.rmtree(temporary)


def _merge(found: TunedFiles, into: str, folder: Path) -> None:
    from qlora_helpers.adapters.file_merge import merge_files
    from qlora_helpers.adapters.merge import merge_into
    from qlora_helpers.models.folder_config import read_config, saved_in_4_bits
    from qlora_helpers.models.loading import folder_of, load_tokenizer
    from qlora_helpers.models.saving import save_model

    base = folder_of(found.base)
    config = read_config(base, found.base, argument="base")
    if into == "16bit":
        if saved_in_4_bits(config, found.base, argument="base"):
            raise ValueError(
                f"base={found.base!r} was saved in 4 bits: name the 16-bit model that it was made from (--base M), or take "
                "--into dequantised"
            )
        merge_files(base, found.folder, folder)
        return
    import torch

    model = merge_into(_dequantised(found))
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    save_model(model, load_tokenizer(found.base), folder, dtype=getattr(torch, dtype))


def _dequantised(found: TunedFiles):
    """The adapter on the 4-bit weights that it was trained on, written out."""
    from qlora_helpers.adapters.files import load_adapter
    from qlora_helpers.models.loading import load_model

    if found.quantization is None:
        raise validation.refuse("--into", "dequantised", "this adapter was trained on unquantised weights: take 16bit")
    base = load_model(found.base, found.quantization, found.double_quant)
    return load_adapter(base.dequantize(), found.folder)


def _live(found: TunedFiles, into: str) -> Callable | None:
    """Loads the adapter on the weights that it is merged into, with its tokenizer; None for a whole model."""
    if found.base is None:
        return None

    def load():
        from qlora_helpers.adapters.files import load_adapter
        from qlora_helpers.models.loading import load_model, load_tokenizer

        has_own = (found.folder / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(str(found.folder) if has_own else found.base)
        if into == "dequantised":
            return _dequantised(found), tokenizer
        return load_adapter(load_model(found.base, quantization=None), found.folder), tokenizer

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
