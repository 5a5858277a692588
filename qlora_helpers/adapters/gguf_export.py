"""A model's folder as one GGUF file, which llama.cpp, Ollama and others load: the families Llama and Qwen2.

The tensors are those of the folder under other names, one of them in memory at a time. Three things differ: for Llama, the
rows of the query and key weights are interleaved, since llama.cpp turns neighbouring values and transformers turns halves
(conversion/llama.py of llama.cpp, `LlamaModel.permute`); the scaled rotary embedding of Llama 3.1 is a tensor of divisors,
`rope_freqs`; and an output head that is the embedding is left out, and found by its absence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_helpers import validation
from qlora_helpers.adapters.gguf_tokenizer import CONVERTER, FileTokenizer, file_tokenizer
from qlora_helpers.json_files import new_file, read_json_if_whole
from qlora_helpers.models.fingerprint import weight_files
from qlora_helpers.models.folder_config import no_own_code, read_config, saved_in_4_bits
from qlora_helpers.models.loading import name_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "KINDS", "GGUFFile", "check_exportable", "export_gguf", "interleaved", "rope_divisors"]

FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
KINDS = {  # of the matrices; vectors are in float32
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # values of a row that share a scale in Q8_0
_DTYPES = ("BF16", "F16", "F32")  # as safetensors writes them


@dataclass(frozen=True)
class GGUFFile:
    """A file that was written.

    Attributes:
        path: of it.
        kind: one of `KINDS`.
        tensors, parameters: how many.
        bytes: its size.
        tokenizer: what it says of the tokenizer.
        remarks: what a reader may do otherwise than transformers, in sentences.
    """

    path: Path
    kind: str
    tensors: int
    parameters: int
    bytes: int
    tokenizer: FileTokenizer
    remarks: tuple[str, ...] = ()


def check_exportable(config: dict[str, Any], name: str) -> None:
    """Refuse, by its config.json, a model that is of no family that is written here.

    Args:
        name: of the model, for the message.

    Raises:
        ValueError: it is another family, or the message names the entry that is not written here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{name} has model_type={kind!r}: only the families Llama and Qwen2 (model_type llama, qwen2) are exported here. "
            f"{CONVERTER}"
        )
    unknown = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    for key, known in unknown.items():
        if config.get(key, known) != known:
            raise ValueError(f"{name} has {key}={config[key]!r}, which is not exported here. {CONVERTER}")


