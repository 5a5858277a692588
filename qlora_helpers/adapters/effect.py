"""Whether an adapter takes effect, and why not: base, adapter and merged model on the same questions, and a look at the files.

An adapter that does nothing loads without an error. PEFT passes over tensors whose names it does not expect and only warns,
a B that is zero adds nothing, and a merge into 4 bits may round all of it away. Each such cause is looked for in the files
or in the model, and named with its cure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from qlora_helpers.adapters.file_merge import adapted_on_meta
from qlora_helpers.adapters.files import WEIGHTS, WrongBase, check_base, describe, load_adapter, read_adapter_config
from qlora_helpers.adapters.lora_options import PLAIN, check_options
from qlora_helpers.adapters.plain_loading import let_go, loaded_plainly
from qlora_helpers.adapters.questions import questions_for
from qlora_helpers.adapters.same_answers import Likeness, Said, compared, said
from qlora_helpers.adapters.survival import Survival, survival
from qlora_helpers.adapters.tuned import TunedFiles, find_tuned
from qlora_helpers.chats import Chat
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.library_messages import silenced
from qlora_helpers.models.fingerprint import fingerprint, weight_files
from qlora_helpers.models.folder_config import read_config
from qlora_helpers.models.loading import folder_of, load_model, load_tokenizer, name_in
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NOTHING", "Cause", "Effect", "causes_in", "effect_in", "effect_of"]

NOTHING = (
    1e-3  # a mean shift of less than this share of the logits' spread is no effect; dropped tensors give exactly 0
)


@dataclass(frozen=True)
class Cause:
    """Why an adapter has no effect, or not the one that it should have.

    Attributes:
        name: "names", "tensors", "zero", "not finite", "scale", "base", "disabled" or "merge".
        said: what was found, and the cure.
        partly: whether it takes away only a part of the effect.
    """

    name: str
    said: str
    partly: bool = False


@dataclass(frozen=True)
class Effect:
    """What an adapter changes. `print` it for the figures and what they mean.

    Attributes:
        causes: what was found that takes the effect away, or part of it.
        adapter: the adapter against its base, along the adapter's answers; None if it could not be loaded.
        merged: the adapter against the merged model, if one was given.
        merged_base: the merged model's likeness to the base, along the adapter's answers.
        survived: how much of the adapter's change is in the merged weights; None without a merged model, or if the adapter
            is more than plain LoRA.
        questions: what was asked, in words.
    """

    causes: tuple[Cause, ...]
    adapter: Likeness | None
    merged: Likeness | None = None
    merged_base: Likeness | None = None
    survived: Survival | None = None
    questions: str = ""

    @property
    def took_effect(self) -> bool:
        """Whether the adapter changes its base, and the merged model, if there is one, is not that base."""
        return _moves(self.adapter) and (self.merged is None or not _is_the_base(self.merged, self.merged_base))

    def __str__(self) -> str:
        lines = []
        if self.adapter is None:
            lines.append("The adapter was not asked: it cannot be loaded as it is.")
        else:
            lines.append(_compared("adapter and base", self.adapter))
            lines.append(
                "The adapter takes effect." if _moves(self.adapter) else "Nothing has changed: it has no effect."
            )
        if self.merged is not None:
            lines.append(_compared("adapter and merged", self.merged))
            if self.survived is not None:
                lines.append(f"in the weights: {said_of_survival(self.survived)}")
            as_base = _is_the_base(self.merged, self.merged_base)
            lines.append(
                "The merged model is its base again, or nearer to it than to the adapter."
                if as_base
                else "The merged model has the effect."
            )
        if self.causes:
            lines += [f"Why: {cause.said}" for cause in self.causes]
        elif not self.took_effect:
            lines.append("Why: nothing that is known to cause it was found in the files.")
        return "\n".join(lines)


def _compared(pair: str, found: Likeness) -> str:
    return (
        f"{pair}: {found.same_answers} of {found.prompts} answers are the same; logits differ by "
        f"{found.mean_logit_difference:.4g} on average ({found.shift:.2%} of their spread), by {found.largest_logit_difference:.4g} "
        f"at most; KL {found.mean_kl:.3g} nats per token"
    )


def said_of_survival(found: Survival) -> str:
    """How much of B A is in the merged weights, in a sentence."""
    return f"{found.share:.0%} of B A is there ({found.layers} layers; the least, {found.least:.0%}, in {found.layer})"


def _moves(found: Likeness | None) -> bool:
    return found is not None and not found.shift < NOTHING


def _is_the_base(merged: Likeness, merged_base: Likeness | None) -> bool:
    """Whether a merged model lies nearer to the base than to the adapter, along the adapter's answers."""
    return merged_base is not None and merged_base.mean_logit_difference <= merged.mean_logit_difference


# ---- What the files say


