"""Names of models as people type them."""

import pytest

from qlora_helpers.memory import catalogue, find_shape, names, resolve
from qlora_helpers.memory.names import Name, hints

EXACT = {  # nothing is assumed
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "llama 3.1 8b": "meta-llama/Llama-3.1-8B",
    "llama3.1:8b": "meta-llama/Llama-3.1-8B",
    "LLAMA_3.1_8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.3-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "Meta-Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Meta-Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama 3 8b": "meta-llama/Meta-Llama-3-8B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3:14b": "Qwen/Qwen3-14B",
    "qwen 3 0.6b": "Qwen/Qwen3-0.6B",
    "QWEN3-32B": "Qwen/Qwen3-32B",
    " Qwen/Qwen3-8B ": "Qwen/Qwen3-8B",
    "https://huggingface.co/Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
    "https://huggingface.co/Qwen/Qwen3-8B/tree/main": "Qwen/Qwen3-8B",
    "https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json": "Qwen/Qwen3-8B",
    "https://huggingface.co/Qwen/Qwen3-8B/resolve/main/config.json?download=true": "Qwen/Qwen3-8B",
    "https://huggingface.co/api/models/Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
    "HF.co/qwen/qwen3-8b/": "Qwen/Qwen3-8B",
    "models--Qwen--Qwen3-8B": "Qwen/Qwen3-8B",
    "qwen2.5 coder 7b": "Qwen/Qwen2.5-Coder-7B",
    "Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "QwQ-32B": "Qwen/QwQ-32B",
    "gemma-3-4b-it": "google/gemma-3-4b-it",
    "gemma3 27b it": "google/gemma-3-27b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "phi-4": "microsoft/phi-4",
    "phi4": "microsoft/phi-4",
    "Phi-4-reasoning": "microsoft/Phi-4-reasoning",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt oss 120b": "openai/gpt-oss-120b",
    "mistral 7b v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "SmolLM2-1.7B-Instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3 3b": "HuggingFaceTB/SmolLM3-3B",
    "starcoder2:7b": "bigcode/starcoder2-7b",
    "exaone 4.0 32b": "LGAI-EXAONE/EXAONE-4.0-32B",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "EleutherAI/gpt-j-6B": "EleutherAI/gpt-j-6b",
}
QUANTISED = {
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": "meta-llama/Llama-3.1-8B-Instruct",
    "unsloth/Llama-3.3-70B-Instruct-bnb-4bit": "meta-llama/Llama-3.3-70B-Instruct",
    "unsloth/gemma-3-4b-it-unsloth-bnb-4bit": "google/gemma-3-4b-it",
    "unsloth/gpt-oss-20b-unsloth-bnb-4bit": "openai/gpt-oss-20b",
    "unsloth/phi-4-bnb-4bit": "microsoft/phi-4",
    "unsloth/mistral-7b-instruct-v0.3-bnb-4bit": "mistralai/Mistral-7B-Instruct-v0.3",
    "unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "Qwen/Qwen3-8B-FP8": "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-72B-Instruct-AWQ": "Qwen/Qwen2.5-72B",
    "Qwen2.5-Coder-32B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-Coder-32B",
    "TheBloke/Llama-2-13B-chat-GPTQ": "meta-llama/Llama-2-13b-chat-hf",
    "bartowski/Llama-3.2-3B-Instruct-GGUF": "meta-llama/Llama-3.2-3B-Instruct",
    "Llama-3.2-1B-Instruct-Q4_K_M.gguf": "meta-llama/Llama-3.2-1B-Instruct",
    "google/gemma-3-12b-it-qat-q4_0-gguf": "google/gemma-3-12b-it",
    "mlx-community/Qwen3-4B-Instruct-2507-4bit": "Qwen/Qwen3-4B-Instruct-2507",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": "meta-llama/Llama-3.1-8B-Instruct",
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic": "meta-llama/Llama-3.1-8B-Instruct",
    "https://huggingface.co/unsloth/Qwen3-8B-GGUF": "Qwen/Qwen3-8B",
    "unsloth/mistral-7b-bnb-4bit": "mistralai/Mistral-7B-v0.3",
}
ANOTHER = {  # another kind of training, or a date that is not in the table
    "gemma 3 4b": "google/gemma-3-4b-it",
    "google/gemma-3-4b-pt": "google/gemma-3-4b-it",
    "gemma4:e4b": "google/gemma-4-E4B-it",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi 3 mini 128k": "microsoft/Phi-3-mini-128k-instruct",
    "microsoft/Phi-4-mini-reasoning": "microsoft/Phi-4-mini-instruct",
    "qwen2.5 coder 7b instruct": "Qwen/Qwen2.5-Coder-7B",
    "qwen2.5-math-7b-instruct": "Qwen/Qwen2.5-Math-7B",
    "Qwen2-7B": "Qwen/Qwen2-7B-Instruct",
    "Qwen/Qwen3-8B-Base": "Qwen/Qwen3-8B",
    "Qwen3-Next-80B-A3B-Thinking": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "Falcon3-7B-Instruct": "tiiuae/Falcon3-7B-Base",
    "olmo 2 7b": "allenai/OLMo-2-1124-7B",
    "mistral-nemo": "mistralai/Mistral-Nemo-Base-2407",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "HuggingFaceTB/SmolLM3-3B-Base": "HuggingFaceTB/SmolLM3-3B",
}
SEVERAL = {
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
}


