"""Claims about sizes: parameters, bytes, what fits where. From the models' shapes, the predictor, and measured runs."""

import json
from dataclasses import replace
from functools import cache

import torch

from data.scripts.claims.rules import Finding, by_setting, claim, number, parts
from qlora_helpers.memory import (
    Prediction,
    find_gpu,
    find_shape,
    known_gpus,
    predict,
    predict_merge,
)
from qlora_helpers.memory.catalogue import predicted_models
from qlora_helpers.memory.methods import memory_of_methods
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.units import GB, GIB, MIB

LLAMA_8B, LLAMA_2_70B, LLAMA_3_70B = (
    find_shape(f"meta-llama/{name}") for name in ("Llama-3.1-8B", "Llama-2-70b-hf", "Llama-3.1-70B")
)
LLAMA_13B, LLAMA_33B, LLAMA_65B = map(
    find_shape, ("meta-llama/Llama-2-13b-hf", "huggyllama/llama-30b", "huggyllama/llama-65b")
)
GPT_J, NEOX = find_shape("EleutherAI/gpt-j-6b"), find_shape("EleutherAI/gpt-neox-20b")

NESTED = 256  # scales that share a second-level scale
SCALES_SINGLE = 32 / 64  # bits per parameter: a float32 scale for 64 weights
SCALES_DOUBLE = 8 / 64 + 32 / (64 * NESTED)  # an 8-bit code, and its share of the second level
LEAST = replace(GPU_RUN, max_length=512)  # rank 16, one sequence of 512 tokens
# the first article's own settings: four sequences of 2,048 tokens, float32 copies, bfloat16
FIRST = replace(GPU_RUN, batch_size=4, max_length=2048, upcast_fp32=True, adapter_dtype="bfloat16")
# the second article's: rank 64, one sequence of 512 tokens, 32-bit paged states, float32 copies
SECOND = replace(
    GPU_RUN, max_length=512, rank=64, optimizer="paged_adamw_32bit", upcast_fp32=True, adapter_dtype="bfloat16"
)
SMALLEST_PAGED = 100_000  # elements: bitsandbytes pages no smaller tensor's state


def measured(name: str):
    return json.loads(data_path("measured", f"{name}.json").read_text(encoding="utf-8"))


def of_merging() -> dict[str, dict]:
    """For each way to merge an adapter into 8B, by name: its cost and result."""
    return {row["way"]: row for row in measured("merging")["rows"]}


@cache
def of_memory_runs() -> dict[str, dict]:
    """Runs of 8B by label: those made to die under a cap, their cures, and what they take without a cap."""
    return {row["label"]: row for row in measured("oom")["rows"]}


def weight_bytes(shape, double_quant: bool = True, other_bytes: int = 2) -> float:
    """A loaded 4-bit model: its linear layers with their scales, the rest in 16 or 32 bits."""
    bits = 4 + (SCALES_DOUBLE if double_quant else SCALES_SINGLE)
    return shape.linear_parameters * bits / 8 + (shape.parameters - shape.linear_parameters) * other_bytes


def gb(size: float, digits: int = 2) -> str:
    return f"{size / GB:.{digits}f}"


def gib(size: float, digits: int = 2) -> str:
    return f"{size / GIB:.{digits}f}"


def consumer_cards():
    return [card for card in map(find_gpu, known_gpus()) if "GeForce" in card.name]


def largest_consumer_card():
    return max(consumer_cards(), key=lambda card: card.usable_bytes)


# ---- weights alone


@claim("A2.1")
def weights_70b_16_bit() -> Finding:
    return number("140", LLAMA_3_70B.parameters * 2 / GB, "GB", 2, [gib(LLAMA_3_70B.parameters * 2)])


@claim("A2.2")
def no_consumer_card_holds_70b_in_16_bit() -> Finding:
    room = largest_consumer_card().usable_bytes
    return by_setting(LLAMA_3_70B.parameters * 2 > room, value=f"{gib(room)} GiB")


@claim("B37.2")
def weights_llama_2_70b_16_bit() -> Finding:
    return number("140", LLAMA_2_70B.parameters * 2 / GB, "GB", 2, [gib(LLAMA_2_70B.parameters * 2)])


@claim("A12.1")
def printed_float32() -> Finding:
    return number("280", 70e9 * 4 / 1e9, "GB")


@claim("A13.1")
def printed_float16() -> Finding:
    return number("140", 70e9 * 2 / 1e9, "GB")


