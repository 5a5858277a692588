"""Predict the peak memory of a fine-tuning run, part by part, from the shape of the model: no GPU, no torch, no download.

The step that is predicted is that of TRL's SFTTrainer (1.15 and 1.16) with PEFT, bitsandbytes and transformers 5, on full
sequences without padding, from the second step on. What autograd keeps is not fitted: `layers.py` runs one decoder layer
with sized tensors. What cannot be derived is named below, with where it was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

from .architectures import Linear, ModelShape
from .gpus import GPU, find_gpu
from .layers import FLOAT32, DecoderLayer, How
from .tape import BLOCK, Tape, Tensor

GIB, MIB = 2**30, 2**20

METHODS = ("qlora", "lora", "full")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
ATTENTION = ("sdpa", "math", "eager")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'

# TRL's fused output head works on tiles (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_VOCABULARY = 4_096, 32_768
# bitsandbytes keeps the state of a tensor in 32 bits below this many elements (optim/optimizer.py, min_8bit_size) ...
SMALLEST_8BIT = 4_096
# ... and pages none below this many (optim/optimizer.py, get_state_buffer).
SMALLEST_PAGED = 100_000
# Managed memory is given out in pieces of this size (measured on an H200: data/measured/h200_peaks.json, 70B: 49 of them).
PAGE_POOL = 128 * MIB
NESTED_BLOCK = 256  # constants per second-level block, bitsandbytes


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning run.

    Args:
        method: "qlora", "lora" (16-bit base) or "full".
        compute_dtype: in which the model is loaded, 4-bit weights aside, and in which autocast runs.
        adapter_dtype: of LoRA's weights: plain TRL makes them bfloat16 in a 4-bit model, this course keeps them float32.
        double_quant, block_size: of the 4-bit weights.
        lora_rank, lora_dropout, target_modules: as in PEFT's LoraConfig.
        batch_size: sequences per forward pass on the GPU.
        seq_len: tokens per sequence, padding included.
        gradient_checkpointing: keep a layer's input only, and compute the rest again.
        optimizer: a name of transformers' `optim`; see `OPTIMIZERS`.
        upcast_fp32: `prepare_model_for_kbit_training` was called.
        attention: "sdpa", "math" (torch's own kernel, which is what a T4 is left with for grouped-query attention) or
            "eager". Below compute capability 8.0 "sdpa" means this course's gear, which keeps to the memory-efficient kernel.

    Raises:
        ValueError: names the field, its value, and what is allowed. Fields that the method does not use are not looked at.
    """

    method: str = "qlora"
    compute_dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    double_quant: bool = True
    block_size: int = 64
    lora_rank: int = 16
    lora_dropout: float = 0.05
    target_modules: str | Sequence[str] = "all-linear"
    batch_size: int = 1
    seq_len: int = 2_048
    gradient_checkpointing: bool = True
    optimizer: str = "paged_adamw_8bit"
    upcast_fp32: bool = False
    attention: str = "sdpa"

    def __post_init__(self):
        def refuse(name: str, allowed: str):
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

        def one_of(name: str, known) -> None:
            if getattr(self, name) not in known:
                refuse(name, ", ".join(map(str, known)))

        def whole(name: str) -> None:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(name, "a whole number from 1 on")

        one_of("method", METHODS)
        one_of("compute_dtype", WIDTHS)
        one_of("optimizer", OPTIMIZERS)
        one_of("attention", ATTENTION)
        whole("batch_size")
        whole("seq_len")
        switches = ["gradient_checkpointing", "upcast_fp32"]
        if self.method == "qlora":
            switches.append("double_quant")
            one_of("block_size", BLOCK_SIZES)
        for name in switches:
            one_of(name, (True, False))
        if self.method != "full":
            one_of("adapter_dtype", WIDTHS)
            whole("lora_rank")
            if isinstance(self.lora_dropout, bool) or not isinstance(self.lora_dropout, int | float):
                refuse("lora_dropout", "a number from 0 to below 1")
            if not 0 <= self.lora_dropout < 1:
                refuse("lora_dropout", "a number from 0 to below 1")
            if not isinstance(self.target_modules, str):
                object.__setattr__(self, "target_modules", tuple(self.target_modules))


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each trained parameter.

    Args:
        bits: of one state: 8 or 32; 0 for the parameter's own dtype.
        paged: large states lie in managed memory.
        temporaries: further copies of all parameters during the step (torch's foreach form takes a square root of each).
    """

    bits: int = 0
    paged: bool = False
    temporaries: int = 0


OPTIMIZERS = {
    "adamw_torch": Optimizer(temporaries=1),
    "adamw_torch_fused": Optimizer(),
    "adamw_bnb_8bit": Optimizer(bits=8),
    "adamw_8bit": Optimizer(bits=8),
    "paged_adamw": Optimizer(bits=32, paged=True),
    "paged_adamw_32bit": Optimizer(bits=32, paged=True),
    "paged_adamw_8bit": Optimizer(bits=8, paged=True),
}


@dataclass(frozen=True)
class Prediction:
    """What a run takes, in bytes.

    `parts` are what is alive at the peak, in order; they add up to `peak_allocated_bytes`, with two further rows for what lies
    outside torch's allocator: the paged optimizer states and the CUDA context.
    """

    shape: ModelShape
    run: FineTuning
    gpu: GPU
    loaded_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    host_bytes_to_load: int
    disk_bytes: int
    trainable_parameters: int
    peak_phase: str
    parts: dict[str, int] = field(hash=False)

    @property
    def spare_bytes(self) -> int:
        """Memory of the card that is left; negative where the run does not fit."""
        return self.gpu.usable_bytes - self.device_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def _rounded(size: float) -> int:
    return -(-int(size) // BLOCK) * BLOCK


def _how(shape: ModelShape, run: FineTuning, gpu: GPU) -> How:
    compute = WIDTHS[run.compute_dtype]
    upcast = run.upcast_fp32 and run.method != "full"
    kernel = {"sdpa": "flash", "math": "math", "eager": "eager"}[run.attention]
    if kernel == "flash" and gpu.compute_capability < (8, 0):
        kernel = "efficient"
    adapted = frozenset() if run.method == "full" else frozenset(t.name for t in shape.targets(run.target_modules))
    return How(
        batch_size=run.batch_size,
        seq_len=run.seq_len,
        compute=compute,
        stream=FLOAT32 if upcast else compute,
        wide_norms=shape.model_type in ("gpt_neox", "gptj") and run.method == "qlora" and run.compute_dtype != "float32",
        adapter=WIDTHS[run.adapter_dtype],
        weight=FLOAT32 if upcast and run.method == "lora" else compute,
        autocast=run.compute_dtype != "float32",
        method=run.method,
        double_quant=run.double_quant,
        block_size=run.block_size,
        rank=run.lora_rank,
        dropout=run.method != "full" and run.lora_dropout > 0,
        adapted=adapted,
        kernel=kernel,
    )


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one decoder layer: what its forward pass keeps, the most it takes on the way forward, and on the way back.

    The input is in none of them; the gradient of the output is in `backward`.
    """

    kept: int
    forward: int
    backward: int


def _measured(shape: ModelShape, how: How, apply, keep_input: bool) -> LayerCost:
    """Run a piece of the model on a tape, forward and back."""
    tape = Tape()
    layer = DecoderLayer(shape, how, tape)
    elements = how.tokens * shape.hidden_size
    x = tape.source(elements, how.between)
    size = x.buffer.size
    out = apply(layer, x)
    forward = tape.peak - size
    node, out_elements, out_width = out.node, out.elements, out.width
    if not keep_input:
        del x
        size = 0
    del out
    kept = tape.live - size
    gradient = tape.new(out_elements, out_width)
    tape.peak = tape.live
    tape.backward(node, gradient)
    return LayerCost(kept, forward, tape.peak - size)


def _head(layer: DecoderLayer, x: Tensor) -> Tensor:
    """The final norm and TRL's fused output head, down to the loss."""
    shape, how, tape = layer.shape, layer.how, layer.tape
    new, h, s = tape.new, shape.hidden_size, how.stream
    is_layer_norm = shape.model_type in ("gpt_neox", "gptj")
    normed = layer.layer_norm(x, h) if is_layer_norm else layer.rms_norm(x, h)
    del x
    width = normed.width
    scored = how.batch_size * max(how.seq_len - 1, 1)  # the last token of a sequence predicts nothing
    whole = how.tokens * h

    def unpick(g):
        zeros = new(scored * h, width)
        del g
        return (new(whole, width) if zeros else None,)

    hidden = tape.apply(scored * h, width, (normed,), unpick)
    statistics = new(7 * scored, FLOAT32)
    rows = min(scored, TILE_TOKENS)
    trained = how.method == "full"

    def tile() -> list[Tensor]:
        taken = [new(rows * TILE_VOCABULARY, how.compute)]
        if width != how.compute:
            taken.append(new(rows * h, how.compute))
        if s != how.compute:
            taken.append(new(min(TILE_VOCABULARY, shape.vocab_size) * h, how.compute))
        return taken

    taken = tile()
    del taken, statistics
    kept = new(2 * scored, FLOAT32)

    def backward(g, saved=(hidden, kept)):
        of_hidden = new(scored * h, FLOAT32)
        of_weight = new(shape.vocab_size * h, FLOAT32) if trained else None
        taken = tile()
        del taken
        if width != FLOAT32:
            of_hidden = new(scored * h, width)
        if trained:
            of_weight = new(shape.vocab_size * h, how.weight)
            tape.keep_weight_gradient(of_weight)
        return (of_hidden,)

    return tape.apply(1, FLOAT32, (hidden,), backward)


@lru_cache(maxsize=4096)
def _costs(shape: ModelShape, how: How, checkpointing: bool) -> tuple[LayerCost, LayerCost]:
    """The cost of a decoder layer, and of the head."""
    layer = _measured(shape, how, lambda layer, x: layer(x), keep_input=checkpointing)
    head = _measured(shape, how, _head, keep_input=False)
    return layer, head


def _weights(shape: ModelShape, run: FineTuning) -> dict[str, int]:
    """Bytes of the loaded model by part."""
    width = WIDTHS[run.compute_dtype]
    if run.upcast_fp32 and run.method != "full":
        width_of_rest, width_of_linears = FLOAT32, FLOAT32
    else:
        width_of_rest = width_of_linears = width
    rest = shape.embedding_parameters + shape.small_parameters
    if run.method != "qlora":
        return {
            "4-bit weights": 0,
            "quantisation constants": 0,
            "16-bit weights": shape.linear_parameters * width_of_linears + rest * width_of_rest + shape.buffer_bytes,
        }
    constants = 0
    for linear in shape.linears:
        blocks = -(-linear.weights // run.block_size)
        codebook = 16 * FLOAT32
        if run.double_quant:
            nested = -(-blocks // NESTED_BLOCK)
            constants += sum(map(_rounded, (blocks, nested * FLOAT32, 256 * FLOAT32, FLOAT32, codebook)))
        else:
            constants += _rounded(blocks * FLOAT32) + _rounded(codebook)
    return {
        "4-bit weights": shape.linear_parameters // 2,
        "quantisation constants": shape.num_hidden_layers * constants,
        "16-bit weights": rest * width_of_rest + shape.buffer_bytes,
    }


def _trained(shape: ModelShape, run: FineTuning) -> list[tuple[int, int, bool]]:
    """(elements, how often, whether a token embedding) of every trained tensor."""
    layers = shape.num_hidden_layers
    if run.method != "full":
        return [
            (run.lora_rank * side, layers, False)
            for linear in shape.targets(run.target_modules)
            for side in (linear.in_features, linear.out_features)
        ]
    table = shape.vocab_size * shape.hidden_size
    tensors = [(linear.weights, layers, False) for linear in shape.linears]
    tensors.append((table, 1, True))
    if not shape.tie_word_embeddings:
        tensors.append((table, 1, False))
    tensors.append((shape.hidden_size, shape.small_parameters // shape.hidden_size, False))
    return tensors


def _optimizer(shape: ModelShape, run: FineTuning, width: int) -> tuple[int, int, int]:
    """Bytes of the states on the GPU, of those in managed memory, and of the step's temporaries."""
    kind = OPTIMIZERS[run.optimizer]
    on_gpu = paged = temporaries = 0
    for elements, times, embedding in _trained(shape, run):
        # transformers keeps the state of embeddings in 32 bits (Trainer.create_optimizer)
        if kind.bits == 8 and elements >= SMALLEST_8BIT and not embedding:
            state, extra = elements, 2 * _rounded(-(-elements // 256) * FLOAT32)  # two scales per block of 256
        else:
            state, extra = elements * (FLOAT32 if kind.bits else width), 0
        if kind.paged and elements >= SMALLEST_PAGED:
            paged += times * 2 * state
            on_gpu += times * extra
        else:
            on_gpu += times * (2 * _rounded(state) + extra)
        temporaries += kind.temporaries * times * _rounded(elements * width)
    return on_gpu, paged, temporaries


def _check(shape: ModelShape, run: FineTuning) -> None:
    if run.method != "full" and run.lora_rank > shape.hidden_size:
        raise ValueError(f"lora_rank is {run.lora_rank}; allowed: up to the model's hidden size, {shape.hidden_size}")
    longest = shape.max_position_embeddings
    if longest and run.seq_len > longest:
        raise ValueError(f"seq_len is {run.seq_len}; allowed: up to max_position_embeddings of this model, {longest}")


def predict(shape: ModelShape, run: FineTuning, gpu: str | GPU = "h200") -> Prediction:
    """Predict the memory of a run.

    Args:
        shape: of the model.
        run: what is run.
        gpu: a name that `gpus.find_gpu` knows, or a GPU.

    Raises:
        ValueError: a field of the run does not go with this model, or the GPU is not known.
    """
    gpu = find_gpu(gpu)
    _check(shape, run)
    how = _how(shape, run, gpu)
    layer, head = _costs(shape, how, run.gradient_checkpointing)
    layers, h = shape.num_hidden_layers, shape.hidden_size

    weights = _weights(shape, run)
    loaded = sum(_weights(shape, _without_upcast(run)).values())
    trained = sum(elements * times for elements, times, _ in _trained(shape, run))
    trained_width = WIDTHS[run.adapter_dtype] if run.method != "full" else WIDTHS[run.compute_dtype]
    adapters = 0 if run.method == "full" else trained * trained_width
    gradients = trained * trained_width
    on_gpu, paged, temporaries = _optimizer(shape, run, trained_width)

    workspace = gpu.workspace_bytes
    standing = sum(weights.values()) + adapters + on_gpu + workspace
    copies = trained * how.compute if how.autocast and trained_width != how.compute else 0  # autocast's cache
    gradient_per_layer = gradients // layers if run.method != "full" else trained_width * shape.linear_parameters // layers
    x = _rounded(how.tokens * h * how.between)
    held = x if run.gradient_checkpointing else layer.kept
    table = shape.vocab_size * h * trained_width if run.method == "full" else 0
    inner = max(layer.backward, layer.forward + x if run.gradient_checkpointing else 0)

    # (gradients, checkpoints or kept activations, what the phase itself takes, autocast copies)
    if run.gradient_checkpointing:
        phases = {
            "loss": (0, layers * held, head.forward + x, copies),
            "loss backward": (0, layers * held, head.backward, 0),
            "last layer backward": (table, layers * held, inner, 0),
            "first layer backward": (table + (layers - 1) * gradient_per_layer, held, inner, 0),
        }
    else:
        phases = {
            "loss": (0, layers * held, head.forward + x, 0),
            "loss backward": (0, layers * held, head.backward, 0),
            "last layer backward": (table, (layers - 1) * held, layer.backward, 0),
            "first layer backward": (table + (layers - 1) * gradient_per_layer, 0, layer.backward, 0),
        }
    phases["optimizer step"] = (gradients, 0, temporaries, 0)
    if run.method == "full":
        phases["embeddings backward"] = (gradients, 0, table + x, 0)
    phase = max(phases, key=lambda name: sum(phases[name]))
    of_gradients, of_checkpoints, of_phase, of_copies = phases[phase]
    peak = standing + sum(phases[phase])

    tile = min(how.tokens, TILE_TOKENS) * TILE_VOCABULARY * how.compute if phase.startswith("loss") else 0
    biggest = max((linear.weights for linear in shape.linears), default=0)
    dequantised = biggest * how.compute if run.method == "qlora" and "layer" in phase else 0
    parts = {
        **weights,
        "adapters": adapters,
        "gradients": of_gradients,
        "optimizer (GPU)": on_gpu,
        "checkpointed activations" if run.gradient_checkpointing else "activations": of_checkpoints,
        "recomputed layer" if run.gradient_checkpointing else "layer in work": of_phase + of_copies - tile - dequantised,
        "logits tile": tile,
        "dequantised weight": dequantised,
        "workspace": workspace,
    }
    reserved = gpu.reserved_bytes(peak, standing)
    resident = -(-paged // PAGE_POOL) * PAGE_POOL
    parts |= {"optimizer (paged)": paged, "CUDA context": gpu.context_bytes}
    disk = 2 * shape.parameters
    return Prediction(
        shape=shape,
        run=run,
        gpu=gpu,
        loaded_bytes=loaded,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + gpu.context_bytes + resident,
        host_bytes_to_load=2 * shape.vocab_size * h,
        disk_bytes=disk,
        trainable_parameters=trained,
        peak_phase=phase,
        parts=parts,
    )


def _without_upcast(run: FineTuning) -> FineTuning:
    from dataclasses import replace

    return replace(run, upcast_fp32=False) if run.upcast_fp32 else run