def export_gguf(
    folder: str | Path,
    path: str | Path,
    kind: str = "f16",
    tokenizer_folder: str | Path | None = None,
    name: str | None = None,
    base: str | None = None,
    licence: str | None = None,
) -> GGUFFile:
    """Write the model in a folder as a GGUF file.

    Args:
        folder: of an unquantised model, with its safetensors files.
        path: of the new file; it appears complete or not at all.
        kind: of the matrices: "f32", "f16", "bf16", or "q8_0" (8-bit numbers and a 16-bit scale for each 32 values of a row;
            a matrix whose rows are no multiple of 32 is in "f16").
        tokenizer_folder: where the tokenizer is; by default `folder`.
        name: of the model; by default the folder's.
        base: the model that it was tuned from: a name on the Hub, or any other.
        licence: by default what the model card in the folder states; nothing if it states none.

    Raises:
        FileExistsError: there is something at `path`.
        FileNotFoundError: the folder has no config.json, no safetensors files or no tokenizer.
        ValueError: the model is of another family, is quantised, has options or a tokenizer that are not written here, lacks
            a tensor or has one that the family has no place for; or a weight is too large for "f16".
    """
    folder, path = Path(folder), Path(path)
    validation.one_of("kind", kind, KINDS)
    said = f"folder={str(folder)!r}"
    config = read_config(folder, str(folder), argument="folder")
    check_exportable(config, said)
    if saved := saved_in_4_bits(config, str(folder), argument="folder"):
        raise ValueError(f"{said} was saved in 4 bits ({saved}): merge into the 16-bit model, or dequantise it")
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{said} has no safetensors files: pass the folder of an unquantised model")
    with no_own_code(str(folder)):
        full = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded = AutoTokenizer.from_pretrained(
            tokenizer_folder or folder, local_files_only=True, trust_remote_code=False
        )
    divisors = rope_divisors(full)
    plan = _plan(full, files, said)
    rows = next(entry.shape[0] for entry in plan if entry.name == "token_embd.weight")
    tokens = file_tokenizer(loaded, rows)
    arch = FAMILIES[full.model_type]
    with new_file(path) as part, _quiet():
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[arch])
        try:
            _write_entries(
                writer, folder, full, kind, tokens, name or name_in(folder), base, licence or licence_of(folder)
            )
            if divisors is not None:
                writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
            for entry in plan:
                _write_info(writer, entry, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if divisors is not None:
                writer.write_tensor_data(divisors)
            for entry in plan:
                writer.write_tensor_data(_values(entry, full, kind))
        finally:
            writer.close()
    return GGUFFile(
        path,
        kind,
        tensors=len(plan) + (divisors is not None),
        parameters=sum(int(np.prod(entry.shape)) for entry in plan),
        bytes=path.stat().st_size,
        tokenizer=tokens,
        remarks=tokens.remarks,
    )


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name in the file, where it is, and under which name."""

    name: str
    path: Path
    key: str
    shape: tuple[int, ...]


def _plan(config: PretrainedConfig, files: list[Path], said: str) -> list[_Entry]:
    """Every tensor of the folder with its name in the file; nothing is read.

    Raises:
        ValueError: one is missing, one has no place in the family, or is in another format.
    """
    from qlora_helpers.models.meta import meta_model

    arch = FAMILIES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    model = meta_model(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    plan = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file cannot be iterated over
                if key in tied or key.endswith("rotary_emb.inv_freq"):
                    continue
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if key not in wanted or found is None:
                    raise ValueError(f"{said} has a tensor {key}, for which its family has no place. {CONVERTER}")
                if shape != wanted[key] or dtype not in _DTYPES:
                    raise ValueError(
                        f"{said} has {key} in the shape {shape} in {dtype}; its config asks for {wanted[key]} in 16 or 32 bits"
                    )
                plan.append(_Entry(found, path, key, shape))
    if missing := sorted(wanted.keys() - {entry.key for entry in plan}):
        raise ValueError(f"{said} lacks {len(missing)} tensors that its config asks for, such as {missing[0]}")
    return plan


def _kind_of(entry: _Entry, kind: str) -> gguf.GGMLQuantizationType:
    if len(entry.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and entry.shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return KINDS[kind][0]


def _write_info(writer: gguf.GGUFWriter, entry: _Entry, kind: str) -> None:
    of = _kind_of(entry, kind)
    block, size = gguf.GGML_QUANT_SIZES[of]
    writer.add_tensor_info(
        entry.name, entry.shape, np.dtype(np.float32), int(np.prod(entry.shape)) // block * size, raw_dtype=of
    )


def _values(entry: _Entry, config: PretrainedConfig, kind: str) -> np.ndarray:
    """A tensor as the file has it.

    Raises:
        ValueError: a weight is too large for float16.
    """
    with safe_open(entry.path, framework="pt") as file:
        tensor = file.get_tensor(entry.key)
    if config.model_type == "llama" and ".attn_q." in entry.name:
        tensor = interleaved(tensor, config.num_attention_heads)
    if config.model_type == "llama" and ".attn_k." in entry.name:
        tensor = interleaved(tensor, config.num_key_value_heads)
    of, values = _kind_of(entry, kind), tensor.float().numpy()
    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(values, of)
    if of == gguf.GGMLQuantizationType.F16 and not np.isfinite(stored).all() and np.isfinite(values).all():
        raise ValueError(
            f"kind={kind!r}: {entry.key} has a weight of {abs(values).max():g}, and float16 ends at 65504: take bf16"
        )
    return stored


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head in llama.cpp's order: one of the first half, one of the second, and so on.

    Args:
        weight: [heads x rows of a head, …], as transformers has the weight of the queries or the keys of Llama.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_divisors(config: PretrainedConfig) -> np.ndarray | None:
    """What llama.cpp divides the frequencies of the rotary embedding by: [head size / 2] in float32; None for by 1.

    They are transformers' own frequencies, the plain ones divided by the scaled ones.

    Raises:
        ValueError: the scaling is another than that of Llama 3.1.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3" or config.model_type != "llama":
        raise ValueError(f"rope_type={kind!r} of a {config.model_type} model is not exported here. {CONVERTER}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / scaled).numpy()


def _write_entries(
    writer: gguf.GGUFWriter,
    folder: Path,
    config: PretrainedConfig,
    kind: str,
    tokens: FileTokenizer,
    name: str,
    base: str | None,
    licence: str | None,
) -> None:
    """Everything but the tensors, under llama.cpp's names (gguf.Keys)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    if base:
        writer.add_base_model_count(1)
        owner, _, last = base.rpartition("/")
        writer.add_base_model_name(0, last)
        if owner:
            writer.add_base_model_organization(0, owner)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10_000.0))
    writer.add_vocab_size(len(tokens.tokens))
    writer.add_tokenizer_model("gpt2")  # that is, byte-level BPE
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.kinds)
    writer.add_token_merges(tokens.merges)
    for id, add in (
        (tokens.bos, writer.add_bos_token_id),
        (tokens.eos, writer.add_eos_token_id),
        (tokens.pad, writer.add_pad_token_id),
        (_second_end(folder, tokens), writer.add_eot_token_id),
    ):
        if id is not None:
            add(id)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(False)
    if tokens.template is not None:
        writer.add_chat_template(tokens.template)


def _second_end(folder: Path, tokens: FileTokenizer) -> int | None:
    """A token other than EOS at which the model's own generation settings end an answer."""
    ends = (read_json_if_whole(folder / "generation_config.json") or {}).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return next((id for id in ends if isinstance(id, int) and id != tokens.eos), None)


def licence_of(folder: Path) -> str | None:
    """What the model card beside the weights states; nothing is assumed."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        licence = ModelCard.load(card).data.license
    except ValueError:  # no YAML at its top, or none that can be read
        return None
    return licence if isinstance(licence, str) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """The gguf package logs each step at the level of information, and warns of keys that are written twice."""
    logger = logging.getLogger("gguf.gguf_writer")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