@claim("A14.1")
def printed_int8() -> Finding:
    return number("70", 70e9 * 1 / 1e9, "GB")


@claim("A15.1")
def printed_int4() -> Finding:
    return number("35", 70e9 * 0.5 / 1e9, "GB")


@claim("A11.1")
def bytes_of_a_4_bit_parameter() -> Finding:
    single, double = ((4 + scales) / 8 for scales in (SCALES_SINGLE, SCALES_DOUBLE))
    return number("0.5", double, "bytes", 4, [f"{single:.4f}"])


@claim("A16.1")
def four_bit_llama_3_70b() -> Finding:
    size = weight_bytes(LLAMA_3_70B)
    rest = (LLAMA_3_70B.parameters - LLAMA_3_70B.linear_parameters) * 2
    return number("35", size / GB, "GB", 2, [gib(size), gb(rest)])


@claim("A16.2")
def four_bit_70b_on_one_a100_80() -> Finding:
    size, room = weight_bytes(LLAMA_3_70B), find_gpu("a100-80").usable_bytes
    return by_setting(size < room, value=f"{gib(size)} GiB", shown=[gib(room)])


@claim("A16.3")
def four_bit_70b_on_two_4090s() -> Finding:
    size, room = weight_bytes(LLAMA_3_70B), 2 * find_gpu("4090").usable_bytes
    rows = [
        row
        for row in measured("several_gpus")["rows"]
        if (row["label"], row["made_on"]["gpus"]) == ("70B fsdp x2 512", 2)
    ]
    (failed,) = (row for row in rows if row["outcome"] == "out of memory")
    return by_setting(size < room, value=f"{gib(size)} GiB", shown=[gib(room), f"{gib(failed['cap_bytes'], 0)} GiB"])


@claim("B37.3")
def four_bit_llama_2_70b_without_double_quantisation() -> Finding:
    single, double = weight_bytes(LLAMA_2_70B, False), weight_bytes(LLAMA_2_70B)
    return number("35", single / GB, "GB", 2, [gb(double), gib(single), gib(double)])


@claim("B37.4")
def four_bit_70b_is_too_large_for_24_gib() -> Finding:
    size, room = weight_bytes(LLAMA_2_70B), find_gpu("4090").usable_bytes
    return by_setting(size > room, value=f"{gib(size)} GiB", shown=[gib(room)])


@claim("B285.4")
def main_memory_to_merge_70b() -> Finding:
    in_memory = predict_merge(LLAMA_2_70B, "16bit", SECOND).peak_bytes
    from_files = of_merging()["16bit, from file to file"][
        "host_peak_bytes"
    ]  # of 8B; 70B has larger files, not larger steps
    weights = LLAMA_2_70B.parameters * 2
    return by_setting(
        in_memory > 140 * GB, from_files / (LLAMA_8B.parameters * 2) >= 1, value=f"{gb(in_memory)} GB",
        claimed="more than 140 GB", shown=[gb(weights), gb(from_files), gb(LLAMA_8B.parameters * 2)],
    )  # fmt: skip


# ---- double quantisation


@claim("A35.1")
def overhead_single() -> Finding:
    return number("0.5", SCALES_SINGLE, "bits", 1)


@claim("A39.1")
def overhead_double() -> Finding:
    return number("0.16", SCALES_DOUBLE, "bits", 6, [f"{NESTED}", f"{1024 // 64}"])  # 32/1024 is the article's


@claim("A40.1")
def saving_in_the_first_article() -> Finding:
    return number("0.34", SCALES_SINGLE - SCALES_DOUBLE, "bits", 6)


@claim("A41.1")
def saving_for_llama_3_70b() -> Finding:
    saved = LLAMA_3_70B.linear_parameters * (SCALES_SINGLE - SCALES_DOUBLE) / 8
    return number("3", saved / GB, "GB", 2, [f"{LLAMA_3_70B.linear_parameters / 1e9:.2f}", gib(saved)])


@claim("B41.4")
def saving_in_the_second_article() -> Finding:
    return number("0.4", SCALES_SINGLE - SCALES_DOUBLE, "bits", 6)


@claim("B41.5")
def saving_for_llama_2_70b() -> Finding:
    saved = LLAMA_2_70B.linear_parameters * (SCALES_SINGLE - SCALES_DOUBLE) / 8
    return number("3.26", saved / GB, "GB", 2, [gib(saved)])


@claim("B41.6")
def unit_of_the_second_article_s_formula() -> Finding:
    result = 70 * 10**9 * 0.4 / (8 * 1024**3)  # as printed there: the result is in GiB
    return number("3.26", result * GIB / GB, "GB", 2, [f"{result:.2f}"])