def causes_in(adapter: str | Path, base: str | Path) -> tuple[Cause, ...]:
    """Why an adapter would have no effect on a base, or only part of it, by their files alone.

    Args:
        adapter: its folder.
        base: the folder of the model that it is to be loaded onto.

    Raises:
        FileNotFoundError, ValueError: as `describe` does.
    """
    adapter, base = Path(adapter), Path(base)
    found, tensors = describe(adapter), load_file(adapter / WEIGHTS)
    causes = []
    known = fingerprint(base) if weight_files(base) else None
    try:
        check_base(found, adapter, name_in(base), known)
    except WrongBase as error:
        causes.append(Cause("base", f"{error}."))
    causes += _of_values(tensors)
    try:
        with silenced():
            _, adapted = adapted_on_meta(read_config(base, str(base)), adapter)
    except ValueError as error:
        return (*causes, Cause("tensors", f"PEFT finds no layer for it on this base: {_first_line(error)}"))
    if fault := _of_names(set(tensors), set(get_peft_model_state_dict(adapted, save_embedding_layers=False)), adapter):
        causes.append(fault)
    return (*causes, *_of_scales(adapted, read_adapter_config(adapter)))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _of_values(tensors: dict[str, torch.Tensor]) -> list[Cause]:
    """B that is zero, or values that are no numbers."""
    causes = []
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.float().isfinite().all()):
        causes.append(
            Cause(
                "not finite",
                f"{len(broken)} of its {len(tensors)} tensors hold values that are no finite numbers, such as {broken[0]}: the "
                "run has diverged. Take an earlier checkpoint",
            )
        )
    for letter in "BA":
        of_letter = [tensor for name, tensor in tensors.items() if f".lora_{letter}." in f"{name}."]
        zero = sum(not tensor.any() for tensor in of_letter)
        if zero:
            which = (
                "is zero in every layer" if zero == len(of_letter) else f"is zero in {zero} of {len(of_letter)} layers"
            )
            causes.append(
                Cause(
                    "zero",
                    f"{letter} {which}, so B A adds nothing there: it was saved before it was trained, or was frozen while it "
                    "was. Save the adapter of the trained model again",
                    partly=zero < len(of_letter),
                )
            )
    return causes


def _of_names(found: set[str], wanted: set[str], adapter: Path) -> Cause | None:
    """Tensors that PEFT does not find, or passes over. It says so in a warning at most."""
    found = {name for name in found if name in wanted or "lora_" in name}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if not missing and not extra:
        return None
    if _only_begin_differently(found, wanted):
        return Cause(
            "names",
            f"its tensors have names such as {extra[0]}, and PEFT looks for {missing[0]}: it loads none of them and only warns. "
            f"Rename them in {WEIGHTS}; what they begin with is all that differs",
        )
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}, and stay as PEFT begins them"
        )
    if extra:
        parts.append(f"{len(extra)} are unknown, such as {extra[0]}, and are passed over")
    return Cause("tensors", f"in {adapter / WEIGHTS}, {'; '.join(parts)}. Save it again, with the PEFT that trained it")


def _only_begin_differently(found: set[str], wanted: set[str]) -> bool:
    """Whether all names are as wanted but for their beginnings, one of theirs in the place of one that is wanted."""
    if found & wanted or len(found) != len(wanted):
        return False
    one, other = min(found).split("."), min(wanted).split(".")
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    theirs, ours = ("".join(f"{part}." for part in parts[: len(parts) - same]) for parts in (one, other))
    return {ours + name.removeprefix(theirs) for name in found if name.startswith(theirs)} == wanted


def _of_scales(adapted: PeftModel, config: dict[str, Any]) -> list[Cause]:
    scales = [
        layer.scaling[name] for layer in adapted.modules() if isinstance(layer, LoraLayer) for name in layer.scaling
    ]
    zero = sum(scale == 0 for scale in scales)
    if not zero:
        return []
    which = "every layer" if zero == len(scales) else f"{zero} of {len(scales)} layers"
    return [
        Cause(
            "scale",
            f"B A is multiplied by 0 in {which} (lora_alpha={config.get('lora_alpha')}, alpha_pattern="
            f"{config.get('alpha_pattern') or {}}): write the alpha of the run into adapter_config.json",
            partly=zero < len(scales),
        )
    ]


# ---- What the models say


