"""The command effect: its exit code and what it says, for an adapter that works and for ones that do not."""

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.adapters.file_merge import merge_files
from tests.support.faulty_adapters import BASE, SHIPPED, changed, scaled, without_prefix


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A function that looks for the effect by one question; returns exit code, standard output and error."""
    monkeypatch.setenv("QLORA_GEAR", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.txt").write_text("What does Carl Kirkcroft play in a band?", encoding="utf-8")

    def effect(adapter, *options):
        arguments = ["effect", str(adapter), "--questions", "q.txt", "--max-new-tokens", "8", *map(str, options)]
        return main(arguments), *capsys.readouterr()

    return effect


def test_a_merged_model_has_the_effect(call, tmp_path):
    merged = merge_files(BASE, SHIPPED, tmp_path / "merged")
    code, out, err = call(SHIPPED, "--merged", merged)
    assert code == 0, err
    assert "Asked: 1 question of q.txt.\nadapter and base: 0 of 1 answers are the same; logits differ by" in out
    assert "The adapter takes effect.\nadapter and merged: 1 of 1 answers are the same" in out
    assert "in the weights: 100% of B A is there (28 layers" in out and out.endswith(
        "The merged model has the effect.\n"
    )


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (
            without_prefix,
            {},
            "Why: its tensors have names such as model.layers.0.mlp.down_proj.lora_A.weight, and PEFT",
        ),
        (scaled(0), {}, "Why: B is zero in every layer"),
        (None, {"lora_alpha": 0}, "Why: B A is multiplied by 0 in every layer"),
    ],
)
def test_an_adapter_without_effect_says_why(change, options, said, call, tmp_path):
    code, out, err = call(changed(tmp_path / "adapter", change, **options))
    assert code == 1, err
    assert "1 of 1 answers are the same; logits differ by 0 on average" in out
    assert "Nothing has changed: it has no effect." in out and said in out


def test_a_merged_folder_without_the_effect_is_told(call):
    code, out, _ = call(SHIPPED, "--merged", BASE)
    assert code == 1 and "Why: the merge has dropped what was learnt (" in out


def test_what_cannot_be_compared_is_refused(call):
    assert "there is no folder nowhere" in call("nowhere")[2]
    assert "error: --merged='nowhere': there is no such folder" in call(SHIPPED, "--merged", "nowhere")[2]
    assert "is a whole model, not an adapter: name an adapter's folder" in call(BASE)[2]
    assert "--max-new-tokens='x': must be a whole number" in call(SHIPPED, "--max-new-tokens", "x")[2]
