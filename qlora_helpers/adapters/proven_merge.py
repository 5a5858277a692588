"""From an adapter to a merged model in a folder, with proof: plain transformers loads the folder and gives the same answers.

The adapter on its base is asked first, then it is merged, and the merged files are loaded by transformers alone and asked
the same. What was found is kept in the folder, in `merge.json` and in its card. A merge of which the proof does not hold gets
another name, so that nothing is lost, and nothing that looks for the folder takes it for a good one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from huggingface_hub import metadata_load
from transformers import AutoTokenizer

from qlora_helpers import validation
from qlora_helpers.adapters.card import merged_card
from qlora_helpers.adapters.effect import NOTHING, causes_in, said_of_survival, survival_of, tokenizer_of
from qlora_helpers.adapters.file_merge import changes_of, merge_files
from qlora_helpers.adapters.files import check_base, describe, load_adapter, read_adapter_config
from qlora_helpers.adapters.lora_options import IN_MEMORY, PLAIN, check_options
from qlora_helpers.adapters.merge import BASES, merge_into, way_of_merging
from qlora_helpers.adapters.plain_loading import let_go, loaded_plainly
from qlora_helpers.adapters.questions import Questions, questions_for
from qlora_helpers.adapters.same_answers import Likeness, Said, compared, said
from qlora_helpers.adapters.survival import Survival
from qlora_helpers.adapters.tuned import TunedFiles, find_tuned
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.json_files import read_json_if_whole, write_json, write_whole
from qlora_helpers.memory import find_shape, predict_merge
from qlora_helpers.models.fingerprint import fingerprint, weight_files
from qlora_helpers.models.folder_config import read_config, saved_in_4_bits
from qlora_helpers.models.loading import folder_of, load_model, name_in
from qlora_helpers.models.saving import save_model
from qlora_helpers.safe_folders import whole_folder
from qlora_helpers.settings import GPU_RUN
from qlora_helpers.training.merge_aware import MergeAware
from qlora_helpers.training.run_folder import read_record
from qlora_helpers.units import in_words

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "EXPECTED",
    "PROOF",
    "Expected",
    "MergePlan",
    "NotProven",
    "Proof",
    "keep_proof",
    "merge_with_proof",
    "plan_merge",
]

PROOF, CARD = "merge.json", "README.md"
UNPROVEN = "-unproven"  # is added to the name of a folder of which the proof does not hold
# of a model's folder: what belongs to a merged model, too; a base's scores or card do not
_KEPT = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|"
    r".*\.model|chat_template.*|additional_chat_templates|(preprocessor|processor)_config\.json|model.*\.safetensors.*|"
    r"(LICEN[CS]E|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*"
)


@dataclass(frozen=True)
class Expected:
    """What lesson 6 measured for one way of merging, and what a merge may have.

    Shifts are mean differences of logits between the adapter and the merged model, as a share of those between the adapter
    and its base: 0 is the adapter itself, and 1 is as far away as a model without it.

    Attributes:
        measured: of the shipped model, and of one of 8B after a short run.
        at_most: the most that a merge may have, a few times as much, since models differ.
        floor: what it may have however little the adapter changes: a share of the spread of the adapter's logits.
        survives: the least share of B A that must be in the merged weights.
        in_each_layer: whether this holds for each layer, or for all together.
        why: where the difference comes from, in a few words.
    """

    measured: tuple[float, float]
    at_most: float
    floor: float
    survives: float
    in_each_layer: bool
    why: str


EXPECTED = {
    "dequantised": Expected((0.004, 0.014), 0.06, 0.03, 0.9, True, "what was trained, but for rounding to 16 bits"),
    "16bit": Expected((0.21, 0.18), 0.8, 0.3, 0.9, True, "the quantisation error, which these weights do not have"),
    "4bit": Expected((0.27, 0.99), 0.8, 0.0, 0.5, False, "rounding to 4 bits again, which takes away small changes"),
}


# the same after merge-aware steps: they trained with these weights. How much of B A is in them says nothing then
TRAINED_FOR = Expected(
    (0.0, 0.0), 0.06, 0.03, float("-inf"), False, "the weights that the run's last steps trained with"
)


def _expected(into: str, trained_for: bool) -> Expected:
    return TRAINED_FOR if trained_for else EXPECTED[into]


class NotProven(ValueError):
    """The merged model does not do what the adapter does; the message says what was found, and where it is kept."""


@dataclass(frozen=True)
class MergePlan:
    """What will be merged, and how.

    Attributes:
        tuned: the adapter and its base.
        base: the base's folder.
        into: "16bit", "dequantised" or "4bit".
        why: the reason for this way, in a sentence.
        by_files: whether it is merged from file to file, with one weight in memory at a time.
    """

    tuned: TunedFiles
    base: Path
    into: str
    why: str
    by_files: bool

    @property
    def trained_for(self) -> bool:
        """Whether the run's last steps were trained for this merge, so that it is held against what they computed."""
        return self.into == "4bit" and self.tuned.merge_aware


