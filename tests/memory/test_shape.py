"""Model shapes counted by formula, checked against transformers and PEFT on the "meta" device."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from qlora_helpers.memory import ModelShape, catalogue, predict
from qlora_helpers.memory.shape import FAMILIES
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.settings import Settings

# those of the table's models whose family is predicted
KNOWN = {
    name: config
    for name, config in json.loads(catalogue.TABLE.read_text(encoding="utf-8"))["models"].items()
    if config["model_type"] in FAMILIES
}
# one of each family, small enough to be wrapped in PEFT several times
EXAMPLES = {
    "llama": "HuggingFaceTB/SmolLM2-135M", "mistral": "mistralai/Mistral-7B-v0.1", "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B", "gemma2": "google/gemma-2-2b", "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "gpt_neox": "EleutherAI/pythia-410m", "gptj": "EleutherAI/gpt-j-6b",
}  # fmt: skip
PARTIAL = {
    "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "o_proj"], "gptj": ["q_proj", "v_proj", "fc_in"],
}  # fmt: skip


def with_two_layers(config: dict) -> dict:
    """All layers are alike: two are enough to count, and quicker to build."""
    return config | {"n_layer" if config["model_type"] == "gptj" else "num_hidden_layers": 2}


def counted(config: dict) -> tuple[int, int]:
    model = meta_model(config)
    return model.num_parameters(), sum(layer.weight.numel() for _, layer in linear_layers(model))


@pytest.mark.parametrize("name", KNOWN)
def test_the_counts_of_known_models_are_those_of_transformers(name):
    config = with_two_layers(KNOWN[name])
    shape = ModelShape.from_config(config)
    assert (shape.parameters, shape.linear_parameters) == counted(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_take_transformers_defaults(family):
    shape = ModelShape.from_config({"model_type": family})
    assert (shape.parameters, shape.linear_parameters) == counted({"model_type": family})  # of all layers


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "head_dim": 96, "num_key_value_heads": 4},
        {"model_type": "mistral", "head_dim": 160},
        {"model_type": "qwen3", "attention_bias": True},
        {"model_type": "gpt_neox", "attention_bias": False, "tie_word_embeddings": True},
        {"model_type": "gptj", "n_inner": 3_000},
        {"model_type": "phi3", "num_key_value_heads": 8},
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_biases_head_sizes_and_ties_are_counted(change):
    small = {"num_hidden_layers": 2, "n_layer": 2} if change["model_type"] == "gptj" else {"num_hidden_layers": 2}
    shape = ModelShape.from_config(small | change)
    assert (shape.parameters, shape.linear_parameters) == counted(small | change)


@pytest.mark.parametrize("family", EXAMPLES)
def test_trainable_parameters_are_those_of_peft(family):
    config = with_two_layers(KNOWN[EXAMPLES[family]])
    shape = ModelShape.from_config(config)
    for targets in ("all-linear", PARTIAL.get(family, ["q_proj", "v_proj"])):
        for rank in (8, 64):
            lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
            trainable, _ = get_peft_model(meta_model(config), lora).get_nb_trainable_parameters()
            assert shape.lora_parameters(rank, targets) == trainable


def test_a_config_comes_as_dict_object_file_or_folder(tmp_path):
    config = KNOWN["Qwen/Qwen2.5-0.5B"]
    wanted = ModelShape.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {key: value for key, value in config.items() if key != "model_type"}
    for given in (
        AutoConfig.for_model(config["model_type"], **options),
        tmp_path,
        str(tmp_path / "config.json"),
    ):
        assert ModelShape.from_config(given).parameters == wanted.parameters
    assert ModelShape.from_config(tmp_path) == wanted


def test_a_shape_made_by_hand_has_no_biases_no_window_and_turns_whole_heads():
    plain = ModelShape("llama", 32_000, 4_096, 11_008, 32, 32, 32, 128, False)
    assert plain == replace(ModelShape.from_config({"model_type": "llama"}), max_position_embeddings=None)
    assert not plain.use_parallel_residual and plain.rotary_dim == 0 and plain.sliding_window is None


def test_a_null_is_as_many_heads_as_there_are_or_no_window():
    few = {"model_type": "qwen2", "num_attention_heads": 14, "hidden_size": 896, "num_key_value_heads": None}
    assert ModelShape.from_config(few).num_key_value_heads == 14
    assert ModelShape.from_config({"model_type": "mistral"}).sliding_window == 4_096
    assert ModelShape.from_config({"model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert ModelShape.from_config({"model_type": "phi3", "sliding_window": 2_047}).sliding_window == 2_047
    assert ModelShape.from_config({"model_type": "phi3"}).sliding_window is None
    assert ModelShape.from_config({"model_type": "llama", "sliding_window": 2_047}).sliding_window is None
    windowed = {"model_type": "qwen2", "sliding_window": 1_024}
    assert ModelShape.from_config(windowed).sliding_window is None
    assert ModelShape.from_config(windowed | {"use_sliding_window": True}).sliding_window == 1_024
    assert ModelShape.from_config({"model_type": "gptj", "rotary_dim": None}).rotary_dim == 0
    with pytest.raises(ValueError, match=r"rotary_pct='0\.25': must be a number above 0"):
        ModelShape.from_config({"model_type": "gpt_neox", "rotary_pct": "0.25"})
    with pytest.raises(ValueError, match="sliding_window='4096': must be a whole number"):
        ModelShape.from_config({"model_type": "mistral", "sliding_window": "4096"})


def test_what_is_wrong_with_a_config_is_said(tmp_path):
    with pytest.raises(ValueError, match="model_type='mamba': known families are llama"):
        ModelShape.from_config({"model_type": "mamba"})
    with pytest.raises(ValueError, match="model_type=None"):
        ModelShape.from_config({"hidden_size": 64})
    with pytest.raises(ValueError, match="hidden_size=-1"):
        ModelShape.from_config({"model_type": "llama", "hidden_size": -1})
    with pytest.raises(ValueError, match="n_embd='wide'"):
        ModelShape.from_config({"model_type": "gptj", "n_embd": "wide"})
    with pytest.raises(ValueError, match="must be a multiple of num_key_value_heads=5"):
        ModelShape.from_config({"model_type": "llama", "num_key_value_heads": 5})
    with pytest.raises(ValueError, match="rotary_dim=257: must be no more than a head has, 256"):
        ModelShape.from_config({"model_type": "gptj", "rotary_dim": 257})
    with pytest.raises(ValueError, match="tie_word_embeddings='false': must be True or False"):
        ModelShape.from_config({"model_type": "llama", "tie_word_embeddings": "false"})
    with pytest.raises(ValueError, match="vocab_size=9223372036854775808: must be a whole number"):
        ModelShape.from_config({"model_type": "llama", "vocab_size": 2**63})
    with pytest.raises(ValueError, match="config is a int"):
        ModelShape.from_config(7)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ModelShape.from_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (b"[]", "in model is a list"),
        (b"null", "in model is a NoneType"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b'{"model_type": "llama", "vocab_size": ' + b"[" * 960 + b"]" * 960 + b"}", "vocab_size=|nested too deeply"),
        (b'{"model_type": "llama", "vocab_size": NaN}', "vocab_size=nan: must be a whole number"),
    ],
    ids=lambda content: f"{content[:12]}",
)
def test_a_file_that_is_no_config_is_refused_with_the_cure(content, fault, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(content)
    for path in (tmp_path / "model", str(tmp_path / "model" / "config.json")):
        with pytest.raises(ValueError, match=fault):
            ModelShape.from_config(path)
        with pytest.raises(ValueError, match=fault):
            catalogue.find_shape(path)


def deep(levels: int) -> list:
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


LEFT_OUT = object()
WRONG = [
    LEFT_OUT, None, True, False, 0, 1, 3, -1, 2**63, 2**63 - 1, 10**18, 10**30, 10**5_000, -(10**5_000), 0.0, 0.5, 64.0, -0.25,
    math.nan, math.inf, -math.inf, "", "64", "wide", [], [64], [None], {}, {"type": "linear"}, deep(900), deep(100_000),
]  # fmt: skip
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_parallel_residual", "use_sliding_window")


def mutated(config: dict) -> list[tuple[str, dict]]:
    """A config with each of its keys, and of those that are not in it, replaced or left out; and the key's name."""
    keys = [*config, *SWITCHES, "head_dim", "sliding_window", "rotary_dim", "rotary_pct", "max_position_embeddings"]
    changes = [{key: value} for key in dict.fromkeys([*keys, "_name_or_path"]) for value in WRONG]
    for key in ("rope_parameters", "rope_scaling"):
        changes += [{key: value} for value in WRONG]
        changes += [{key: {"partial_rotary_factor": value, "rope_type": "default"}} for value in WRONG]
    found = []
    for change in changes:
        ((key, value),) = change.items()
        inner = value.get("partial_rotary_factor") if isinstance(value, dict) else None
        if value is LEFT_OUT or inner is LEFT_OUT:
            change = {}
        found.append((key, {name: kept for name, kept in config.items() if name != key} | change))
    return found


