"""The GPUs that are known by name, as people write it, and those that are given by their memory."""

import json
from dataclasses import replace

import pytest

from qlora_helpers.memory import GPU, GPU_RUN, find_gpu, find_shape, gpus, known_gpus, predict
from qlora_helpers.units import GIB

ENTRIES = json.loads(gpus.TABLE.read_text(encoding="utf-8"))

# As people type them, and what they mean. What a name leaves open is in LEFT_OPEN.
NAMES = {
    "t4": ("T4", "tesla t4", "Tesla T4", "NVIDIA T4 16GB", "T4 15GB", "Google Colab T4", "colab t4"),
    "p100": ("Tesla P100-PCIE-16GB", "kaggle p100", "P100 16GB", "Kaggle (P100)"),
    "p40": ("Tesla P40",),
    "v100-16": ("v100-sxm2-16gb", "V100 16 GB"),
    "v100-32": ("v100 32gb", "Tesla V100-SXM2-32GB", "Tesla V100-PCIE-32GB"),
    "l4": ("NVIDIA L4", "L4 24GB", "colab l4", "L4 22.5GB"),
    "l40": ("L40", "NVIDIA L40 48GB"),
    "l40s": ("L40S", "nvidia l40s 48gb"),
    "a10": ("NVIDIA A10", "A10 24GB"),
    "a10g": ("A10G", "NVIDIA A10G 24GB"),
    "a16": ("NVIDIA A16",),
    "a30": ("NVIDIA A30 24GB",),
    "a40": ("NVIDIA A40",),
    "a100-40": ("a100-sxm4-40gb", "NVIDIA A100-PCIE-40GB", "a100 40", "A100 PCIe 40 GB"),
    "a100-80": ("A100 80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB", "a100 80gb sxm", "colab a100 80gb"),
    "h100": ("H100", "H100 PCIe", "h100 80gb hbm3", "NVIDIA H100 SXM5", "h100-80", "H100 80GB PCIe"),
    "h100-nvl": ("H100 NVL", "NVIDIA H100 NVL 94GB"),
    "gh200": ("NVIDIA GH200 480GB", "GH200"),
    "h200": ("NVIDIA H200", "h200 141gb", "H200 SXM"),
    "b200": ("NVIDIA B200", "B200 192GB"),
    "mi300x": ("MI300X", "AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
    "1080ti": ("GTX 1080 Ti", "1080ti", "NVIDIA GeForce GTX 1080 Ti 11GB"),
    "2080ti": ("RTX 2080 Ti", "GeForce RTX 2080Ti"),
    "titan-rtx": ("TITAN RTX", "NVIDIA TITAN RTX"),
    "3060-12": ("RTX 3060 12GB", "3060 12gb", "NVIDIA GeForce RTX 3060 12GB", "rtx 3060 12", "3060-12gb"),
    "3060-8": ("RTX 3060 8GB",),
    "3060ti": ("3060 ti", "RTX 3060Ti"),
    "3070": ("rtx3070", "RTX 3070 8GB"),
    "3080-12": ("3080 12gb",),
    "3080ti": ("RTX 3080 Ti",),
    "3080-laptop-16": ("RTX 3080 Laptop 16GB", "3080 mobile 16gb"),
    "3090": ("RTX 3090", "rtx-3090", "GeForce RTX 3090 24GB", "RTX_3090"),
    "3090ti": ("3090 Ti", "RTX 3090ti"),
    "4060ti-16": ("NVIDIA GeForce RTX 4060 Ti 16GB", "4060 ti 16g", "rtx 4060ti 16 gb"),
    "4060ti-8": ("4060 Ti 8GB",),
    "4060-laptop": ("RTX 4060 Laptop", "NVIDIA GeForce RTX 4060 Laptop GPU"),
    "4070tisuper": ("4070 ti super", "RTX 4070 Ti SUPER"),
    "4070super": ("rtx 4070 super",),
    "4080super": ("RTX 4080 Super 16GB",),
    "4090": ("RTX 4090", "NVIDIA GeForce RTX 4090", "nvidia 4090", "geforce rtx4090 24gb"),
    "4090-laptop": ("RTX 4090 Mobile", "4090 laptop"),
    "5060ti-16": ("rtx 5060 ti 16 gb",),
    "5070ti": ("RTX 5070 Ti",),
    "5090": ("RTX 5090 32GB", "rtx5090"),
    "quadro-6000": ("quadro rtx 6000", "RTX 6000 24GB"),
    "quadro-8000": ("Quadro RTX 8000", "rtx 8000"),
    "a4000": ("RTX A4000", "NVIDIA RTX A4000"),
    "a5000": ("RTX A5000 24GB",),
    "a6000": ("RTX A6000", "nvidia a6000", "A6000 48GB"),
    "4000-ada": ("RTX 4000 Ada", "RTX 4000 SFF Ada Generation"),
    "6000-ada": ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", "A6000 Ada", "RTX 6000 48GB"),
    "pro-6000": (
        "RTX PRO 6000",
        "RTX PRO 6000 Blackwell",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "rtx 6000 pro",
    ),
    "pro-5000-72": ("RTX PRO 5000 72GB",),
}
# What a name leaves open: the card that is taken, and words of the note.
LEFT_OPEN = {
    "NVIDIA GeForce RTX 3060": ("3060-8", "3060-12"),
    "3060": ("3060-8", "3060-12"),
    "rtx 3080": ("3080-10", "3080-12"),
    "3080 laptop": ("3080-laptop-8", "3080-laptop-16"),
    "RTX 4060 Ti": ("4060ti-8", "4060ti-16"),
    "RTX 3050": ("3050-6", "3050-8"),
    "A100": ("a100-40", "a100-80"),
    "colab a100": ("a100-40", "a100-80"),
    "V100": ("v100-16", "v100-32"),
    "RTX 6000": ("quadro-6000", "6000-ada or pro-6000"),
    "rtx 4000": ("quadro-4000", "4000-ada"),
    "colab": ("t4", "colab l4"),
    "colab free": ("t4", "a T4 is assumed"),
    "Google Colab Pro": ("t4", "a T4 is assumed"),
    "kaggle": ("t4", "kaggle p100"),
    "kaggle t4 x2": ("t4", "one of the 2 cards is counted; for a run on all of them set num_gpus=2"),
    "Kaggle 2x T4": ("t4", "one of the 2 cards"),
    "2x 4090": ("4090", "one of the 2 cards"),
    "8xH100": ("h100", "one of the 8 cards"),
    "4 x A100 80GB": ("a100-80", "one of the 4 cards"),
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in NAMES.items() for name in names])
def test_a_gpu_is_found_as_people_write_it(key, name):
    for written in (name, name.lower(), name.upper(), f"  {name} "):
        assert find_gpu(written) == known_gpus()[key]
    assert find_gpu(name).notes == known_gpus()[key].notes  # nothing is left open