def test_there_are_many_of_each_kind():
    assert len(EXACT) + len(QUANTISED) + len(ANOTHER) + len(SEVERAL) >= 60


@pytest.mark.parametrize("asked", EXACT)
def test_a_name_is_found_however_it_is_written(asked):
    assert resolve(asked) == names.Found(EXACT[asked])


@pytest.mark.parametrize("asked", QUANTISED)
def test_a_quantised_copy_stands_for_the_model_it_was_made_from_and_that_is_said(asked):
    found = resolve(asked)
    assert found.name == QUANTISED[asked]
    (said,) = found.assumed
    assert "is the name of a quantised copy" in said and found.name in said


@pytest.mark.parametrize("asked", ANOTHER)
def test_another_training_has_the_same_layers_and_that_is_said(asked):
    found = resolve(asked)
    assert found.name == ANOTHER[asked]
    assert found.assumed == (
        f"{asked} is not in the table: the layers of {found.name} are taken for it; the longest sequence may differ",
    )


@pytest.mark.parametrize("asked", SEVERAL)
def test_of_several_versions_the_newest_is_taken_and_that_is_said(asked):
    assert resolve(asked) == names.Found(
        SEVERAL[asked], (f"{asked} is the name of several models: {SEVERAL[asked]} is taken",)
    )


def test_a_copy_of_another_owner_is_said_to_be_one():
    assert resolve("unsloth/Llama-3.2-3B-Instruct").assumed == (
        "unsloth/Llama-3.2-3B-Instruct is not in the table: it is taken for a copy of meta-llama/Llama-3.2-3B-Instruct",
    )


def test_a_model_known_by_what_it_was_trained_from_says_so():
    found = resolve("deepseek-r1-distill-qwen-7b")
    assert found.name == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    (said,) = found.assumed
    assert said.startswith(f"{found.name} was trained from Qwen/Qwen2.5-Math-7B, whose layers are taken for it")
    assert find_shape("deepseek-r1-distill-qwen-7b") == find_shape("Qwen2.5-Math-7B")


def test_a_shape_keeps_what_was_assumed():
    shape = find_shape("unsloth/Qwen3-8B-bnb-4bit")
    assert shape == find_shape("Qwen3-8B") and shape.name == "Qwen/Qwen3-8B"
    assert shape.assumed == resolve("unsloth/Qwen3-8B-bnb-4bit").assumed != ()
    assert find_shape("Qwen3-8B").assumed == ()


