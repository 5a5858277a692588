"""The fingerprint of a base: the same however the same weights are stored, another for other weights."""

import json
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_helpers.models import fingerprint as module
from qlora_helpers.models.fingerprint import fingerprint, fingerprint_of, weight_files
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU

BASE = data_path("tiny-llama")
TENSORS = load_file(BASE / "model.safetensors")
WANTED = fingerprint(BASE)


def folder_of(folder, *shards, index=False):
    folder.mkdir()
    names = [f"model-{number}.safetensors" if len(shards) > 1 else "model.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    if index:
        found = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    return folder


def halves(tensors):
    names = sorted(tensors, reverse=True)
    return {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}


def test_the_same_weights_have_one_fingerprint_under_any_name_and_in_any_number_of_files(tmp_path):
    assert WANTED.startswith("sha256:") and len(WANTED) == 7 + 64
    assert fingerprint(str(shutil.copytree(BASE, tmp_path / "copy"))) == WANTED
    sharded = folder_of(tmp_path / "sharded", *halves(TENSORS), index=True)
    assert fingerprint(sharded) == fingerprint(folder_of(tmp_path / "no-index", *halves(TENSORS))) == WANTED
    save_file({"other": torch.zeros(2)}, sharded / "consolidated.safetensors")  # such as Mistral's second copy
    (sharded / "pytorch_model.bin").write_bytes(b"1")
    assert fingerprint(sharded) == WANTED
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-1\.safetensors, which its index names"):
        weight_files(sharded)


@pytest.mark.parametrize("changed", ["a value", "a name", "a dtype", "a shape", "one tensor less"])
def test_other_weights_have_another(changed, tmp_path):
    name, tensors = "model.layers.2.mlp.up_proj.weight", dict(TENSORS)
    tensor = tensors[name].clone()
    if changed == "a value":
        tensor[3, 5] += 1
    elif changed == "a dtype":
        tensor = tensor.view(torch.float16)
    elif changed == "a shape":
        tensor = tensor.view(256, 512)
    tensors[name] = tensor
    if changed == "a name":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop(name)
    elif changed == "one tensor less":
        del tensors[name]
    assert fingerprint(folder_of(tmp_path / "tiny-llama", tensors)) != WANTED


@pytest.mark.parametrize("place", [0, 500_000, -1])
def test_of_a_large_tensor_the_two_ends_and_pieces_between_are_read(place, tmp_path, monkeypatch):
    tensor = torch.zeros(2_000_000, dtype=torch.int16)
    before = fingerprint(folder_of(tmp_path / "before", {"weight": tensor}))
    length = module.PIECE // 2  # of a piece, in numbers: training changes a stretch, not one value
    tensor[place : place + length if place >= 0 else None] = 1
    if place > 0:
        tensor[place : place + 2_000_000 // module.PIECES] = 1
    assert fingerprint(folder_of(tmp_path / "after", {"weight": tensor})) != before
    read = []
    add = module.hashlib.sha256
    monkeypatch.setattr(module.hashlib, "sha256", lambda: read.append(add()) or Counting(read))
    fingerprint(tmp_path / "after")
    assert sum(read[1:]) < module.PIECES * module.PIECE + 200


def test_a_tensor_of_a_mebibyte_is_hashed_whole(tmp_path):
    tensor = torch.zeros(module.WHOLE, dtype=torch.uint8)
    before = fingerprint(folder_of(tmp_path / "before", {"weight": tensor}))
    tensor[module.PIECE + 1] = 1  # it would be between the first two pieces
    assert fingerprint(folder_of(tmp_path / "after", {"weight": tensor})) != before


class Counting:
    def __init__(self, read):
        self.read = read

    def update(self, data):
        self.read.append(len(data))

    def hexdigest(self):
        return ""


@pytest.mark.skipif(sys.platform == "win32", reason="files with holes")
def test_an_8b_model_takes_seconds(tmp_path):
    """A file with holes has the size of Llama-3.1-8B's tensors, and takes no room on the disk."""
    folder, begin, header = tmp_path / "large", 0, {}
    folder.mkdir()
    for layer in range(32):
        for name, size in (("q", 2**25), ("k", 2**23), ("v", 2**23), ("o", 2**25), *((x, 117_440_512) for x in "gud")):
            header[f"{layer}.{name}"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [begin, begin + size]}
            begin += size
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + begin)
    start = time.perf_counter()
    fingerprint(folder)
    assert time.perf_counter() - start < 10


def test_a_folder_without_safetensors_has_the_fingerprint_of_its_bin_files(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"1" * 2**21)
    before = fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"2" * 2**21)
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("content", [None, b"", b"12", b"\x05" + bytes(7) + b"[1,2]", b"\xff" * 30])
def test_a_folder_without_weights_or_with_a_damaged_file_is_named(content, tmp_path):
    match = "has no .*safetensors files: pass the folder of a model"
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
        match = "model.safetensors is damaged: fetch or copy it again"
    with pytest.raises(ValueError, match=match):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"its model.safetensors.index.json is damaged: fetch or copy it again"):
        fingerprint(tmp_path)


def test_a_model_without_files_has_none():
    config = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=False).config
    model = AutoModelForCausalLM.from_config(config)
    assert fingerprint_of(model) == WANTED  # its config names the folder
    model.config.name_or_path = ""
    assert fingerprint_of(model) is None
    model.config.name_or_path = "someone/gone"
    assert fingerprint_of(model) is None


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_loaded_model_keeps_the_fingerprint_of_its_files_when_they_are_gone(quantization, tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "tiny-llama")
    model = load_model(str(folder), quantization=quantization, hardware=CPU)
    shutil.rmtree(folder)
    assert fingerprint_of(model) == WANTED