@pytest.mark.parametrize("family", EXAMPLES)
def test_a_config_that_makes_no_sense_gives_a_shape_or_an_error_that_names_the_key(family):
    run = Settings(batch_size=1, max_length=1, rank=1)
    shapes = refused = 0
    for key, config in mutated(KNOWN[EXAMPLES[family]]):
        try:
            shape = ModelShape.from_config(config)
        except ValueError as error:
            assert key in str(error) or "nested too deeply" in str(error), (key, str(error))
            refused += 1
        else:
            assert all(size >= 0 for size in (shape.parameters, shape.buffer_bytes, shape.largest_tensor))
            assert isinstance(shape.tie_word_embeddings, bool) and isinstance(shape.name, str)
            assert predict(shape, run, "t4").device_bytes > 0
            shapes += 1
    assert shapes > 100 and refused > 100


def test_two_wrong_values_at_once_are_no_worse():
    refused = 0
    for family in FAMILIES:
        keys = (
            ["n_embd", "n_head", "n_inner"] if family == "gptj" else ["hidden_size", "num_attention_heads", "head_dim"]
        )
        for (one, other), a, b in itertools.product(itertools.combinations(keys, 2), WRONG[1:-2], WRONG[1:-2]):
            try:
                assert ModelShape.from_config({"model_type": family, one: a, other: b}).parameters > 0
            except ValueError as error:
                assert one in str(error) or other in str(error) or "rotary_dim=64: must be no more" in str(error)
                refused += 1
    assert refused > 5_000