@claim("B41.7")
def double_quantisation_can_decide() -> Finding:
    cards = [find_gpu(name) for name in ("3060-12", "t4", "4090", "a100-40", "a6000", "a100-80")]
    single = replace(LEAST, double_quant=False)
    decided = any(
        predict(find_shape(name), LEAST, card).fits and not predict(find_shape(name), single, card).fits
        for name in predicted_models()
        for card in cards
    )
    return by_setting(decided)


# ---- training: what it takes


@claim("C31.1")
def full_fine_tuning_65b() -> Finding:
    each = 2 + 2 + 4 + 4  # weight and gradient in 16 bits, two float32 states
    size = LLAMA_65B.parameters * each
    return by_setting(
        size > 780 * GB, value=f"{gb(size, 1)} GB", claimed="more than 780 GB", shown=[gb(65e9 * each, 0), f"{each}"]
    )


@claim("C31.2")
def ten_a100_hold_780_gb() -> Finding:
    cards = -(-780 * GB // (80 * GB))
    return by_setting(cards == 10, value=f"{cards:.0f} cards", claimed="10 cards", shown=["800"])


def within(claimed: float, *sizes: float) -> list[bool]:
    """For each run: does it stay within the claimed GB, plus 5 %?"""
    return [size <= claimed * GB * 1.05 for size in sizes]


@claim("A91.1")
def full_fine_tuning_8b() -> Finding:
    return number("60", LLAMA_8B.parameters * 8 / GB, "GB", 1, [gb(LLAMA_8B.parameters * 16, 1)])


@claim("A92.1")
def lora_8b() -> Finding:
    small, own = (
        predict(LLAMA_8B, replace(run, method="lora", upcast_fp32=False)).peak_allocated_bytes for run in (LEAST, FIRST)
    )
    return by_setting(
        *within(18, small, own), value=f"{gb(small, 1)} GB to {gb(own, 1)} GB", claimed="18 GB",
        shown=[gb(LLAMA_8B.parameters * 2)],
    )  # fmt: skip


@claim("A93.1")
def qlora_8b() -> Finding:
    small = predict(LLAMA_8B, LEAST).peak_allocated_bytes
    (row,) = [
        row
        for row in measured("t4_gear")["rows"]
        if (row["model"], row["who"], row["gear"], row.get("batch_size")) == ("Llama-3.1-8B", "recipe", "ampere", 4)
    ]
    own = row["peak_allocated_bytes"]
    return by_setting(
        *within(6, small, own), value=f"{gb(small, 1)} GB to {gb(own, 1)} GB", claimed="6 GB",
        shown=[gb(weight_bytes(LLAMA_8B))],
    )  # fmt: skip


@claim("A99.1")
def full_fine_tuning_70b() -> Finding:
    return number("500", LLAMA_3_70B.parameters * 8 / GB, "GB", 1, [gb(LLAMA_3_70B.parameters * 16, 0)])


@claim("A99.2")
def full_fine_tuning_70b_is_impossible() -> Finding:
    size = LLAMA_3_70B.parameters * 8
    largest, a100 = max(find_gpu(card).usable_bytes for card in known_gpus()), find_gpu("a100-80").usable_bytes
    return by_setting(
        size > largest, size > 8 * a100, value=f"{gb(size, 1)} GB", shown=[gb(largest, 0), gb(8 * a100, 0)]
    )


@claim("A100.1")
def lora_70b() -> Finding:
    small, own = (
        predict(LLAMA_3_70B, replace(run, method="lora", upcast_fp32=False)).peak_allocated_bytes
        for run in (LEAST, FIRST)
    )
    return by_setting(
        *within(150, small, own), value=f"{gb(small, 1)} GB to {gb(own, 1)} GB", claimed="150 GB",
        shown=[gb(LLAMA_3_70B.parameters * 2)],
    )  # fmt: skip


@claim("A100.2")
def lora_70b_needs_several_cards() -> Finding:
    run = replace(LEAST, method="lora")
    cards = [find_gpu(name) for name in ("a100-80", "b200")]
    fits = [predict(LLAMA_3_70B, run, card).fits for card in cards]
    return by_setting(
        *(not fit for fit in fits), value=f"{gib(cards[1].usable_bytes)} GiB", shown=[gib(cards[0].usable_bytes)]
    )


@claim("A101.1")
def qlora_70b() -> Finding:
    small = predict(LLAMA_3_70B, LEAST).peak_allocated_bytes
    row = measured("memory")["rows"][0]
    if row["label"] != "llama-3.1-70b qlora bf16 r64 1x512 ckpt paged_adamw_32bit":
        raise RuntimeError(f"the first measured run is {row['label']}, not the one of 70B")
    on_card = row["device_used_bytes"]
    return by_setting(
        *within(48, small, on_card), value=f"{gb(small, 1)} GB to {gb(on_card, 1)} GB", claimed="48 GB",
        shown=[gb(row["peak_allocated_bytes"], 1)],
    )  # fmt: skip


@claim("A101.2", "A167.1")
def qlora_70b_on_one_a100_80() -> Finding:
    p = predict(LLAMA_3_70B, LEAST, "a100-80")
    return by_setting(p.fits, value=f"{gib(p.device_bytes, 1)} GiB", shown=[gib(p.gpu.usable_bytes)])


def before_activations(method: str) -> float:
    """Bytes of weights, gradients and optimizer states of Llama-3.1-8B, wherever they lie: states in float32, rank 16."""
    (run,) = memory_of_methods(LLAMA_8B, [(method, "paged_adamw_32bit")])
    return run.kept


@claim("C49.4")
def lora_reduces_memory() -> Finding:
    full, lora = before_activations("full"), before_activations("lora")
    return by_setting(lora < full, value=f"{full / lora:.1f} times less", shown=[gb(full, 1), gb(lora, 1)])


@claim("A204.2", "C61.1")
def qlora_reduces_memory() -> Finding:
    full, lora, qlora = map(before_activations, ("full", "lora", "qlora"))
    sizes = [gb(full, 1), gb(lora, 1), gb(qlora, 1)]
    return by_setting(qlora < lora < full, value=f"{full / qlora:.1f} times less", shown=sizes)


# ---- what fits where


def fits(shape, gpu: str, run: Settings = LEAST) -> Prediction:
    return predict(shape, run, gpu)


def on_a_card(*predictions: Prediction) -> Finding:
    """Judge "it fits": the whole process, including the CUDA context, against the card's usable memory."""
    needs = [gib(p.device_bytes, 1) for p in predictions]
    value = " and ".join(dict.fromkeys(needs)) + " GiB"  # each once, in order
    return by_setting(*(p.fits for p in predictions), value=value, shown=[gib(p.gpu.usable_bytes) for p in predictions])


@claim("C13.1")
def billions_on_consumer_hardware() -> Finding:
    return on_a_card(fits(LLAMA_8B, "3060-12"))


@claim("A164.1")
def eight_billion_on_12_gb() -> Finding:
    return on_a_card(fits(LLAMA_8B, "3060-12"))


@claim("A165.1")
def eight_billion_on_24_gb() -> Finding:
    return on_a_card(fits(LLAMA_8B, "4090", FIRST), fits(LLAMA_8B, "3090", FIRST))


@claim("A165.2")
def thirteen_billion_on_24_gb() -> Finding:
    return on_a_card(fits(LLAMA_13B, "4090"), fits(LLAMA_13B, "4090", replace(FIRST, upcast_fp32=False)))


@claim("A166.1", "A190.2")
def thirty_billion_on_40_gb() -> Finding:
    return on_a_card(fits(LLAMA_33B, "a100-40"))


@claim("A189.1")
def eight_billion_on_a_t4() -> Finding:
    half = replace(LEAST, compute_dtype="float16")
    own = replace(FIRST, compute_dtype="float16", adapter_dtype="float32", attention="math")
    return on_a_card(fits(LLAMA_8B, "t4", half), fits(LLAMA_8B, "t4", own))


@claim("A189.2")
def memory_of_a_t4() -> Finding:
    room = find_gpu("t4").usable_bytes
    return number("16", room / GB, "GB", 1, [gib(room)])


@claim("A204.1")
def large_models_on_a_regular_card() -> Finding:
    return on_a_card(fits(LLAMA_8B, "3060-12"), fits(LLAMA_3_70B, "4090"))


@claim("B1.1", "B313.1")
def seventy_billion_on_a_consumer_card() -> Finding:
    size, room = weight_bytes(LLAMA_2_70B), largest_consumer_card().usable_bytes
    return by_setting(size < room, value=f"{gib(size)} GiB", shown=[gib(room)])


@claim("B9.1")
def seventy_billion_on_24_gb() -> Finding:
    return on_a_card(fits(LLAMA_2_70B, "4090"), fits(LLAMA_2_70B, "3090"))


@claim("B178.1", "B218.1")
def batch_of_one_for_70b_on_24_gb() -> Finding:
    return on_a_card(fits(LLAMA_2_70B, "4090", SECOND))


@claim("B224.2")
def five_hundred_tokens_for_70b_on_24_gb() -> Finding:
    return on_a_card(fits(LLAMA_2_70B, "4090", SECOND), fits(LLAMA_2_70B, "4090", replace(SECOND, max_length=128)))


@claim("C33.1")
def sixty_five_billion_on_one_a100() -> Finding:
    return on_a_card(fits(LLAMA_65B, "a100-80"), fits(LLAMA_65B, "a6000"))


@claim("C37.1", "C78.3")
def neox_on_24_gb() -> Finding:
    return on_a_card(fits(NEOX, "4090"))


@claim("C39.1")
def neox_on_12_gb() -> Finding:
    return on_a_card(fits(GPT_J, "3060-12"), fits(NEOX, "3060-12"))


@claim("C39.2", "C65.1", "C90.1")
def c_models_on_a_free_t4() -> Finding:
    half = replace(LEAST, compute_dtype="float16")
    return on_a_card(fits(GPT_J, "t4", half), fits(NEOX, "t4", half))


@claim("C78.1")
def gpt_j_on_12_gb() -> Finding:
    return on_a_card(fits(GPT_J, "3060-12"))


@claim("C78.2")
def below_20_billion_on_12_gb() -> Finding:
    shapes = [find_shape("Qwen/Qwen2.5-14B"), NEOX]
    return on_a_card(*(fits(shape, "3060-12") for shape in shapes))


@claim("C82.1")
def main_memory_to_load() -> Finding:
    needs = [predict(shape, LEAST).host_bytes_to_load for shape in (GPT_J, NEOX)]
    return by_setting(
        *(need < 6 * GB for need in needs), value=f"{gb(max(needs))} GB", claimed="6 GB", shown=[gb(min(needs))]
    )


@claim("C86.1")
def neox_and_gpt_j_are_big_files() -> Finding:
    sizes = [predict(shape, LEAST).disk_bytes for shape in (GPT_J, NEOX)]
    return by_setting(*(size > 10 * GB for size in sizes), value=f"{gb(sizes[0])} GB and {gb(sizes[1])} GB")


@claim("C86.2")
def disk_for_both() -> Finding:
    both = sum(predict(shape, LEAST).disk_bytes for shape in (GPT_J, NEOX))
    return by_setting(both < 80 * GB, value=f"{gb(both)} GB", claimed="80 GB")


# ---- the suggested batch size


def suggest_batch_size(gpu_vram_gb, model_size_b, quantization_bits=4):
    """The first article's function as printed, with its indentation restored."""
    model_memory = model_size_b * quantization_bits / 8 / 1e9
    available = gpu_vram_gb - model_memory - 2
    if available < 2:
        return 1, 8
    elif available < 6:
        return 2, 4
    elif available < 12:
        return 4, 2
    else:
        return 8, 1


@claim("A172.1")
def memory_in_the_suggested_batch_size() -> Finding:
    formula, true = 8 * 4 / 8 / 1e9, 8 * 4 / 8  # model_size_b is already in billions
    return Finding(number(f"{formula:.9f}", true).verdict, f"{true:.0f} GB", f"{formula * 1e9:.0f} bytes")


@claim("A174.1")
def overhead_of_2_gb() -> Finding:
    needs = [(predict(LLAMA_8B, run).device_bytes - weight_bytes(LLAMA_8B)) / GB for run in (LEAST, FIRST)]
    outcomes = [need <= 2 * 1.05 for need in needs]
    return by_setting(*outcomes, value=f"{needs[0]:.1f} GB to {needs[1]:.1f} GB", claimed="2 GB")


@claim("A186.1")
def output_of_the_suggested_batch_size() -> Finding:
    got = suggest_batch_size(gpu_vram_gb=24, model_size_b=8)
    repaired = suggest_batch_size(gpu_vram_gb=24, model_size_b=8e9)
    return by_setting(
        got == (4, 2), value="{}, {}".format(*got), claimed="4, 2", shown=[f"{repaired[0]}", f"{repaired[1]}"]
    )


# ---- trainable parameters


@claim("A86.1")
def trainable_8b() -> Finding:
    return number("41,943,040", LLAMA_8B.lora_parameters(16))


@claim("A86.2")
def all_parameters_8b() -> Finding:
    trained = LLAMA_8B.lora_parameters(16)
    everything = LLAMA_8B.parameters + trained
    stored = everything - LLAMA_8B.linear_parameters // 2  # numel() counts a byte with two weights as one
    return number("4,579,280,896", everything, shown=[f"{stored:,}"])


@claim("A87.1")
def share_8b() -> Finding:
    trained = LLAMA_8B.lora_parameters(16)
    own = 100 * 41_943_040 / 4_579_280_896
    return number("0.9160", 100 * trained / (LLAMA_8B.parameters + trained), "%", 4, [f"{own:.4f}"])


@claim("B170.1")
def trainable_70b() -> Finding:
    found = LLAMA_2_70B.lora_parameters(64)
    return number("272,629,760", found, shown=[f"{found / 272_629_760:.2f}"])


def stored_70b() -> int:
    """What a sum of numel() gives for Llama-2-70B in 4 bits with its adapters: two weights count as one."""
    return LLAMA_2_70B.parameters - LLAMA_2_70B.linear_parameters // 2 + LLAMA_2_70B.lora_parameters(64)


@claim("B170.2")
def all_parameters_70b() -> Finding:
    return number(
        "69,345,296,384", stored_70b(), shown=[f"{LLAMA_2_70B.parameters + LLAMA_2_70B.lora_parameters(64):,}"]
    )


@claim("B170.3")
def share_70b() -> Finding:
    trained = LLAMA_2_70B.lora_parameters(64)
    return number(
        "0.39", 100 * trained / stored_70b(), "%", 2, [f"{100 * trained / (LLAMA_2_70B.parameters + trained):.2f}"]
    )


@claim("B159.1")
def a_plain_count_counts_all() -> Finding:
    true = LLAMA_2_70B.parameters + LLAMA_2_70B.lora_parameters(64)
    return by_setting(stored_70b() == true, value=f"{true:,}", claimed=f"{stored_70b():,}")


@claim("C49.3")
def adapters_are_tiny() -> Finding:
    share = LLAMA_8B.lora_parameters(16) / LLAMA_8B.parameters
    return by_setting(share < 0.01, value=f"{100 * share:.2f} %")


@claim("B53.1", "B63.1", "B63.5", "B235.1")
def trainable_is_proportional_to_the_rank() -> Finding:
    ratio = LLAMA_2_70B.lora_parameters(64) / LLAMA_2_70B.lora_parameters(32)
    before, after = (predict(LLAMA_2_70B, replace(SECOND, rank=rank)).device_bytes for rank in (64, 32))
    return by_setting(ratio == 2, after < before, value=f"{ratio:.0f} times", shown=[gib(before - after), gib(before)])


# ---- optimizer and paging


@claim("A43.2", "B220.4", "C59.2")
def paging_prevents_out_of_memory() -> Finding:
    runs = [row for row in measured("t4_gear")["rows"] if row["what"] == "training"]
    failed = [row for row in runs if row["outcome"] == "out of memory"]  # all with paged 8-bit AdamW
    sizes = [16 * side for linear in LLAMA_8B.linears for side in (linear.in_features, linear.out_features)]
    paged = sum(size for size in sizes if size >= SMALLEST_PAGED) / sum(sizes)
    on_h200 = [row for row in of_memory_runs().values() if row["what"] == "run" and row["outcome"] == "out of memory"]
    elsewhere = [
        row for row in on_h200 if row["optimizer"].startswith("paged") and row["place"] in ("forward", "backward")
    ]
    in_it = [row for row in on_h200 if row["place"] == "optimizer step"]
    return by_setting(
        not failed, not elsewhere, value=f"{len(failed)} of {len(runs)} runs",
        shown=[f"{100 * paged:.1f}", f"{SMALLEST_PAGED:,}", f"{len(elsewhere)}", f"{len(in_it)}"],
    )  # fmt: skip


MANAGED_PIECE = 128 * MIB  # the driver allocates managed memory in pieces of this size


@claim("B15.1", "B220.3")
def states_lie_in_managed_memory() -> Finding:
    outcomes, shown = [], []
    for rank in (16, 64):
        plain = of_memory_runs()[f"paging: rank {rank}, adamw_8bit"]
        for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
            row = of_memory_runs()[f"paging: rank {rank}, {name}"]
            # the card's memory in use outside torch's own
            more = row["outside"]["after step 4"] - plain["outside"]["after step 4"]
            pieces = -(-row["paged_bytes"] // MANAGED_PIECE)
            outcomes.append(row["paged_bytes"] > 0 and abs(more - pieces * MANAGED_PIECE) < 32 * MIB)
            shown = [f"{row['paged_bytes'] / MIB:,.0f}", f"{more / MIB:,.0f}", f"{rank}"]  # the last is the largest
    return by_setting(*outcomes, value=f"{shown[0]} MiB", shown=shown)


@claim("B15.2")
def paging_can_take_a_spike() -> Finding:
    runs = [(LLAMA_8B, replace(FIRST, upcast_fp32=False)), (LLAMA_2_70B, SECOND)]
    predictions = [predict(shape, run) for shape, run in runs]
    shares = [100 * p.parts["optimizer (paged)"] / p.device_bytes for p in predictions]
    lived = of_memory_runs()["optimizer: cure, paged, 32 bits"]  # the same run died with unpaged states
    on_card = lived["peak_reserved_bytes"] + lived["outside"]["after step 4"]
    return by_setting(
        *(share > 5 for share in shares), on_card <= lived["cap_bytes"], value="{:.1f} % and {:.1f} %".format(*shares),
        shown=[gib(lived["cap_bytes"], 1), gib(on_card, 1)],
    )  # fmt: skip


@claim("B180.1")
def paged_32_bit_saves_memory() -> Finding:
    paged, unpaged, small = (
        predict(LLAMA_2_70B, replace(SECOND, optimizer=name, adapter_dtype="float32"))
        for name in ("paged_adamw_32bit", "adamw_torch", "paged_adamw_8bit")
    )
    numbers = LLAMA_2_70B.lora_parameters(64)
    return by_setting(
        paged.peak_reserved_bytes < unpaged.peak_reserved_bytes,  # torch's memory, which does not include paged states
        paged.device_bytes < small.device_bytes,  # everything
        value=f"{gb(8 * numbers)} GB", shown=[gb(2 * numbers)],
    )  # fmt: skip


@claim("B220.2")
def optimizer_states_weigh_much() -> Finding:
    runs = memory_of_methods(LLAMA_8B, [(method, "adamw_torch") for method in ("full", "qlora")], LEAST)
    shares = {run.settings.method: run.states / run.peak for run in runs}
    return by_setting(
        *(share > 0.25 for share in shares.values()), value=f"{100 * shares['qlora']:.0f} % of the peak",
        shown=[f"{100 * shares['full']:.0f}"],
    )  # fmt: skip


# ---- what saves memory


def settings_of(label: str) -> dict:
    (row,) = [row for row in measured("memory")["rows"] if row["label"] == label]
    return row


@claim("A148.1", "A200.1", "B216.3")
def checkpointing_saves_memory() -> Finding:
    run = replace(GPU_RUN, batch_size=2, max_length=1024, adapter_dtype="bfloat16")
    with_it, without = (
        predict(LLAMA_8B, replace(run, gradient_checkpointing=keep)).peak_allocated_bytes for keep in (True, False)
    )
    return by_setting(with_it < without, value=f"{gb(with_it, 1)} GB instead of {gb(without, 1)} GB")


@claim("A140.1")
def effective_batch_of_16() -> Finding:
    return number("16", 4 * 4, shown=["4"])


@claim("B218.2")
def effective_batch_of_4() -> Finding:
    return number("4", 1 * 4, shown=["1"])


@claim("A201.2", "B234.1")
def accumulation_instead_of_batch() -> Finding:
    together, apart = (
        of_memory_runs()[label]
        for label in ("forward: cure, checkpointing", "backward, batch: cure, 1 x 4 accumulated")
    )
    if (together["batch_size"], apart["batch_size"], apart["accumulation"]) != (4, 1, 4):
        raise RuntimeError("the two measured runs are not a batch of 4 and one of 1 with accumulation")
    sizes = [gb(row["peak_allocated_bytes"], 1) for row in (apart, together)]
    return by_setting(
        apart["peak_allocated_bytes"] < together["peak_allocated_bytes"], value="{} GB instead of {} GB".format(*sizes),
        shown=[f"{row['tokens_per_second']:,}" for row in (apart, together)],
    )  # fmt: skip


@claim("B218.3")
def accumulation_is_slower() -> Finding:
    one, four = (
        row["tokens_per_second"]
        for row in measured("t4_gear")["rows"]
        if (row["model"], row["who"], row["gear"]) == ("Llama-3.1-8B", "ours", "ampere")
    )
    return by_setting(one < four, value=f"{one:,} instead of {four:,} tokens/s")


@claim("B222.3")
def bfloat16_needs_less_than_float32() -> Finding:
    half, full = (
        predict(LLAMA_8B, replace(LEAST, compute_dtype=dtype)).peak_allocated_bytes for dtype in ("bfloat16", "float32")
    )
    return by_setting(half < full, value=f"{gb(half, 1)} GB instead of {gb(full, 1)} GB")


@claim("B224.1")
def memory_is_quadratic_in_the_sequence() -> Finding:
    label = "llama-3.2-1b qlora bf16 r16 1x{} ckpt adamw_torch_fused float32-adapters{}"
    loaded = settings_of(label.format(4096, ""))["loaded_bytes"]
    grows = {}
    for kernel in (" math", ""):
        small, large = (settings_of(label.format(n, kernel))["peak_allocated_bytes"] - loaded for n in (2048, 4096))
        grows[kernel] = large / small  # twice the tokens: 2 if linear, 4 if quadratic
    eager, sdpa = (of_memory_runs()[f"eager attention: {role}"] for role in ("price", "cure, sdpa"))
    return by_setting(
        *(growth > 3 for growth in grows.values()), value=f"{grows['']:.1f} times",
        shown=[f"{grows[' math']:.1f}", *(gib(row["peak_allocated_bytes"], 1) for row in (eager, sdpa))],
    )  # fmt: skip


@claim("B224.3", "B233.1")
def a_shorter_sequence_saves_most() -> Finding:
    saved = {}
    for shape, run in ((LLAMA_2_70B, SECOND), (LLAMA_8B, replace(FIRST, rank=64))):
        before = predict(shape, run).device_bytes
        saved[shape.name] = [
            before - predict(shape, replace(run, **change)).device_bytes
            for change in ({"max_length": run.max_length // 2}, {"rank": 32})
        ]
    runs = of_memory_runs()  # 8B, 4 x 2,048 tokens, rank 16
    before = runs["forward: cure, checkpointing"]["peak_allocated_bytes"]
    by_length, by_batch = (
        before - runs[f"backward, batch: cure, {change}"]["peak_allocated_bytes"]
        for change in ("half the tokens", "1 x 4 accumulated")
    )
    return by_setting(
        *(tokens > rank for tokens, rank in saved.values()), by_length > by_batch,
        value=" and ".join(f"{gib(tokens)} GiB" for tokens, _ in saved.values()),
        shown=[*(gib(rank) for _, rank in saved.values()), gib(by_length), gib(by_batch)],
    )  # fmt: skip


@claim("B236.1")
def emptying_the_cache_can_help() -> Finding:
    documented = "may help reduce fragmentation" in " ".join(torch.cuda.empty_cache.__doc__.split())
    names = ("backward, batch: death", "backward, batch: still dead, empty_cache")
    without, with_it = (of_memory_runs()[name] for name in names)
    holes = [of_memory_runs()[f"holes: {how}"]["outcome"] for how in ("as it is", "expandable segments")]
    if [without["outcome"], *holes] != ["out of memory", "out of memory", "ran"]:
        raise RuntimeError(f"the runs were to die, to die and to live: {without['outcome']}, {holes}")
    return by_setting(documented, with_it["outcome"] == "ran", shown=[f"{without['allocator_retries']}"])


# ---- loading and units


@claim("B37.6")
def loading_has_no_spike() -> Finding:
    peak = measured("t4_gear")["rows"][0]["gpu_peak_bytes"]
    loaded = measured("h200_peaks")[0]["loaded_bytes"]
    return by_setting(peak < 1.05 * loaded, value=f"{gb(peak)} GB", shown=[gb(loaded), gb(LLAMA_8B.parameters * 2)])


@claim("A114.2")
def gb_in_the_first_article() -> Finding:
    return number("1", 1e9 / GB, "GB", shown=[gb(GIB)])


@claim("B242.1")
def megabytes_in_the_second_article() -> Finding:
    return number("1.00", 1024**2 / 1e6, "MB", 3)


@claim("B242.2")
def allocated_memory_is_all() -> Finding:
    row = measured("h200_peaks")[0]
    allocated, reserved, used = (row[f"{key}_bytes"] for key in ("peak_allocated", "peak_reserved", "device_used"))
    true = {"tensors"} | ({"reserve"} if reserved > allocated else set()) | ({"context"} if used > reserved else set())
    return parts({"tensors"}, true, f"{gb(used)} GB", [gb(allocated), gb(reserved)])
