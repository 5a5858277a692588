"""An error calls an option as it was typed."""

import argparse

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands.settings_options import add_settings, option_of
from qlora_helpers.commands.typed_options import as_typed, typed_options
from qlora_helpers.settings import Settings
from qlora_helpers.validation import refuse

TYPED = {"max_length": ("--max-length", 8), "rank": ("--rank", 4), "form": ("--form", "x")}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("rank=4: must be less", "--rank=4: must be less"),
        ("steps=2 and rank=4: give one", "steps=2 and --rank=4: give one"),  # steps was not typed
        ("(rank=4) raise max_length", "(--rank=4) raise --max-length"),
        ("Raise max_length.\nmax_length is", "Raise --max-length.\n--max-length is"),
        ("the rank of a matrix has a form", "the rank of a matrix has a form"),
        ("--rank=4, lora_rank=4, rank_pattern=4", "--rank=4, lora_rank=4, rank_pattern=4"),
        ("'rank=4' and runs/rank=4", "'rank=4' and runs/rank=4"),
        ("max_length.csv, max_length/x, max_lengths", "max_length.csv, max_length/x, max_lengths"),
    ],
)
def test_what_was_typed_is_called_by_its_option(message, said):
    assert as_typed(message, TYPED) == said


def test_a_list_is_shown_as_it_was_typed():
    message = str(refuse("target_modules", ["q_proj", "foo"], "no"))
    typed = {"target_modules": ("--target-modules", ["q_proj", "foo"])}
    assert as_typed(message, typed) == "--target-modules=q_proj,foo: no"


def test_only_options_that_differ_from_their_defaults_were_typed():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--gpu", default="t4")
    parser.add_argument("--list", action="store_true")
    add_settings(parser, ("batch_size", "gradient_checkpointing", "steps"), Settings())
    words = ["some/model", "--batch-size", "2", "--no-gradient-checkpointing"]
    assert typed_options(parser, parser.parse_args(words)) == {
        "batch_size": ("--batch-size", 2),
        "gradient_checkpointing": ("--gradient-checkpointing", False),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "abc"), ("steps", "1.5"), ("batch_size", "0"), ("accumulation", "x"), ("max_length", "-1"),
        ("learning_rate", "fast"), ("warmup_steps", "0.5"), ("schedule", "steep"), ("max_grad_norm", "0"), ("rank", "-1"),
        ("alpha", "0"), ("dropout", "1"), ("target_modules", ""), ("eval_steps", "x"), ("patience", "0"), ("seed", "-1"),
        ("method", "dora"), ("validation", "1.5"), ("merge_aware", "2"),
    ],
)  # fmt: skip
def test_a_setting_that_run_refuses_is_called_by_its_option(name, value, tmp_path, capsys):
    assert main(["run", "--output", str(tmp_path / "new"), option_of(name), value]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {option_of(name)}=")
        and name not in error.replace(option_of(name), "", 1).split("=")[0]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "x"), ("rank", "100000"), ("max_length", "10000000"), ("optimizer", "mine"), ("attention", "mine"),
        ("block_size", "3"), ("compute_dtype", "int8"), ("target_modules", "foo,bar"), ("gpu", "abacus"),
    ],
)  # fmt: skip
def test_a_setting_that_memory_refuses_is_called_by_its_option(name, value, capsys):
    assert main(["memory", "Qwen/Qwen2.5-7B", option_of(name), value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option_of(name)}=")