@pytest.mark.parametrize(
    ("asked", "stays_out"),
    [
        ("Qwen3-Coder-30B-A3B-Instruct", "Qwen3-30B-A3B"),  # another size
        ("mistral-small-24b", "Mistral-Small-Instruct-2409"),
        ("Mistral-Large-Instruct-2512", "Mistral-Large-Instruct-2411"),  # no size: a date may be that of a larger model
        ("DeepSeek-V2", "DeepSeek-V3"),
        ("Llama-3.2-8B", "Llama-3.1-8B"),
        ("gpt-oss", "gpt-oss-20b"),
        ("qwen3", "Qwen3-8B"),
        ("Phi-4-mini-flash-reasoning", "Phi-4-mini-instruct"),
    ],
)
def test_a_model_of_another_size_or_generation_is_not_taken_for_it(asked, stays_out):
    assert stays_out.lower() in " ".join(catalogue.known_models()).lower()
    with pytest.raises(ValueError, match="which is not known"):
        resolve(asked)


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("gpt-oss-7b", "openai/gpt-oss-20b"),
        ("phi-5", "microsoft/phi-4"),
        ("Qwen/Qwen2.5-8B", "Qwen/Qwen2.5-3B"),
        ("llama3", "meta-llama/Meta-Llama-3-8B"),
        ("lama-3.1-9b", "meta-llama/Llama-3.1-8B"),  # misspelt
        ("pythia-12b", "EleutherAI/pythia-1b"),
        ("command-r", "CohereLabs/c4ai-command-r-v01"),
    ],
)
def test_a_hint_is_of_the_same_family(asked, first):
    with pytest.raises(ValueError, match=f"closest known names are {first}"):
        resolve(asked)


def test_hints_never_leave_the_family():
    known = tuple(catalogue.known_models())
    families = {Name.of(name).family for name in known}
    assert {"phi", "pythia", "gpt-oss", "gpt-neox", "gpt-j"} <= families
    for name in known:
        for asked in (f"{Name.of(name).family}-99-999b", name.rpartition("/")[2] + "-x", name[:-1]):
            for hint in hints(asked, known):
                assert Name.of(hint).family == Name.of(asked).family, (asked, hint)
    for asked in ("gpt-neo-2.7b", "olmoe-1b-7b", "codellama-7b", "bloom-7b1", "zzzzzz", "", "-", "///"):
        assert hints(asked, known) == []


def test_an_unknown_model_is_answered_with_how_to_get_its_config():
    with pytest.raises(ValueError) as caught:
        resolve("nobody/new-model-9b")
    said = str(caught.value)
    assert "hf download nobody/new-model-9b config.json --local-dir new-model-9b" in said
    assert "https://huggingface.co/nobody/new-model-9b/raw/main/config.json" in said
    with pytest.raises(ValueError, match=r"hf download OWNER/NAME config\.json --local-dir NAME"):
        resolve("new model 9b")


def test_a_fine_tuned_model_is_answered_with_what_its_name_says_it_was_trained_from():
    with pytest.raises(ValueError, match=r"If it was trained from meta-llama/Llama-3\.1-8B, ask for that"):
        resolve("NousResearch/Hermes-3-Llama-3.1-8B")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/datasets/me/mine", "https://huggingface.co/spaces/me/mine", "hf.co/Qwen"]
)
def test_an_address_of_something_else_is_refused(address):
    with pytest.raises(ValueError, match="is not the address of a model"):
        resolve(address)


@pytest.mark.parametrize(
    "asked", ["", " ", "/", "-", "4bit", "instruct", "bnb-4bit", "v0.3", "2507", "a" * 10_000, "é", "\0"]
)
def test_a_name_that_is_none_is_refused(asked):
    with pytest.raises(ValueError, match="which is not known"):
        resolve(asked)
