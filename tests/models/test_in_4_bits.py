"""What is in 4 bits: a plan from a config against a real load, measured sizes of real models, and what is refused."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora_helpers.hardware import detect
from qlora_helpers.memory.catalogue import known_config
from qlora_helpers.models import loading
from qlora_helpers.models.in_4_bits import KINDS, in_4_bits, planned_4_bits, refuse_unless_mostly
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.meta import meta_model
from qlora_helpers.units import GIB
from tests.models.tiny_families import CONFIGS, built, saved

CPU = detect("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Sizes of the published models, and what each took on an H100 after load_in_4bit=True, in GiB.
PUBLISHED = {
    # zyzshishui/slime, scripts/models/qwen3-30B-A3B.sh, e0be9a075ca3b1230fae78ce39e468e28b63c36e
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2_048, "intermediate_size": 6_144,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
        },
        55.6,
    ),
    # vllm-project/vime, scripts/models/gpt-oss-20B.sh, 96e0e22e7dc74328bf1e7d9908c219c9abd1e731
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2_880, "intermediate_size": 2_880,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088,
            "num_local_experts": 32, "num_experts_per_tok": 4, "tie_word_embeddings": False,
        },
        38.1,
    ),
    # piwi3910/Turbine, crates/turbine-model/tests/fixtures/olmoe-1b-7b-0125-instruct/config.json,
    # 72504adcaf8ad181ff36b96bf811c10508ae7658
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": 2_048, "intermediate_size": 1_024,
            "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50_304, "num_experts": 64,
            "num_experts_per_tok": 8, "tie_word_embeddings": False,
        },
        12.5,
    ),
}  # fmt: skip


def loaded(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options),
    )


def part(found, kind):
    return next(part for part in found.parts if part.kind == kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_plan_has_the_bytes_of_a_real_load_part_by_part(family, dtype, tmp_path):
    real = loaded(saved(family, tmp_path), DTYPES[dtype], bnb_4bit_use_double_quant=True)
    assert planned_4_bits(CONFIGS[family], compute_dtype=dtype).parts == in_4_bits(real).parts


def test_without_double_quantisation_the_scales_take_more_as_in_a_real_load(tmp_path):
    plan = planned_4_bits(CONFIGS["llama"], double_quant=False)
    assert plan.parts == in_4_bits(loaded(saved("llama", tmp_path), torch.bfloat16)).parts
    of_8b = known_config("Llama-3.1-8B")  # of one so small, the second level's codebook takes more than it saves
    small, large = (part(planned_4_bits(of_8b, double_quant=on), "mlp") for on in (True, False))
    assert [round(8 * found.bytes_in_4_bits / found.parameters, 3) for found in (small, large)] == [4.127, 4.5]


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixtures_take_what_was_measured_on_a_gpu(name):
    config, measured = PUBLISHED[name]
    found = planned_4_bits(config, name=name)
    assert found.total_bytes / GIB == pytest.approx(measured, rel=0.01)
    assert found.share < 0.03 and not found.is_mostly_4_bit
    assert found.largest_in_full[:2] == ("experts", "one parameter of 3 dimensions, no nn.Linear")
    assert found.bytes_if_in_4_bits < found.total_bytes / 2


def test_a_dense_model_is_in_4_bits_but_for_embeddings_head_and_vectors():
    found = planned_4_bits(known_config("Llama-3.1-8B"), name="Llama-3.1-8B")
    assert found.share == 1 and found.is_mostly_4_bit and found.parameters == 8_030_261_248
    assert found.total_bytes == found.bytes_if_in_4_bits
    assert {part.kind for part in found.parts if part.other_bytes} == {
        "embeddings",
        "output head",
        "norms and biases",
        "buffers",
    }
    refuse_unless_mostly(found, "nf4")


@pytest.mark.parametrize(
    ("family", "kind", "why"),
    [
        ("qwen3_moe", "experts", "one parameter of 3 dimensions, no nn.Linear"),
        ("qwen3_moe", "router", "Qwen3MoeTopKRouter is no nn.Linear"),
        ("falcon", "mlp", "FalconLinear, a subclass of nn.Linear"),
        ("llama", "embeddings", "a table, no nn.Linear"),
        ("llama", "output head", "left as it is by transformers"),
        ("tied", "embeddings", "a table, no nn.Linear, and the output head, too"),
        ("gemma3", "vision tower", "Conv2d is no nn.Linear"),
    ],
)
def test_each_part_says_why_it_is_not_in_4_bits(family, kind, why):
    assert why in part(planned_4_bits(CONFIGS[family]), kind).reasons


def test_the_linear_layers_of_a_vision_tower_are_quantised_too():
    found = planned_4_bits(CONFIGS["gemma3"])
    assert part(found, "vision tower").bytes_in_4_bits > 0
    assert found.share == 1  # which speaks of the decoder


def test_a_shared_expert_is_an_mlp_and_in_4_bits_and_its_gate_a_router():
    found = planned_4_bits(CONFIGS["qwen2_moe"])
    assert part(found, "mlp").bytes_in_4_bits and not part(found, "mlp").other_bytes
    assert part(found, "router").bytes_in_4_bits and part(found, "router").other_bytes


def test_a_skip_list_of_a_saved_model_is_followed_and_named(tmp_path):
    skip = ["lm_head", "model.layers.0"]
    loaded(saved("llama", tmp_path / "plain"), llm_int8_skip_modules=skip).save_pretrained(tmp_path / "quantised")
    config = AutoConfig.from_pretrained(tmp_path / "quantised")
    real = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.float32, device_map={"": "cpu"})
    for given in (config, config.to_dict()):
        found = planned_4_bits(given, compute_dtype="float32")
        assert found.parts == in_4_bits(real).parts
    assert part(found, "mlp").reasons == {"named in llm_int8_skip_modules": 3 * 64 * 128 * 4}
    assert part(found, "mlp").bytes_in_4_bits


def test_another_quantisation_in_the_config_is_passed_over():
    quantised = CONFIGS["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}
    assert planned_4_bits(quantised).parts == planned_4_bits(CONFIGS["gpt_oss"]).parts


@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_adapters_are_a_part_of_their_own_and_change_no_other(on, tmp_path):
    model = meta_model(CONFIGS["llama"]) if on == "meta" else loaded(saved("llama", tmp_path))
    before = {part.kind: part for part in in_4_bits(model).parts}
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    after = {part.kind: part for part in in_4_bits(get_peft_model(model, lora)).parts}
    assert after.pop("adapters").parameters == 2 * 4 * (64 + 64 + 128 + 64) + 128 * 64
    assert after == before


def test_an_unquantised_model_has_nothing_in_4_bits():
    found = in_4_bits(built("llama"))
    assert found.bytes_in_4_bits == 0 and found.share == 0
    assert part(found, "mlp").reasons == {"not loaded in 4 bits": 2 * 3 * 64 * 128 * 4}
    assert found.bytes_if_in_4_bits == planned_4_bits(CONFIGS["llama"], compute_dtype="float32").total_bytes


def test_the_table_can_be_read():
    config, _ = PUBLISHED["Qwen3-30B-A3B"]
    text = str(planned_4_bits(config, name="Qwen/Qwen3-30B-A3B"))
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("Qwen/Qwen3-30B-A3B: 0.8 % of the bytes of its decoder's matrices are in 4 bits\n")
    assert "experts             28,991,029,248           -   54.00 GiB  bfloat16: one parameter of 3" in text
    assert text.endswith(
        f"{'all that it takes':46}   55.62 GiB\n{'with every matrix of its decoder in 4 bits':46}   15.53 GiB"
    )
    assert {line for line in KINDS if f"\n{line} " in text} == {
        "attention", "experts", "router", "embeddings", "output head", "norms and biases", "buffers",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"quantization": "int4"}, "quantization='int4': choose one of nf4, fp4"),
        ({"double_quant": 1}, "double_quant=1: must be True or False"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8': choose one of"),
    ],
)
def test_bad_arguments_are_named(option, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        planned_4_bits(CONFIGS["llama"], **option)


# ---- load_model


def test_a_mixture_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    name = saved("qwen3_moe", tmp_path / "moe")
    (tmp_path / "moe" / "model.safetensors").unlink()
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(
        ValueError, match=r"^quantization='nf4': of .*moe, only 2\.\d % of the bytes .* come in 4 bits"
    ) as said:
        load_model(name, hardware=CPU)
    for words in ("experts, 768.0 KiB (one parameter of 3", "a dense model (one without experts)", "quantization=None"):
        assert words in str(said.value)


def test_a_mixture_of_the_hub_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    asked, name = [], saved("qwen3_moe", tmp_path / "moe")

    def fetch(name, weights=True):
        asked.append(weights)
        return tmp_path / "moe"

    monkeypatch.setattr(loading, "fetch", fetch)
    with pytest.raises(ValueError, match=r"^quantization='nf4': of some/mixture, only 2\.\d %"):
        load_model("some/mixture", hardware=CPU)
    assert asked == [False]
    assert (
        load_model("some/mixture", quantization=None, hardware=CPU).num_parameters()
        == built("qwen3_moe").num_parameters()
    )
    assert asked == [False, False, True] and name


def test_a_mixture_that_the_plan_let_pass_is_refused_after_loading(tmp_path, monkeypatch):
    dense = planned_4_bits(CONFIGS["llama"])
    monkeypatch.setattr(loading, "planned_4_bits", lambda *_: dense)
    with pytest.raises(ValueError, match=r"^quantization='nf4': of .*moe, only 2\.\d % of the bytes"):
        load_model(saved("qwen3_moe", tmp_path / "moe"), hardware=CPU)


def test_half_of_the_bytes_is_the_bound(tmp_path):
    found = planned_4_bits(CONFIGS["llama"])
    mlp = part(found, "mlp")
    for more, mostly in ((0, True), (1, False)):
        size = part(found, "attention").bytes_in_4_bits + mlp.bytes_in_4_bits + more
        experts = dataclasses.replace(
            mlp, kind="experts", bytes_in_4_bits=0, other_bytes={"float16": size}, reasons={"r": size}
        )
        assert dataclasses.replace(found, parts=(*found.parts, experts)).is_mostly_4_bit is mostly


def test_planning_leaves_random_numbers_and_the_default_dtype_alone():
    dtype, random_state = torch.get_default_dtype(), torch.get_rng_state()
    planned_4_bits(CONFIGS["llama"])
    assert torch.get_default_dtype() == dtype and torch.equal(torch.get_rng_state(), random_state)