def test_rotated_elements_of_gpt_neox_are_read_as_transformers_reads_them():
    def rotated(**fields):
        options = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 100}
        return ModelShape.from_config({"model_type": "gpt_neox"} | options | fields).rotary_dim, 2 * len(
            meta_model({"model_type": "gpt_neox"} | options | fields).gpt_neox.rotary_emb.inv_freq
        )

    for fields, wanted in (
        ({}, 16),
        ({"rotary_pct": 0.5}, 32),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, 64),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}, 48),
    ):
        assert rotated(**fields) == (wanted, wanted), fields


@pytest.mark.parametrize("fields", [{}, {"n_positions": 512}, {"n_positions": 100, "rotary_dim": 16}], ids=str)
def test_the_tables_of_gpt_j_s_positions_are_those_of_transformers(fields):
    config = {"model_type": "gptj", "n_embd": 256, "n_head": 4, "n_layer": 3, "vocab_size": 100} | fields
    tables = [buffer.nbytes for name, buffer in meta_model(config).named_buffers() if "embed_positions" in name]
    assert len(tables) == 3
    assert ModelShape.from_config(config).buffer_bytes == sum(tables)


def test_no_other_family_has_tables_in_every_layer():
    assert {ModelShape.from_config({"model_type": family}).buffer_bytes for family in FAMILIES if family != "gptj"} == {
        0
    }


def test_targets_that_match_nothing_are_refused():
    shape = ModelShape.from_config({"model_type": "phi3"})
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\]: none of them is in phi3, which has qkv_proj"):
        shape.targets(["q_proj"])
    with pytest.raises(ValueError, match="target_modules='q_proj'"):
        shape.targets("q_proj")
    with pytest.raises(ValueError, match=r"target_modules=\['o_proj', 'proj'\]: phi3 has no 'proj', but qkv_proj"):
        shape.targets(["o_proj", "proj"])  # PEFT passes over the second one
    assert [linear.name for linear in shape.targets(["self_attn.o_proj"])] == ["self_attn.o_proj"]


@pytest.mark.parametrize("name", ["n_embd", "hidden_size"])
def test_an_error_names_the_field_as_the_config_does(name):
    """GPT-J has names of its own, and transformers takes the usual ones, too."""
    config = {"model_type": "gptj", "vocab_size": 400, "n_layer": 2, "n_head": 4, "rotary_dim": 8, name: -512}
    with pytest.raises(ValueError, match=f"{name}=-512: must be a whole number"):
        ModelShape.from_config(config)
