"""How much of an adapter is in merged weights: all of it, none of it, or all but one layer."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.merge import merge
from qlora_helpers.adapters.survival import survival
from qlora_helpers.models.saving import save_model
from tests.support.faulty_adapters import BASE, SHIPPED, changed, scaled
from tests.support.short_runs import CPU, TOKENIZER


def test_what_is_added_is_there_and_the_base_has_nothing_of_it(tmp_path):
    merged = merge_files(BASE, changed(tmp_path / "half", scaled(0.5)), tmp_path / "merged")
    assert survival(BASE, SHIPPED, merged).share == pytest.approx(0.5, abs=0.01)
    found = survival(BASE, SHIPPED, BASE, quantization=None)
    assert (found.share, found.least, found.layers, found.into) == (0, 0, 28, "16bit")


def test_survival_is_counted_by_layer(tmp_path):
    """A merge of which one layer was left out."""
    folder = save_model(merge(SHIPPED, "16bit", hardware=CPU), TOKENIZER, tmp_path / "merged", dtype=torch.bfloat16)
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    save_file(
        tensors | {name: load_file(BASE / "model.safetensors")[name]}, folder / "model.safetensors", {"format": "pt"}
    )
    found = survival(BASE, SHIPPED, folder)
    assert (found.layer, found.least, found.into) == (
        "model.layers.2.mlp.up_proj",
        0,
        "16bit",
    ) and 0.9 < found.share < 1
    with pytest.raises(ValueError, match="changes nothing, since B A is zero in every layer"):
        survival(BASE, changed(tmp_path / "zero", scaled(0)), folder)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"merged='.*merged' has no weight model.layers.2.mlp.up_proj.weight"):
        survival(BASE, SHIPPED, folder)
    with pytest.raises(ValueError, match="quantization='int4': choose one of nf4, fp4, or None"):
        survival(BASE, SHIPPED, folder, quantization="int4")