def effect_in(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], *, max_new_tokens: int = 64
) -> Effect:
    """What the adapters of a loaded model change, as they are active now.

    Args:
        chats: each ends with a question.
        max_new_tokens: an answer is cut off after so many.

    Raises:
        ValueError: the model has no adapter; or as `said` does.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__} without adapters: load one with load_adapter first")
    own, base = _with_and_without(model, tokenizer, chats, max_new_tokens)
    likeness = compared(own, base)
    return Effect(tuple(_of_the_model(model)), likeness, questions=f"{len(chats)} questions")


def _with_and_without(model: PeftModel, tokenizer, chats: list[Chat], max_new_tokens: int) -> tuple[Said, Said]:
    """What a model says with its adapter, and what it says without, along the same answers."""
    own = said(model, tokenizer, chats, max_new_tokens=max_new_tokens)
    with model.disable_adapter():
        return own, said(model, tokenizer, chats, max_new_tokens=max_new_tokens, along=own)


def _of_the_model(model: PeftModel) -> list[Cause]:
    """Why the adapters of a loaded model do nothing."""
    status = model.get_model_status()
    if status.enabled is False:
        return [Cause("disabled", "the adapters are disabled: call model.base_model.enable_adapter_layers()")]
    active = status.active_adapters if isinstance(status.active_adapters, list) else []
    if not active:
        known = ", ".join(sorted(model.peft_config))
        return [Cause("disabled", f"no adapter is active in every layer: call model.set_adapter with one of {known}")]
    layers = [
        (layer, name)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name in active
        if name in layer.scaling
    ]
    causes = []
    if layers and all(layer.scaling[name] == 0 for layer, name in layers):
        causes.append(
            Cause(
                "scale", "B A is multiplied by 0 in every layer (scaling): write the alpha of the run into its config"
            )
        )
    matrices = [layer.lora_B[name].weight for layer, name in layers if name in layer.lora_B]
    if matrices and not any(matrix.any() for matrix in matrices):
        causes.append(
            Cause("zero", "B is zero in every layer: it is not trained yet, or PEFT has loaded nothing into it")
        )
    return causes


def effect_of(
    adapter: str | Path,
    *,
    merged: str | Path | None = None,
    questions: str | Path | None = None,
    base: str | None = None,
    max_new_tokens: int = 64,
    hardware: Hardware | None = None,
) -> Effect:
    """Whether an adapter takes effect on its base, and whether a model into which it was merged has that effect.

    An adapter with tensors of wrong names is loaded as PEFT loads it, which passes over them, so that what other programs
    would get is what is compared. One for another base is not loaded.

    Args:
        adapter: the folder of an adapter or of a run.
        merged: the folder of a merged model; plain transformers loads it.
        questions: a file of questions (`qlora_helpers.adapters.questions.questions_for` says what is asked without it).
        base: where the adapter's base is, if it is not where the files say.
        max_new_tokens: an answer is cut off after so many.
        hardware: what to load for; by default what `detect()` finds.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no adapter, or its base is not there.
        HubError: the base could not be fetched from the Hub.
    """
    hardware = given_or_detected(hardware)
    tuned = find_tuned(adapter, base)
    if tuned.base is None:
        raise refuse(
            "adapter", str(adapter), f"{tuned.folder} is a whole model, not an adapter: name an adapter's folder"
        )
    folder = folder_of(tuned.base)
    causes = list(causes_in(tuned.folder, folder))
    if any(cause.name == "base" for cause in causes):
        return Effect(tuple(causes), None)
    tokenizer = tokenizer_of(tuned)
    asked = questions_for(tuned, tokenizer, questions)
    model = _loaded_as_peft_does(tuned, hardware, causes)
    if model is None:
        return Effect(tuple(causes), None)
    own, of_base = _with_and_without(model, tokenizer, asked.chats, max_new_tokens)
    del model
    let_go()
    likeness = compared(own, of_base)
    if merged is None:
        return Effect(tuple(causes), likeness, questions=asked.source)
    plain, plain_tokenizer = loaded_plainly(merged, hardware)
    of_merged = said(plain, plain_tokenizer, asked.chats, max_new_tokens=max_new_tokens, along=own)
    del plain
    let_go()
    to_adapter, to_base = compared(own, of_merged), compared(of_base, of_merged)
    survived = survival_of(tuned, folder, merged, hardware)
    if _moves(likeness) and _is_the_base(to_adapter, to_base):
        causes.append(Cause("merge", _said_of_the_loss(survived)))
    return Effect(tuple(causes), likeness, to_adapter, to_base, survived, asked.source)


def _said_of_the_loss(survived: Survival | None) -> str:
    found = "" if survived is None else f" ({survived.share:.0%} of B A is in its weights)"
    return (
        f"the merge has dropped what was learnt{found}. Into 4 bits, a small change is rounded away: merge into 16 bits "
        "(--into dequantised), or keep the adapter beside its base"
    )


def tokenizer_of(tuned: TunedFiles) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, if there is one, else the base's."""
    own = any((tuned.folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return load_tokenizer(str(tuned.folder) if own else tuned.base)


def survival_of(tuned: TunedFiles, base: Path, merged: str | Path, hardware: Hardware) -> Survival | None:
    """How much of an adapter is in a merged folder; None if the adapter is more than plain LoRA, or does not fit."""
    try:
        check_options("adapter", read_adapter_config(tuned.folder), PLAIN)
        return survival(base, tuned.folder, merged, tuned.quantization, tuned.double_quant, hardware.compute_dtype)
    except ValueError:  # what is wrong with it is said where it is loaded
        return None


def _loaded_as_peft_does(tuned: TunedFiles, hardware: Hardware, causes: list[Cause]) -> PeftModel | None:
    """The adapter on its base; None, with a cause more, if even PEFT refuses it."""
    model = load_model(tuned.base, tuned.quantization, tuned.double_quant, hardware)
    if not any(cause.name in ("names", "tensors") for cause in causes):
        return load_adapter(model, tuned.folder)
    try:
        with silenced():
            return PeftModel.from_pretrained(model, tuned.folder).eval()
    except (ValueError, RuntimeError) as error:
        causes.append(Cause("tensors", f"PEFT refuses it: {_first_line(error)}"))
        return None
