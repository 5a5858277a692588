"""The predictor's layers (`qlora_helpers/memory/layers.py`), checked against the libraries' own step on fake tensors: nothing is fitted, so they must agree."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from qlora_helpers.memory import ModelShape, find_gpu, predict
from qlora_helpers.memory.fake.model import prepare
from qlora_helpers.memory.fake.trace import trace_step
from qlora_helpers.memory.fake.whole import whole_pass
from qlora_helpers.memory.layers import DecoderLayer, LayerSettings
from qlora_helpers.memory.step import mask_bytes
from qlora_helpers.memory.tape import Tape
from qlora_helpers.settings import GPU_RUN, Settings
from tests.memory.fake_step import transient_peak

# realistic widths, and few layers
LLAMA = {
    "model_type": "llama", "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "vocab_size": 32_000},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 128},
    "phi3": LLAMA | {"model_type": "phi3", "num_key_value_heads": 8, "pad_token_id": 0},
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 128, "tie_word_embeddings": True},
    "gpt_neox": LLAMA | {"model_type": "gpt_neox"},
    "gptj": {
        "model_type": "gptj", "vocab_size": 40_000, "n_embd": 512, "n_layer": 3, "n_head": 8, "n_inner": 1_536,
        "rotary_dim": 32, "tie_word_embeddings": False, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0,
    },
}  # fmt: skip
RUN = replace(GPU_RUN, batch_size=2, max_length=512, compute_dtype="bfloat16", optimizer="adamw_torch_fused")
RUNS = {
    "qlora": RUN,
    "qlora, plain TRL": replace(RUN, adapter_dtype="bfloat16", dropout=0.0),
    "qlora, no checkpointing": replace(RUN, gradient_checkpointing=False),
    "qlora, some layers": replace(RUN, target_modules=("q_proj", "v_proj")),
    "qlora, upcast": replace(RUN, upcast_fp32=True, double_quant=False),
    "lora": replace(RUN, method="lora", adapter_dtype="bfloat16"),
    "lora, no checkpointing": replace(RUN, method="lora", gradient_checkpointing=False, compute_dtype="float16"),
    "full": replace(RUN, method="full"),
    "full, no checkpointing": replace(RUN, method="full", gradient_checkpointing=False),
}


def predicted(config: dict, run: Settings) -> int:
    """The predictor's figure for the same: without weights, adapters, optimizer states and workspace."""
    gpu = replace(find_gpu("h200"), workspace_bytes=0)
    found = predict(ModelShape.from_config(config), run, gpu)
    standing = ("4-bit weights", "quantisation constants", "16-bit weights", "adapters", "optimizer (GPU)")
    return found.peak_allocated_bytes - sum(found.parts[part] for part in standing)


# all runs for one family; for each other family those in which its layers can differ most from it
CASES = [("llama", how) for how in RUNS]
CASES += [(family, how) for family in CONFIGS if family != "llama" for how in ("qlora", "lora, no checkpointing")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_tape_agrees_with_the_libraries_own_step(family, how):
    config, run = CONFIGS[family], RUNS[how]
    if family in ("gemma2", "gptj"):
        run = replace(run, attention="eager")
    counted = transient_peak(config, run)
    assert predicted(config, run) == pytest.approx(counted, rel=0.05 if family == "gptj" else 0.008), counted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", RUNS)
def test_the_engine_for_any_model_agrees_with_torchs_own_autocast_and_fake_tensors(how):
    """Two counts of the libraries' own step: tensors on "meta" under autocast rules of our own, and torch's fakes of them."""
    run = replace(RUNS[how], logits="tiled")
    prepared = prepare(LLAMA, run, find_gpu("h200"))
    (step,) = trace_step(prepared, run, find_gpu("h200"))[1]
    most = max(size for size, _ in whole_pass(step, prepared.template).peaks().values())
    assert most == pytest.approx(transient_peak(LLAMA, run), rel=0.001)


def test_the_count_of_fake_tensors_can_disagree():
    """A predictor that forgot the copies made by dropout would be found out."""
    run = replace(RUN, gradient_checkpointing=False)
    counted = transient_peak(LLAMA, run)
    assert predicted(LLAMA, replace(run, dropout=0.0)) != pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("tokens", "window"), [(63, 64), (64, 64), (65, 64), (200, 64), (200, None)])