@dataclass(frozen=True)
class Proof:
    """What was found when plain transformers loaded a merged folder.

    Attributes:
        into: the way of merging.
        questions: what was asked, in words.
        adapter: the adapter against its base: what it changes.
        merged: the adapter against the merged model.
        base: the base against the merged model, along the adapter's answers.
        survived: how much of B A is in the merged weights; None if the adapter is more than plain LoRA.
        faults: what does not hold; () if all does.
        trained_for: whether the run's last steps were trained for this merge; the adapter is then the model that it trained.
    """

    into: str
    questions: str
    adapter: Likeness
    merged: Likeness
    base: Likeness
    survived: Survival | None
    faults: tuple[str, ...]
    trained_for: bool = False

    @property
    def holds(self) -> bool:
        return not self.faults

    @property
    def share(self) -> float:
        """The shift of the merged model, as a share of what the adapter changes."""
        return self.merged.mean_logit_difference / self.adapter.mean_logit_difference

    def __str__(self) -> str:
        found, expected = self.merged, _expected(self.into, self.trained_for)
        shipped, large = expected.measured
        measured = f"{shipped:.1%}" if self.trained_for else f"{shipped:.1%} and, at 8B, {large:.1%}"
        lines = [
            f"Loaded by transformers alone, it gives {found.same_answers} of {found.prompts} answers as the adapter does "
            f"({self.questions}, greedy).",
            f"Logits differ by {found.mean_logit_difference:.4f} on average and {found.largest_logit_difference:.3f} at most, KL "
            f"{found.mean_kl:.2g} nats per token: {self.share:.1%} of what the adapter changes.",
            f"Expected of {self.into}: lesson 6 measured {measured} ({expected.why}).",
        ]
        if self.survived is not None:
            lines.append(f"In the weights: {said_of_survival(self.survived)}.")
        if found.first_difference:
            lines.append(f"The first that differs: {found.first_difference}.")
        if self.holds and self.share > expected.at_most:
            lines.append(
                "That is much beside what the adapter changes, which is little here. Into dequantised, less is lost: that is what "
                "was trained."
            )
        lines += [f"Does not hold: {fault}." for fault in self.faults]
        return "\n".join(lines)


# ---- What will be done


def plan_merge(
    adapter: str | Path,
    folder: str | Path,
    into: str | None = None,
    *,
    base: str | None = None,
    prove: bool = True,
    hardware: Hardware | None = None,
    by_files: str = "--into 16bit --no-proof",
) -> MergePlan:
    """Choose the way of merging, and refuse what cannot be done, before any weight is loaded.

    Args:
        adapter: the folder of an adapter or of a run.
        folder: for the merged model.
        into: "16bit", "dequantised" or "4bit"; by default what was trained: 4bit after merge-aware steps, else dequantised
            if the run trained on a 4-bit base, 16bit if on an unquantised one.
        base: where the adapter's base is, if it is not where the files say.
        prove: whether the merged model is to be loaded.
        hardware: what to load for; by default what `detect()` finds.
        by_files: how the caller's user asks for a merge from file to file, as errors say it.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no adapter.
        FileExistsError: `folder` holds files.
        WrongBase: the adapter was trained on another base.
        HubError: the base could not be fetched from the Hub.
        OSError: not enough room on the disk.
        ValueError: not enough memory; or the adapter has no effect, cannot be merged, or not in this way. The message names
            the cure.
    """
    hardware = given_or_detected(hardware)
    if into is not None:
        validation.one_of("into", into, BASES)
    tuned = find_tuned(adapter, base)
    if tuned.base is None:
        raise validation.refuse(
            "adapter", str(adapter), f"{tuned.folder} is a whole model already: there is nothing to merge"
        )
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise FileExistsError(f"{folder} is there already: name a new folder")
    check_options(f"the adapter in {tuned.folder}", read_adapter_config(tuned.folder), IN_MEMORY)
    base_folder = folder_of(tuned.base)
    check_base(describe(tuned.folder), tuned.folder, name_in(base_folder), fingerprint(base_folder))
    if causes := [cause for cause in causes_in(tuned.folder, base_folder) if not cause.partly]:
        raise ValueError(
            f"the adapter in {tuned.folder} cannot be merged as it is: {'; '.join(cause.said for cause in causes)}"
        )
    into, why = way_of_merging(tuned, base_folder, into)
    plan = MergePlan(
        tuned, base_folder, into, why, by_files=into == "16bit" and _merges_by_files(base_folder, tuned.folder)
    )
    _check_disk(plan, Path(folder))
    _check_memory(plan, prove, hardware, by_files)
    return plan


