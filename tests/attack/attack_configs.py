"""Configs, settings and cards of any kind: a shape or a ValueError by name, and searches that agree with trying everything."""

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.memory import ModelShape, catalogue, cures, largest_batch, longest_sequence, predict
from qlora_helpers.memory.shape import FAMILIES
from qlora_helpers.settings import ATTENTION, BLOCK_SIZES, DTYPES, GPU_RUN, METHODS, Settings
from tests.memory.made_up import card

KNOWN = list(catalogue.predicted_models().values())
KEYS = sorted({key for config in KNOWN for key in config} | {
    "attention_bias", "head_dim", "max_position_embeddings", "mlp_bias", "num_key_value_heads", "rope_parameters",
    "rope_scaling", "rotary_dim", "rotary_pct", "sliding_window", "tie_word_embeddings", "use_parallel_residual",
    "use_sliding_window", "_name_or_path", "n_positions", "n_inner",
})  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(1, 300) | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from([2**63 - 1, 2**63, 10**30, 10**4_000, -(10**4_000)])
ROPE = st.dictionaries(st.sampled_from(["partial_rotary_factor", "rope_type", "rope_theta"]), SCALARS)
VALUES = (
    SCALARS
    | ROPE
    | st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)


def attack_fields_of_configs(tries):
    """Configs of known models with up to three fields replaced, and some left out."""

    @settings(max_examples=10_000)
    @given(st.sampled_from(KNOWN), CHANGES, st.sets(st.sampled_from(KEYS), max_size=2))
    def attack(config, changes, left_out):
        config = {key: value for key, value in (config | changes).items() if key not in left_out - {"model_type"}}
        try:
            shape = ModelShape.from_config(config)
        except ValueError as error:
            tries["refused"] += 1
            named = [key for key in (*changes, *left_out, *KEYS) if key in str(error)]
            assert named or "config" in str(error), str(error)
        else:
            tries["a shape"] += 1
            assert predict(shape, Settings(batch_size=1, max_length=1, rank=1), "t4").device_bytes > 0

    attack()


def attack_config_files(tries, tmp_path):
    """Bytes and texts of any kind as a config.json."""
    path = tmp_path / "config.json"
    texts = st.binary(max_size=60) | VALUES.map(
        lambda value: json.dumps(value, default=str).encode() if small(value) else b"{"
    )
    texts |= st.tuples(st.sampled_from(KNOWN), CHANGES).map(
        lambda both: json.dumps(both[0] | {key: value for key, value in both[1].items() if small(value)}).encode()
    )
    texts |= st.integers(1, 3_000).map(lambda levels: b'{"model_type":' + b"[" * levels + b"]" * levels + b"}")

    @settings(max_examples=3_000)
    @given(texts)
    def attack(content):
        path.write_bytes(content)
        try:
            catalogue.find_shape(path)
        except ValueError as error:
            tries["refused"] += 1
            assert "config" in str(error) or any(key in str(error) for key in KEYS), str(error)
        else:
            tries["a shape"] += 1

    attack()


def small(value) -> bool:
    """Whether JSON can write it: Python refuses numbers of more than 4,300 digits."""
    if isinstance(value, dict | list):
        return all(small(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or value.bit_length() < 10_000


SHAPES = st.builds(
    lambda family, heads, shared, layers, window, longest, hidden: ModelShape.from_config(
        {
            "model_type": family, "hidden_size": 64 * hidden, "num_attention_heads": heads * shared,
            "num_key_value_heads": heads, "num_hidden_layers": layers, "sliding_window": window,
            "use_sliding_window": True, "max_position_embeddings": longest, "vocab_size": 1_000, "head_dim": 64,
            "intermediate_size": 128 * hidden, "n_embd": 64 * hidden * heads * shared, "rotary_dim": 64,
        } | ({"hidden_size": 64 * hidden * heads * shared} if family == "gpt_neox" else {})
    ),
    st.sampled_from(FAMILIES), st.integers(1, 8), st.sampled_from([1, 2, 8]), st.integers(1, 4),
    st.integers(1, 5_000), st.integers(128, 6_000), st.integers(1, 32),
)  # fmt: skip
RUNS = st.builds(
    lambda **fields: replace(GPU_RUN, **fields),
    method=st.sampled_from(METHODS), batch_size=st.integers(1, 64), accumulation=st.sampled_from([1, 2, 7]),
    rank=st.integers(1, 64), gradient_checkpointing=st.booleans(), compute_dtype=st.sampled_from(list(DTYPES)),
    adapter_dtype=st.sampled_from(list(DTYPES)), attention=st.sampled_from(ATTENTION), upcast_fp32=st.booleans(),
    double_quant=st.booleans(), block_size=st.sampled_from(BLOCK_SIZES), max_length=st.integers(1, 128),
    optimizer=st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]),
)  # fmt: skip
SHARES = st.floats(0.05, 1.5)


def attack_searches(tries):
    """The longest sequence and the largest batch, against trying all of them."""

    @settings(max_examples=300)
    @given(SHAPES, RUNS, SHARES, st.sampled_from(["t4", "l4"]))
    def attack(shape, run, share, like):
        lengths = range(128, shape.max_position_embeddings + 1, 128)
        needs = {length: predict(shape, replace(run, max_length=length), like).device_bytes for length in lengths}
        gpu = card(int(share * max(needs.values())), like)
        fitting = [length for length, size in needs.items() if size <= gpu.usable_bytes]
        assert longest_sequence(shape, run, gpu) == max(fitting, default=0)
        batch = largest_batch(shape, run, gpu)
        for size, fits in ((batch, True), (batch + 1, False), (batch + 7, False), (2 * batch + 1, False)):
            assert size == 0 or predict(shape, replace(run, batch_size=size), gpu).fits == fits
        tries["nothing fits" if not fitting else "all fit" if len(fitting) == len(needs) else "some fit"] += 1

    attack()


def attack_cures(tries):
    """What makes a run fit does, whatever the model, the run and the card, and with batches of any size."""

    @settings(max_examples=500)
    @given(
        SHAPES, RUNS, SHARES, st.integers(1, 2**63 - 1) | st.sampled_from([10**18 + 3, 2**62, 5_342_931_457_063_200])
    )
    def attack(shape, run, share, batch):
        for size in (run.batch_size, batch):
            run = replace(run, batch_size=size)
            gpu = card(int(share * predict(shape, replace(run, batch_size=1), "l4").device_bytes))
            found = cures(shape, run, gpu)
            for change in found:
                assert change.settings is None or predict(shape, change.settings, gpu).fits
            tries["fits" if not found else "cured" if found[0].settings else "nothing helps"] += 1

    attack()