def test_the_mask_of_sdpa_is_the_one_that_transformers_makes(tokens, window):
    """One byte for each pair of tokens, once for all layers, and only for sequences that fill the window."""
    config = AutoConfig.for_model(**CONFIGS["mistral"], sliding_window=window, attn_implementation="sdpa")
    hidden = torch.empty(3, tokens, 512)
    make = create_sliding_window_causal_mask if window else create_causal_mask
    mask = make(config, inputs_embeds=hidden, attention_mask=torch.ones(3, tokens), past_key_values=None)
    shape = ModelShape.from_config(CONFIGS["mistral"] | {"sliding_window": window})
    run = replace(RUN, batch_size=3, max_length=tokens)
    how = LayerSettings.of(shape, run, find_gpu("h200"))
    assert how.masked == (mask is not None)
    assert mask_bytes(shape, how) == (mask.nbytes if how.masked else 0)


def test_eager_attention_has_a_mask_in_the_width_of_its_products():
    for family, masks in (("llama", 1), ("gemma2", 2)):
        shape = ModelShape.from_config(CONFIGS[family])
        for dtype, width in (("bfloat16", 2), ("float32", 4)):
            run = replace(RUN, attention="eager", compute_dtype=dtype)
            how = LayerSettings.of(shape, run, find_gpu("h200"))
            assert mask_bytes(shape, how) == masks * 2 * 512**2 * width


def on_a_tape(config: dict, run: Settings = RUN) -> tuple[Tape, DecoderLayer]:
    shape, tape = ModelShape.from_config(config), Tape()
    return tape, DecoderLayer(shape, LayerSettings.of(shape, run, find_gpu("h200")), tape)


def backward_peak(tape: Tape, out) -> int:
    """What the backward pass takes beyond what was there, the gradient of `out` included."""
    before, node, elements, width = tape.live, out.node, out.elements, out.width
    del out
    tape.forget_peak()
    tape.backward(node, tape.new(elements, width))
    return tape.peak - before


@pytest.mark.parametrize(("share", "beyond"), [(1.0, 3.0), (0.25, 1.25)])
def test_positions_turn_a_share_of_each_head_and_the_rest_is_copied(share, beyond):
    """All: cos, rotated and sin, or cos, sin and their sum. A quarter: its result, and a copy of the whole."""
    tape, layer = on_a_tape(CONFIGS["gpt_neox"])
    x = tape.new(65_536, 2)
    out = layer.rotary(x, int(share * layer.shape.head_dim))
    assert (out.elements, out.width) == (x.elements, 2)
    assert tape.peak == (1 + beyond) * x.buffer.size


def test_flash_attention_accumulates_in_float32_in_its_backward_pass():
    """Rows of 128 tokens, and heads of a multiple of 32."""
    tape, layer = on_a_tape(
        LLAMA | {"num_key_value_heads": 8, "head_dim": 72}, replace(RUN, batch_size=1, max_length=200)
    )
    size = 200 * 8 * 72
    q, k, v = (tape.source(size, 2) for _ in range(3))
    out = layer._fused(q, k, v)
    assert (
        tape.live == 4 * 2 * size + 200 * 8 * 4 + 256
    )  # q, k, v, the result, and a number per query and head, in blocks
    del q, k, v
    rows = 8 * 256
    assert backward_peak(tape, out) == (1 + 3) * 2 * size + rows * 4 + rows * 96 * 4


@pytest.mark.parametrize(("softmax", "further"), [(False, 1), (True, 2)])
def test_an_operation_that_keeps_its_result_takes_a_gradient_and_softmax_a_product(softmax, further):
    tape, layer = on_a_tape(LLAMA)
    x = tape.source(4_096, 4)
    out = layer.keeping_result(x, 4, **({"softmax": True} if softmax else {}))
    del x
    assert tape.live == 4 * 4_096  # the result alone
    assert backward_peak(tape, out) == (1 + further) * 4 * 4_096


@pytest.mark.parametrize(("a_flows", "b_flows"), [(True, True), (True, False), (False, True)])
def test_a_product_saves_a_factor_for_the_gradient_of_the_other(a_flows, b_flows):
    tape, layer = on_a_tape(LLAMA)
    a, b = (
        tape.source(size, 2) if flows else tape.new(size, 2) for size, flows in ((1_024, a_flows), (4_096, b_flows))
    )
    out = layer.matmul(a, b, 2_048)
    del a, b
    saved = 2 * (1_024 * b_flows + 4_096 * a_flows)
    assert tape.live == saved + 2 * 2_048
    assert backward_peak(tape, out) == 2 * (2_048 + 1_024 * a_flows + 4_096 * b_flows)


def test_the_math_kernel_is_quadratic_and_the_fused_one_is_not():
    long = replace(RUN, attention="math", max_length=1_024, batch_size=1)
    assert predicted(LLAMA, long) == pytest.approx(transient_peak(LLAMA, long), rel=0.05)
    longer = replace(long, max_length=4_096)
    assert predicted(LLAMA, longer) > 10 * predicted(LLAMA, long)
    assert predicted(LLAMA, replace(longer, attention="sdpa")) < 5 * predicted(LLAMA, replace(long, attention="sdpa"))
