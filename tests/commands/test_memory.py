"""The command that predicts memory: its report says what `predict` says."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands import memory
from qlora_helpers.commands.memory import as_dict, as_text
from qlora_helpers.memory import (
    catalogue,
    cures,
    find_gpu,
    find_shape,
    gpus,
    largest_batch,
    longest_sequence,
    predict,
)
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, MEMORY_SETTINGS
from qlora_helpers.units import GIB
from tests.memory.made_up import card


def call(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "qlora_helpers", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


# ---- memory: run in this process, which is quicker; the command runs main()


def report(capsys, *arguments):
    """Exit status, standard output and standard error of `python -m qlora_helpers memory`."""
    status = main(["memory", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_memory_prints_the_prediction_and_its_status_says_whether_it_fits(capsys):
    status, text, errors = report(capsys, "Qwen/Qwen2.5-7B", "--gpu", "t4", "--max-length", 2048)
    shape, run = find_shape("Qwen/Qwen2.5-7B"), replace(GPU_RUN, compute_dtype="float16")
    prediction = predict(shape, run, "t4")
    assert (status, errors) == (0, "")
    assert f"fits with {prediction.spare_bytes / GIB:.1f} GiB to spare" in text
    assert "What helps" not in text
    assert "Qwen/Qwen2.5-7B" in text and f"{shape.parameters:,}" in text and "float16" in text
    lines = {line[:26].strip(): line[26:36].strip() for line in text.splitlines()}
    for name, size in prediction.parts.items():
        assert lines.get(name, "0.00 GiB") == f"{size / GIB:.2f} GiB", name
    for name, size in {
        "peak allocated": prediction.peak_allocated_bytes, "peak reserved": prediction.peak_reserved_bytes,
        "on the card": prediction.device_bytes, "usable": prediction.gpu.usable_bytes,
        "host memory to load": prediction.host_bytes_to_load, "disk": prediction.disk_bytes,
    }.items():  # fmt: skip
        assert lines[name] == f"{size / GIB:.2f} GiB"
    assert lines["largest batch"].split()[0] == f"{largest_batch(shape, run, 't4'):,}"
    assert lines["longest sequence"].split()[0] == f"{longest_sequence(shape, run, 't4'):,}"


def test_memory_says_how_much_is_too_much_and_what_helps(capsys):
    arguments = ("meta-llama/Llama-3.1-8B", "--gpu", "4090", "--max-length", 4096, "--no-gradient-checkpointing")
    status, text, errors = report(capsys, *arguments)
    assert (status, errors) == (1, "")
    shape, run = find_shape("meta-llama/Llama-3.1-8B"), replace(GPU_RUN, max_length=4096, gradient_checkpointing=False)
    assert f"does not fit: {-predict(shape, run, '4090').spare_bytes / GIB:.1f} GiB too much" in text
    found = cures(shape, run, "4090")
    assert found
    places = [
        text.index(f"{number:2}. {'or ' if number > 1 else ''}{change.what}\n    costs: ")
        for number, change in enumerate(found, 1)
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "full", "--optimizer", "adamw_torch", "--batch-size", "8"),
        (
            "--upcast-fp32",
            "--no-gradient-checkpointing",
            "--no-double-quant",
            "--attention",
            "eager",
            "--target-modules",
            "q_proj,v_proj",
        ),
        (
            "--gpu",
            "3080",
            "--max-length",
            "16384",
            "--batch-size",
            "64",
            "--upcast-fp32",
            "--rank",
            "256",
            "--dropout",
            "0",
        ),
        ("--method", "lora", "--compute-dtype", "float32", "--adapter-dtype", "bfloat16"),
    ],
)
def test_memory_fits_its_width_and_is_plain(capsys, options):
    _, text, _ = report(capsys, "qwen2.5-14b", *options)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii() and "\x1b" not in text


def test_memory_as_json_agrees_with_predict(capsys):
    status, text, _ = report(
        capsys, "Qwen/Qwen2.5-14B", "--gpu", "l4", "--max-length", 4096, "--batch-size", 4, "--method", "lora",
        "--rank", 8, "--dropout", 0.1, "--optimizer", "adamw_torch", "--compute-dtype", "float16", "--adapter-dtype", "bfloat16",
        "--target-modules", "q_proj, v_proj", "--no-gradient-checkpointing", "--no-double-quant", "--upcast-fp32", "--attention", "eager",
        "--json",
    )  # fmt: skip
    found = json.loads(text)
    run = replace(
    GPU_RUN,
        method="lora", compute_dtype="float16", adapter_dtype="bfloat16", double_quant=False, rank=8,
        dropout=0.1, target_modules=["q_proj", "v_proj"], batch_size=4, max_length=4096,
        gradient_checkpointing=False, optimizer="adamw_torch", upcast_fp32=True, attention="eager",
    )  # fmt: skip
    shape = find_shape("Qwen/Qwen2.5-14B")
    prediction = predict(shape, run, "l4")
    assert status == 1
    assert found["settings"] == json.loads(json.dumps({name: getattr(run, name) for name in MEMORY_SETTINGS}))
    assert found["parts"] == prediction.parts
    for name in (
        "loaded_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "spare_bytes", "fits",
        "host_bytes_to_load", "disk_bytes", "trainable_parameters", "peak_phase",
    ):  # fmt: skip
        assert found[name] == getattr(prediction, name), name
    for name, value in found.items():
        assert "_bytes" not in name or type(value) is int, name
    assert (found["model"], found["parameters"]) == ("Qwen/Qwen2.5-14B", shape.parameters)
    assert (found["gpu"], found["usable_bytes"]) == (prediction.gpu.name, prediction.gpu.usable_bytes)
    assert found["largest_batch"] == largest_batch(shape, run, "l4")
    assert found["longest_sequence"] == longest_sequence(shape, run, "l4")
    wanted = cures(shape, run, "l4")
    assert wanted
    assert [(cure["what"], cure["price"], cure["device_bytes"]) for cure in found["cures"]] == [
        (change.what, change.price, change.prediction.device_bytes) for change in wanted
    ]


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", "float16"), ("v100", "float16"), ("a100-40", "bfloat16")])
def test_memory_computes_in_what_the_card_is_fast_in(capsys, gpu, dtype):
    _, text, _ = report(capsys, "qwen2.5-7b", "--gpu", gpu, "--json")
    assert json.loads(text)["settings"]["compute_dtype"] == dtype


def test_memory_takes_a_folder_and_no_longer_a_sequence_than_its_model(capsys):
    folder = data_path("tiny-llama")
    status, text, _ = report(capsys, folder, "--json")
    assert status == 0
    found = json.loads(text)
    assert found["model"] == "tiny-llama"
    assert found["settings"]["max_length"] == find_shape(folder).max_position_embeddings < 2048


# a mixture whose dense layers have the names that its experts once had
MIXTURE = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "decoder_sparse_step": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_family_that_is_not_written_out_is_answered_by_the_libraries(capsys, tmp_path):
    folder = tmp_path / "mixture"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTURE), encoding="utf-8")
    status, text, errors = report(capsys, folder, "--gpu", "t4", "--max-length", 64, "--json")
    found = json.loads(text)
    assert status == 0 and "the libraries run a step of it" in errors
    assert (found["road"], found["settings"]["dropout"]) == ("libraries", 0.0)
    assert any("only without dropout: dropout 0 is assumed" in sentence for sentence in found["assumed"])
    assert not found["weights"]["mostly"] and found["weights"]["why"].startswith("experts, ")
    weights = found["weights"]["in_4_bits"] + found["weights"]["in_16_bits"]
    assert 0.9 * found["loaded_bytes"] < weights < found["loaded_bytes"]  # the allocator's blocks are larger
    inside = sum(size for part, size in found["parts"].items() if part not in ("optimizer (paged)", "CUDA context"))
    assert inside == found["peak_allocated_bytes"]
    prediction = replace(
        predict(find_shape(folder), replace(GPU_RUN, max_length=64, dropout=0.0), "t4"), why_all="made up"
    )
    shown = " ".join(as_text(prediction, as_dict(prediction)).split())
    assert "This is no 4-bit model" in shown and "all its layers were run" in shown and "made up" in shown


def test_a_budget_chooses_how_the_run_is_made(capsys):
    status, text, errors = report(
        capsys, "llama-3.1-8b", "--gpu", "4090", "--batch-size", 2, "--accumulation", 4, "--memory-budget", "auto"
    )
    assert status == 0 and "looking for the fastest run that fits into the budget ..." in errors
    chosen = re.search(r"Chosen: (\d+) x 2048 tokens at once, (\d+) of 32 layers checkpointed: ([\d.]+) GiB", text)
    rows, kept, size = int(chosen[1]), int(chosen[2]), float(chosen[3])
    assert f"qlora: batch {rows} x 2,048 tokens" in text and f"the first {kept} layers checkpointed" in " ".join(
        text.split()
    )
    assert f"{size:.2f} GiB" in text.partition("\n\n")[2]  # the report is of this choice
    status, text, errors = report(capsys, "llama-3.1-8b", "--gpu", "4090", "--memory-budget", "12GiB", "--json")
    found = json.loads(text)
    assert "Chosen: " in errors and found["device_bytes"] < 12 * 2**30 - 256 * 2**20
    assert found["settings"]["checkpointed_layers"] is not None or found["settings"]["gradient_checkpointing"]


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            "40GiB",
            "--memory-budget=42949672960: is 40.00 GiB, and the Tesla T4 has 14.56 GiB. 'auto' takes what is free",
        ),
        ("lots", "--memory-budget='lots': must be \"auto\", a number of bytes, or a text such as"),
        ("3GiB", "is too little: the least that the run can do with is 1 x 2048 tokens at once, all layers"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget, words, capsys):
    status, _, errors = report(capsys, "llama-3.1-8b", "--gpu", "t4", "--memory-budget", budget)
    assert status == 2 and words in errors


def test_dropout_that_is_asked_for_is_not_taken_away(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE), encoding="utf-8")
    status, _, errors = report(capsys, tmp_path, "--max-length", 64, "--dropout", 0.1)
    assert status == 2 and "lora_dropout" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Qwen/Qwen2.5-8B",), ("Qwen/Qwen2.5-8B", "Qwen/Qwen2.5-7B", "config.json")),
        (("nowhere/config.json",), ("nowhere",)),
        (("qwen2.5-7b", "--gpu", "t5"), ("t5", "no GPU is known by this name", "t4", "--list", "16GiB")),
        (("qwen2.5-7b", "--batch-size", 0), ("--batch-size=0",)),
        (("qwen2.5-7b", "--method", "dora"), ("method", "dora", "qlora")),
        (("qwen2.5-7b", "--target-modules", "nothing"), ("nothing", "q_proj")),
        (("llama-2-7b-hf", "--max-length", 8192), ("--max-length=8192", "4096")),
    ],
)
def test_memory_names_what_is_wrong(capsys, arguments, words):
    status, text, errors = report(capsys, *arguments)
    assert (status, text) == (2, "")
    for word in words:
        assert str(word) in errors


@pytest.mark.parametrize("arguments", [(), ("--list",), ("qwen2.5-7b", "--list")])
def test_memory_lists_what_it_knows(capsys, arguments):
    status, text, _ = report(capsys, *arguments)
    assert status == 0
    assert max(map(len, text.splitlines())) <= 100
    models = json.loads(catalogue.TABLE.read_text(encoding="utf-8"))
    for name in (*models["models"], *models["aliases"], *models["finetunes"], *json.loads(gpus.TABLE.read_text())):
        assert name in text.split()
    _, text, _ = report(capsys, *arguments, "--list", "--json")
    assert json.loads(text)["models"]["Qwen/Qwen2.5-7B"]["parameters"] == find_shape("Qwen/Qwen2.5-7B").parameters
    assert json.loads(text)["gpus"]["t4"]["usable_bytes"] == find_gpu("t4").usable_bytes


def test_memory_lists_its_models_by_family_the_smallest_first(capsys):
    listed = report(capsys, "--list")[1].split("and other models of these kinds")[0].splitlines()[1:]
    families = [line for line in listed if line.endswith(":")]
    assert families == sorted(families) and {"gemma:", "llama:", "phi:", "qwen:"} <= {*families}
    start = listed.index("phi:")
    of_phi = listed[start + 1 : listed.index(families[families.index("phi:") + 1])]
    assert all("phi" in line.lower() for line in of_phi)
    sizes = [int(line.split()[1].replace(",", "")) for line in of_phi]
    assert sizes == sorted(sizes) and len(sizes) > 5


def test_memory_says_what_it_assumed_of_a_name(capsys):
    asked = "unsloth/Qwen3-8B-bnb-4bit"
    status, text, _ = report(capsys, asked)
    (said,) = find_shape(asked).assumed
    assert status in (0, 1)
    assert text.startswith("Qwen/Qwen3-8B: ") and f"note: {said}" in text.replace("\n  ", " ")
    assert json.loads(report(capsys, asked, "--json")[1])["assumed"] == [said]
    assert json.loads(report(capsys, "Qwen/Qwen3-8B", "--json")[1])["assumed"] == []


def test_memory_needs_no_torch(tmp_path):
    code = (
        "import sys; from qlora_helpers.__main__ import main; status = main(['memory', 'qwen2.5-14b', '--upcast-fp32']); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
    whole = call("memory", "qwen2.5-14b", "--upcast-fp32", cwd=tmp_path)
    assert (whole.returncode, whole.stdout) == (done.returncode, done.stdout)
    assert whole.returncode in (0, 1)


def test_a_verdict_that_hangs_on_little_says_so(monkeypatch, capsys):
    """On less than 1 GiB, or a tenth of what the run takes if that is less, in either direction."""
    for model, of_all in (("smollm2-135m", True), ("llama-3.1-70b", False)):
        needs = predict(find_shape(model), GPU_RUN, "l4").device_bytes
        assert (needs / 10 < GIB) == of_all
        margin = needs / 10 if of_all else GIB
        for spare, close in (
            (0, True),
            (margin - 2, True),
            (margin + 2, False),
            (2 - margin, True),
            (-margin - 2, False),
        ):
            gpu = replace(find_gpu("l4"), usable_bytes=int(needs + spare))
            monkeypatch.setattr(memory, "find_gpu", lambda name, gpu=gpu: gpu)
            _, text, _ = report(capsys, model, "--gpu", "l4")
            assert ("too close to promise" in text) == close, (model, spare)


# the models for which one change, several changes, and none at all is enough
@pytest.mark.parametrize("model", ["qwen2.5-7b", "llama-3.1-8b", "llama-3.1-70b"])
@pytest.mark.parametrize("number", [10**18 + 3, 2**62, 2**63 - 1])
@pytest.mark.parametrize("option", ["--batch-size", "--accumulation", "--max-length", "--rank"])
def test_a_number_of_any_size_is_answered_or_refused(capsys, option, number, model):
    status, text, errors = report(capsys, model, "--no-gradient-checkpointing", "--upcast-fp32", option, number)
    if option in ("--max-length", "--rank"):
        assert status == 2 and f"error: {option}={number}: must be no more than" in errors
    else:
        assert status in (0, 1) and "peak allocated" in text


@pytest.mark.parametrize("number", [2**63, 10**20, 10**30, "9" * 5_000, "inf", "nan", "1e30", -(10**30)])
def test_a_number_beyond_64_bits_is_refused(capsys, number):
    for option in ("--batch-size", "--accumulation", "--max-length", "--rank"):
        status, text, errors = report(capsys, "qwen2.5-7b", f"{option}={number}")
        assert (status, text) == (2, "")
        assert errors.startswith(f"error: {option}=") and "must be a whole number" in errors


def test_a_model_without_a_stated_end_takes_a_sequence_of_any_length(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for length in (10**18 + 3, 2**63 - 1):
        status, text, _ = report(capsys, tmp_path, "--max-length", length)
        assert status == 1 and "does not fit" in text


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"\xff", b"{", b"[]", b'{"model_type": "gpt_neox", "rope_parameters": [1]}'],
    ids=range(5),
)
def test_a_file_that_is_no_config_is_refused(capsys, content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    for model in (tmp_path, tmp_path / "config.json"):
        status, text, errors = report(capsys, model)
        assert (status, text) == (2, "")
        assert errors.startswith("error: ") and len(errors) < 500


@pytest.mark.parametrize(
    "model", ["x" * 5_000, "x/" * 3_000, "\0", "..", "con\nfig", "x" * 5_000 + ".json"], ids=range(6)
)
def test_a_name_that_no_model_has_is_refused(capsys, model):
    status, text, errors = report(capsys, model)
    assert (status, text) == (2, "") and errors.startswith("error: ")


def test_a_bad_rank_is_refused_for_full_fine_tuning_too(capsys):
    status, _, errors = report(capsys, "qwen2.5-7b", "--method", "full", "--rank", "x")
    assert status == 2 and "error: --rank='x': must be a whole number" in errors


@pytest.mark.parametrize("spare", [0.99, -0.99, 1.01, -1.01])
@pytest.mark.parametrize(
    ("model", "limit"),
    [("Qwen/Qwen2.5-14B", lambda needed: GIB), ("HuggingFaceTB/SmolLM2-135M", lambda needed: needed / 10)],
    ids=["of many GiB, 1 GiB", "of a few, a tenth"],
)
def test_a_verdict_within_1_gib_or_a_tenth_of_what_is_needed_is_said_to_be_close(model, limit, spare):
    run = replace(GPU_RUN, max_length=256)
    needed = predict(find_shape(model), run, "l4").device_bytes
    prediction = predict(find_shape(model), run, card(needed + round(spare * limit(needed))))
    assert ("too close to promise" in as_text(prediction, as_dict(prediction))) is (abs(spare) < 1)


# ---- several GPUs


def test_the_report_of_several_gpus_is_that_of_each_with_main_memory(capsys):
    status, text, errors = report(
        capsys, "Llama-3.1-70B", "--gpu", "3090", "--gpus", 2, "--sharding", "fsdp", "--cpu-offload"
    )
    run = replace(GPU_RUN, num_gpus=2, batch_size=2, sharding="fsdp", cpu_offload=True)  # a sequence on each GPU
    prediction = predict(find_shape("Llama-3.1-70B"), run, "3090")
    assert (status, errors) == (0, "")
    words = " ".join(text.split())
    assert "batch 2 x 2,048 tokens on 2 GPUs, split with FSDP, its shards in main memory" in words
    assert "It was measured on two H200s (data/measured/several_gpus.json), and not on one or on more" in words
    assert "torch's allocator reserves more here than its tensors need" in words
    lines = {line[:26].strip(): line[26:36].strip() for line in text.splitlines()}
    for name, size in {
        **{name: size for name, size in prediction.parts.items() if size},
        "on each card": prediction.device_bytes, "host memory of the run": prediction.host_bytes_of_run,
        "really in 4 bits": 35_318_165_504,
    }.items():  # fmt: skip
        assert lines[name] == f"{size / GIB:.2f} GiB", name
    assert "host memory to load" not in lines and "paged" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_run_that_does_not_fit_is_told_of_several_gpus(capsys):
    status, text, _ = report(capsys, "Llama-3.1-70B", "--gpu", "3090")
    assert status == 1
    words = " ".join(text.split())
    assert "With FSDP, predicted, the fewest GPUs first: 1. FSDP on this GPU alone" in words
    assert "2. or 2 GPUs like this one, the model split over them with FSDP, its shards in main memory" in words


def test_the_cheapest_sets_are_listed_when_they_are_asked_for(capsys):
    text = report(capsys, "Llama-3.1-70B", "--gpu", "3090")[1]
    assert "Where it fits" not in text
    text = report(capsys, "Llama-3.1-70B", "--gpu", "3090", "--cheapest")[1]
    sets = text[text.index("Where it fits") :].splitlines()
    totals = [int(line[:5]) for line in sets[1:] if line[5:9] == " GB:"]
    assert len(totals) > 5 and totals == sorted(totals)
    assert any("48 GB: 1 x 48 GB (" in line for line in sets)
    of_a_t4 = report(capsys, "Llama-3.1-70B", "--gpu", "t4", "--cheapest")[1]
    assert of_a_t4[of_a_t4.index("Where it fits") :].splitlines() == sets  # its float16 is not that of other cards
    assert max(map(len, sets)) <= 100


def test_json_has_main_memory_the_next_steps_and_the_cheapest_sets(capsys):
    found = json.loads(report(capsys, "Llama-3.1-70B", "--gpu", "3090", "--cheapest", "--json")[1])
    assert found["host_bytes_of_run"] == sum(found["host_parts"].values()) == found["host_bytes_to_load"]
    assert [change["settings"]["num_gpus"] for change in found["several_gpus"]] == [1, 2, 4]
    assert all(type(one["device_bytes"]) is type(one["host_bytes_of_run"]) is int for one in found["cheapest_sets"])
    assert "cheapest_sets" not in json.loads(report(capsys, "Llama-3.1-70B", "--gpu", "3090", "--json")[1])


def test_a_model_too_large_for_all_known_gpus_is_said_so(capsys):
    wanted = ("--no-gradient-checkpointing", "--max-length", 131_072, "--cheapest")
    assert "It fits on none of the known GPUs, up to 8 of them." in report(capsys, "Llama-3.1-70B", *wanted)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", 2, "--batch-size", 3), "error: --gpus=2: must divide --batch-size=3"),
        (("--cpu-offload",), "error: --cpu-offload=True: needs sharding='fsdp'"),
        (("--sharding", "zero"), "error: --sharding='zero': choose one of fsdp"),
        (("--sharding", "fsdp", "--memory-budget", "auto"), "error: --memory-budget='auto': leave it out"),
        (
            ("--sharding", "fsdp", "--optimizer", "adamw_8bit"),
            "error: --optimizer='adamw_8bit': with --sharding='fsdp' choose",
        ),
        (("--gpus", "two"), "error: --gpus='two': must be a whole number"),
    ],
)
def test_what_is_wrong_with_several_gpus_is_said_in_the_command_line_s_words(options, message, capsys):
    status, _, errors = report(capsys, "Llama-3.1-8B", *options)
    assert status == 2 and message in errors