@pytest.mark.parametrize(("name", "key", "words"), [(name, *meant) for name, meant in LEFT_OPEN.items()])
def test_what_a_name_leaves_open_is_said(name, key, words):
    found = find_gpu(name)
    assert found == known_gpus()[key]
    first, *rest = found.notes
    assert words in first and tuple(rest) == known_gpus()[key].notes


@pytest.mark.parametrize("key", ENTRIES)
def test_every_card_is_found_by_its_key_its_name_and_its_aliases(key):
    entry = ENTRIES[key]
    assert find_gpu(key) == find_gpu(entry["name"]) == known_gpus()[key]
    for name in entry["aliases"]:
        found = find_gpu(name)
        assert found == known_gpus()[key] or key in found.notes[0]
    size = entry["nominal_gib"]
    assert find_gpu(f"{key.removesuffix(f'-{size}')} {size}GB") == known_gpus()[key]


def test_the_smallest_card_of_a_name_is_taken():
    """A promise that a run fits must hold for whatever card was meant."""
    for name, (key, words) in LEFT_OPEN.items():
        for other in words.split(" or "):
            if other in known_gpus():
                assert find_gpu(name).usable_bytes == known_gpus()[key].usable_bytes < known_gpus()[other].usable_bytes


# The table


def test_known_gpus_have_less_usable_memory_than_their_name_says():
    wanted = {
        "t4",
        "p100",
        "v100-16",
        "l4",
        "a10",
        "3060-12",
        "3090",
        "4090",
        "5090",
        "a100-40",
        "a100-80",
        "h100",
        "h200",
    }
    assert wanted <= set(known_gpus()) and len(known_gpus()) > 100
    for key, gpu in known_gpus().items():
        assert 0.9 * ENTRIES[key]["nominal_gib"] < gpu.usable_bytes / GIB < ENTRIES[key]["nominal_gib"]
    assert find_gpu("A100 80GB") == find_gpu("a100-80") != find_gpu("a100-40")


def test_memory_without_a_source_is_estimated_and_never_more_than_of_any_known_card_of_its_kind():
    shares = {}
    for key, entry in ENTRIES.items():
        share = known_gpus()[key].usable_bytes / GIB / entry["nominal_gib"]
        shares.setdefault(("GeForce" in entry["name"], known_gpus()[key].nominal), []).append(share)
        assert known_gpus()[key].nominal == ("usable_gib" not in entry) == (entry["source"] == "nominal")
        estimated = any("is estimated" in note for note in known_gpus()[key].notes)
        assert estimated == known_gpus()[key].nominal
    for geforce in (True, False):
        assert max(shares[geforce, True]) <= min(shares[geforce, False]) + 1e-9
    assert min(shares[False, False]) == pytest.approx(0.91, abs=0.001)  # a T4
    assert min(shares[True, False]) == pytest.approx(5.66 / 6, abs=0.001)  # an RTX 3050 6GB


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("1080ti", (6, 1)),
        ("p100", (6, 0)),
        ("v100-32", (7, 0)),
        ("2080ti", (7, 5)),
        ("quadro-8000", (7, 5)),
        ("a30", (8, 0)),
        ("a100-80", (8, 0)),
        ("a16", (8, 6)),
        ("3090", (8, 6)),
        ("a6000", (8, 6)),
        ("l40", (8, 9)),
        ("4060-laptop", (8, 9)),
        ("6000-ada", (8, 9)),
        ("h100-nvl", (9, 0)),
        ("b200", (10, 0)),
        ("5060ti-16", (12, 0)),
        ("pro-6000", (12, 0)),
    ],
)
def test_compute_capabilities(name, capability):
    assert find_gpu(name).compute_capability == capability