def _merges_by_files(base: Path, adapter: Path) -> bool:
    """Whether an adapter that fits is plain LoRA on linear layers, which `merge_files` takes."""
    try:
        check_options("adapter", read_adapter_config(adapter), PLAIN)
        changes_of(base, read_config(base, str(base), argument="base"), adapter)
    except ValueError:
        return False
    return True


def _check_disk(plan: MergePlan, folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    stored = sum(path.stat().st_size for path in weight_files(plan.base))
    packed = saved_in_4_bits(read_config(plan.base, str(plan.base)), str(plan.base))
    need = {"4bit": stored if packed else stored // 4, "dequantised": 3 * stored if packed else stored}.get(
        plan.into, stored
    )
    free = shutil.disk_usage(there).free
    if need > free:
        raise OSError(
            f"the merged model takes {in_words(need)}, and the disk of {folder} has {in_words(free)} left: free some space, or "
            "name a folder on another disk"
        )


def _check_memory(plan: MergePlan, prove: bool, hardware: Hardware, by_files: str) -> None:
    """Refuse what is predicted not to fit; a shape that the predictor does not know is not checked."""
    if plan.by_files and not prove:
        return
    dtype = str(hardware.compute_dtype).removeprefix("torch.")
    try:
        memory = predict_merge(find_shape(plan.base), plan.into, replace(GPU_RUN, compute_dtype=dtype))
    except (ValueError, AttributeError):
        return
    need = memory.merged_bytes if plan.by_files else memory.peak_bytes
    where = "the GPU" if hardware.device == "cuda" else "main memory"
    free = torch.cuda.mem_get_info()[0] if hardware.device == "cuda" else psutil.virtual_memory().available
    if need > free:
        cure = "take a machine with more"
        if _merges_by_files(plan.base, plan.tuned.folder):
            cure += f", or merge from file to file, which needs little, without proof: {by_files}"
        raise ValueError(
            f"a merge of {plan.tuned.base} into {plan.into} takes {in_words(need)} of {where}, and {in_words(free)} is free: {cure}"
        )


# ---- The merge and its proof


def merge_with_proof(
    plan: MergePlan,
    folder: str | Path,
    *,
    questions: str | Path | None = None,
    max_new_tokens: int = 64,
    prove: bool = True,
    hardware: Hardware | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Proof | None:
    """Merge, and prove that the folder does what the adapter does.

    The folder appears complete or not at all. It holds what plain transformers loads, a card, and `merge.json`.

    Args:
        plan: from `plan_merge`.
        folder: for the merged model.
        questions: a file of questions (`qlora_helpers.adapters.questions.questions_for` says what is asked without it).
        max_new_tokens: an answer is cut off after so many.
        prove: False to merge only; the card then says that nothing was measured.
        hardware: what to load for; by default what `detect()` finds.
        say: called with a line before each part that takes long.

    Returns:
        What was found; None without proof.

    Raises:
        NotProven: the merged model does not do what the adapter does, or cannot be loaded. It is kept beside `folder`, under
            its name with "-unproven" behind, and its card says so.
        FileExistsError, OSError: `folder` holds files, or cannot be written.
        ValueError: the adapter changes none of the answers' logits; or as `load_adapter`, `merge_into` and `said` do.
    """
    hardware = given_or_detected(hardware)
    asked = questions_for(plan.tuned, tokenizer_of(plan.tuned), questions) if prove else None
    with whole_folder(folder) as part:
        model, own, base = None, None, None
        if prove or not plan.by_files:
            model = _loaded(plan.tuned, plan.tuned.quantization, hardware)
        if asked is not None:
            say(f"Asking the adapter and its base ({asked.source}) …")
            own, base = _asked(plan, model, asked, max_new_tokens)
        if (other := _other_base(plan)) is not None:
            model = None
            let_go()
            model = _loaded(plan.tuned, other or None, hardware)
        if plan.by_files:
            model = None
        say("Writing the merged weights …")
        _write(plan, model, part, hardware)
        model = None
        let_go()
        about = _about(plan)
        if asked is None:
            _describe_folder(part, about, None)
            return None
        with _kept_if_not_proven(part, Path(folder), about):
            say("Asking the merged model the same …")
            proof = _proof(plan, part, asked, own, base, max_new_tokens, hardware)
            _describe_folder(part, about, proof)
            if not proof.holds:
                raise NotProven(str(proof))
    return proof


def _loaded(tuned: TunedFiles, quantization: str | None, hardware: Hardware) -> PeftModel:
    return load_adapter(load_model(tuned.base, quantization, tuned.double_quant, hardware), tuned.folder)


def _other_base(plan: MergePlan) -> str | bool | None:
    """The quantisation of the base that is merged into, where it is not the one that was trained on; None if it is."""
    if plan.into == "16bit" and not plan.by_files and plan.tuned.quantization is not None:
        return False
    return "nf4" if plan.into == "4bit" and plan.tuned.quantization is None else None


def _asked(plan: MergePlan, model: PeftModel, asked: Questions, max_new_tokens: int) -> tuple[Said, Said]:
    """What the adapter says, and what its base says along that."""
    tokenizer = tokenizer_of(plan.tuned)
    with MergeAware(1).in_layers_of(model) if plan.trained_for else nullcontext():
        own = said(model, tokenizer, asked.chats, max_new_tokens=max_new_tokens)
    with model.disable_adapter():
        base = said(model, tokenizer, asked.chats, max_new_tokens=max_new_tokens, along=own)
    if compared(own, base).shift < NOTHING:
        raise ValueError(
            f"the adapter in {plan.tuned.folder} changes nothing in the answers to these questions ({asked.source}), so a merge "
            "could not be told from its base: name others with --questions, or see why with  python -m qlora_helpers effect"
        )
    return own, base


def _write(plan: MergePlan, model: PeftModel | None, part: Path, hardware: Hardware) -> None:
    """Write the merged weights, the configs and the tokenizer into a folder."""
    plain = AutoTokenizer.from_pretrained(_tokenizer_folder(plan), local_files_only=True, trust_remote_code=False)
    if plan.by_files:
        merge_files(plan.base, plan.tuned.folder, part)
    else:
        save_model(_merged(plan, model), plain, part, dtype=_dtype_of_files(plan, hardware))
        for path in plan.base.iterdir():
            if path.is_file() and re.match(r"(LICEN[CS]E|NOTICE|USE_POLICY)", path.name, re.IGNORECASE):
                shutil.copyfile(path, part / path.name)
    for path in part.iterdir():  # what the base says of itself is not true of a merged model
        own_tokenizer = plan.by_files and _tokenizer_folder(plan) != plan.base and _TOKENIZER.fullmatch(path.name)
        if not _KEPT.fullmatch(path.name) or own_tokenizer:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if plan.by_files and _tokenizer_folder(plan) != plan.base:
        plain.save_pretrained(part)


def _tokenizer_folder(plan: MergePlan) -> Path:
    own = any((plan.tuned.folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return plan.tuned.folder if own else plan.base


def _merged(plan: MergePlan, model: PeftModel) -> PreTrainedModel:
    if plan.into != "dequantised":
        return merge_into(model)
    # PEFT adds to what a layer holds: the base is decoded first, and gets the adapter again
    return merge_into(load_adapter(model.unload().dequantize(), plan.tuned.folder))


def _dtype_of_files(plan: MergePlan, hardware: Hardware) -> torch.dtype | None:
    """What 16-bit weights are saved in: as computed, and on a CPU, which computes in float32, as the base was saved."""
    if plan.into == "4bit":
        return None
    config = read_config(plan.base, str(plan.base))
    saved = {"float16": torch.float16, "float32": torch.float32}.get(config.get("dtype") or config.get("torch_dtype"))
    return saved or torch.bfloat16 if hardware.compute_dtype == torch.float32 else hardware.compute_dtype


def _about(plan: MergePlan) -> dict[str, Any]:
    """What was merged, for the card and for `merge.json`."""
    found, folder = describe(plan.tuned.folder), plan.tuned.folder.resolve()
    card = plan.base / CARD
    metadata = (metadata_load(card) if card.is_file() else None) or {}
    licence = metadata.get("license")
    return {
        "base": found.base,
        "base_fingerprint": fingerprint(plan.base),
        "adapter": f"{folder.parent.name}/{folder.name}" if read_record(folder.parent) else folder.name,
        "adapter_fingerprint": fingerprint(folder),
        "rank": found.rank,
        "alpha": found.alpha,
        "modules": list(found.modules),
        "into": plan.into,
        "why": plan.why,
        "trained_on": plan.tuned.quantization or "unquantised",
        "base_licence": licence if isinstance(licence, str) else None,
    }


def _describe_folder(part: Path, about: dict[str, Any], proof: Proof | None, failed: str = "") -> None:
    report = about | {"proof": None if proof is None else asdict(proof) | {"holds": proof.holds, "said": str(proof)}}
    if failed:
        report["proof_failed"] = failed
    write_json(part / PROOF, report)
    write_whole(part / CARD, merged_card(report))


def keep_proof(folder: str | Path, said: str) -> None:
    """Write into a merged folder's card and `merge.json` what another proof has found, one that holds.

    Args:
        folder: from `merge_with_proof`, merged without its own proof.
        said: what was found, in lines.
    """
    about = read_json_if_whole(Path(folder) / PROOF) | {"proof": {"holds": True, "said": said}}
    write_json(Path(folder) / PROOF, about)
    write_whole(Path(folder) / CARD, merged_card(about))


@contextmanager
def _kept_if_not_proven(part: Path, folder: Path, about: dict[str, Any]) -> Iterator[None]:
    """If the proof fails, give the folder another name, and say so."""
    try:
        yield
    except Exception as error:  # whatever stops the proof: the merge is not thrown away
        kept, number = folder.with_name(f"{folder.name}{UNPROVEN}"), 2
        while kept.exists():
            kept, number = folder.with_name(f"{folder.name}{UNPROVEN}-{number}"), number + 1
        if not isinstance(error, NotProven):
            _describe_folder(part, about, None, failed=f"{type(error).__name__}: {error}")
        part.rename(kept)
        found = str(error) if isinstance(error, NotProven) else f"The proof failed ({type(error).__name__}: {error})."
        raise NotProven(
            f"{found}\nThe merged model is not put in {folder}. It is kept in {kept}, and its card says that it is not proven"
        ) from error


def _proof(
    plan: MergePlan, folder: Path, asked: Questions, own: Said, base: Said, max_new_tokens: int, hardware: Hardware
) -> Proof:
    model, tokenizer = loaded_plainly(folder, hardware)
    merged = said(model, tokenizer, asked.chats, max_new_tokens=max_new_tokens, along=own)
    del model
    let_go()
    changed, to_adapter, to_base = compared(own, base), compared(own, merged), compared(base, merged)
    survived = survival_of(plan.tuned, plan.base, folder, hardware)
    faults = _faults(plan.into, changed, to_adapter, to_base, survived, plan.trained_for)
    return Proof(plan.into, asked.source, changed, to_adapter, to_base, survived, faults, plan.trained_for)


def _faults(
    into: str, adapter: Likeness, merged: Likeness, base: Likeness, survived: Survival | None, trained_for: bool = False
) -> tuple[str, ...]:
    """What is not as it should be. Each comparison is made so that a value that is no number fails it."""
    expected, faults = _expected(into, trained_for), []
    if not merged.same_prompt_tokens:
        faults.append("its tokenizer makes other tokens of the questions")
    limit = max(expected.at_most * adapter.mean_logit_difference, expected.floor * merged.spread)
    if not merged.mean_logit_difference <= limit:
        faults.append(
            f"its logits differ by {merged.mean_logit_difference:.3g} on average, and {into} may have {limit:.3g}"
        )
    if not merged.mean_logit_difference < base.mean_logit_difference:
        faults.append(
            f"it is nearer to the base ({base.mean_logit_difference:.3g} on average) than to the adapter "
            f"({merged.mean_logit_difference:.3g}): what was learnt is lost"
        )
    if survived is not None:
        kept = survived.least if expected.in_each_layer else survived.share
        if not kept >= expected.survives:
            where = f"in the weights of {survived.layer}" if expected.in_each_layer else "in all its weights together"
            faults.append(f"of B A, {kept:.0%} is {where}, and {into} keeps {expected.survives:.0%} or more")
    return tuple(faults)