def test_the_context_is_a_cards_own_where_it_was_measured_and_else_the_largest():
    measured = {key: gpu.context_bytes for key, gpu in known_gpus().items() if gpu.context_measured}
    assert set(measured) == {"h200", "h100"}
    assert measured["h200"] == gpus.CONTEXT_BYTES == max(measured.values())
    assert measured["h100"] / GIB == pytest.approx(0.606)
    assert {gpu.context_bytes for gpu in known_gpus().values() if not gpu.context_measured} == {gpus.CONTEXT_BYTES}
    at_work = gpus.measured_gpu("NVIDIA H100 80GB HBM3", 79 * GIB, (9, 0))
    assert (at_work.context_bytes, at_work.context_measured) == (measured["h100"], True)
    parts = predict(find_shape("Qwen/Qwen2.5-7B"), GPU_RUN, "h100").parts
    assert parts["CUDA context"] == measured["h100"]


def test_an_amd_card_says_that_nothing_was_tried_on_it():
    assert "AMD" in find_gpu("mi300x").notes[0] and "ROCm" in find_gpu("mi300x").notes[0]


# By memory


@pytest.mark.parametrize(
    ("name", "usable", "capability", "notes"),
    [
        ("16GiB", 16 * GIB, (8, 0), ("a T4 of 16 GB has 14.56", "compute capability 8.0 is assumed")),
        ("16 gib", 16 * GIB, (8, 0), ("a T4", "'16GiB sm_75'")),
        ("16GB", 16 * 10**9, (8, 0), ("16 x 10^9 bytes, 14.90 GiB; for 2^30 write 16GiB", "a T4", "'16GB sm_75'")),
        ("15.6GiB sm_75", int(15.6 * GIB), (7, 5), ("a T4",)),
        ("24GiB 8.6", 24 * GIB, (8, 6), ("a T4",)),
        ("24GiB:8.9", 24 * GIB, (8, 9), ("a T4",)),
        ("32GiB sm_120", 32 * GIB, (12, 0), ("a T4",)),
        ("180 GB, sm100", 180 * 10**9, (10, 0), ("10^9", "a T4")),
    ],
)
def test_any_other_card_is_given_by_its_memory(name, usable, capability, notes):
    found = find_gpu(name)
    assert (found.usable_bytes, found.compute_capability, found.nominal) == (usable, capability, False)
    assert len(found.notes) == len(notes) and all(words in note for words, note in zip(notes, found.notes, strict=True))


def test_a_card_by_its_memory_predicts_as_the_card_does():
    shape, t4 = find_shape("Qwen/Qwen2.5-7B"), find_gpu("t4")
    run = replace(GPU_RUN, compute_dtype="float16")
    assert predict(shape, run, "14.56GiB sm_75").parts == predict(shape, run, t4).parts
    assert predict(shape, run, "14.56GiB").parts != predict(shape, run, t4).parts


# What is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "perhaps t4"),
        ("rtx 3099", "perhaps"),
        ("m2 max", "no GPU is known by this name"),
        ("16", "16GiB"),
        ("", "--list"),
        ("RTX 4070 16GB", "this card has 12 GB"),
        ("a100 64gb", "this card has 40 GB or 80 GB"),
        ("0GiB", "more than 0"),
        ("99999GiB", "at most 10,000 GiB"),
        ("-16GiB", "no GPU is known"),
        (None, "no GPU is known"),
    ],
)
def test_what_is_not_known_is_refused_with_the_cure(name, words):
    with pytest.raises(ValueError, match="gpu=") as error:
        find_gpu(name)
    assert words in str(error.value)


def test_a_gpu_is_its_own_name():
    made_up = GPU("mine", 1, (8, 0), 0)
    assert find_gpu(made_up) is made_up


def test_each_card_has_the_size_that_it_is_sold_with():
    sizes = gpus.nominal_gib()
    assert sizes.keys() == known_gpus().keys() and sizes["3090"] == 24 and sizes["t4"] == 16
    assert all(gpu.usable_bytes <= sizes[key] * GIB for key, gpu in known_gpus().items())
