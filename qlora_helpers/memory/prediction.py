"""Predict the peak memory of a fine-tuning run, part by part, from the shape of the model: no GPU, no torch, no download.

The step that is predicted is that of TRL's SFTTrainer (1.15 and 1.16) with PEFT, bitsandbytes and transformers 5, on full
sequences without padding, from the second step on. What autograd keeps is not fitted: `layers.py` runs one decoder layer
with sized tensors. What cannot be derived is named below, with where it was measured.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real

from qlora_helpers.memory.gpus import GPU, find_gpu
from qlora_helpers.memory.layers import DEQUANTISED, FLOAT32, TILE, DecoderLayer, LayerSettings
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.tape import BLOCK, Tape, Tensor

GIB, MIB = 2**30, 2**20

METHODS = ("qlora", "lora", "full")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
ATTENTION = ("sdpa", "math", "eager")
EAGER_ONLY = ("gemma2", "gptj")  # transformers offers no sdpa for these families
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
# torch serves requests below this size from memory of their own (c10/cuda/CUDACachingAllocator.cpp, kSmallSize), which
# large tensors cannot use: both pools keep the most that each of them ever held.
SMALL_REQUEST = MIB
# Main memory of a process that has loaded the libraries, without a model: Llama-3.1-8B was loaded, tensor by tensor, in
# 1.62 GB, of which its largest tensor is 1.05 (data/measured/t4_gear.json).
HOST_PROCESS = 571_000_000
# What torch's allocator cannot give out again, as a share of what comes and goes within a step: holes between tensors of
# unlike sizes. Chosen by the calibration rows of data/measured/memory.json, whose own shares lie from 0.01 to 0.3.
HOLES_WITH_CHECKPOINTING, HOLES = 0.14, 0.025


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
            Gemma 2 and GPT-J have no "sdpa" in transformers: there it means "eager".
        accumulation: forward passes per optimizer step; with more than one the gradients stay from pass to pass.

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
    accumulation: int = 1

    def __post_init__(self):
        def refuse(name: str, allowed: str):
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

        def put(name: str, value) -> None:
            object.__setattr__(self, name, value)

        def one_of(name: str, known) -> None:
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                refuse(name, ", ".join(known))

        def whole(name: str, known: tuple[int, ...] = ()) -> None:
            try:
                value = operator.index(getattr(self, name))  # a numpy integer is one, too
            except TypeError:
                value = 0
            if value < 1 or isinstance(getattr(self, name), bool) or (known and value not in known):
                refuse(name, ", ".join(map(str, known)) or "a whole number from 1 on")
            put(name, value)

        def switch(name: str) -> None:
            if not isinstance(getattr(self, name), bool):
                refuse(name, "True, False")

        one_of("method", METHODS)
        one_of("compute_dtype", WIDTHS)
        one_of("optimizer", OPTIMIZERS)
        one_of("attention", ATTENTION)
        for name in ("batch_size", "seq_len", "accumulation"):
            whole(name)
        switch("gradient_checkpointing")
        if self.method == "qlora":
            switch("double_quant")
            whole("block_size", BLOCK_SIZES)
        if self.method != "full":
            switch("upcast_fp32")
            one_of("adapter_dtype", WIDTHS)
            whole("lora_rank")
            dropout = self.lora_dropout
            if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= dropout < 1:
                refuse("lora_dropout", "a number from 0 to below 1")
            put("lora_dropout", float(dropout))
            targets = self.target_modules
            if not isinstance(targets, str):
                if not isinstance(targets, Iterable) or not all(isinstance(name, str) for name in targets):
                    refuse("target_modules", '"all-linear", or a list of names such as ["q_proj", "v_proj"]')
                put("target_modules", tuple(sorted(targets) if isinstance(targets, set | frozenset) else targets))


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
    "paged_adamw_32bit": Optimizer(bits=32, paged=True),
    "paged_adamw_8bit": Optimizer(bits=8, paged=True),
}


@dataclass(frozen=True)
class Prediction:
    """What a run takes, in bytes.

    Attributes:
        loaded_bytes: in torch's tensors after the model is loaded, adapters not yet there.
        peak_allocated_bytes, peak_reserved_bytes: the most in torch's tensors within a steady step, and the most that
            torch's allocator holds for them.
        device_bytes: on the card: what torch reserves, the CUDA context, and the paged optimizer states.
        host_bytes_to_load: of main memory while the model is loaded, file pages that the system may drop aside.
        disk_bytes: of the model's files in 16 bits.
        peak_phase: of the step in which the peak lies.
        phases: the most in torch's tensors within each phase of a steady step, in the order in which they come.
        parts: what is alive at the peak, in order. They add up to `peak_allocated_bytes`, but for two that lie outside of
            torch's allocator: "optimizer (paged)" and "CUDA context". Without checkpointing "checkpointed activations" and
            "recomputed layer" are called "activations" and "layer at work". "16-bit weights" are all that are not in 4
            bits, also where the run has made them float32.
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
    phases: dict[str, int] = field(hash=False)

    @property
    def spare_bytes(self) -> int:
        """Memory of the card that is left; negative where the run does not fit. Paged optimizer states count as lying on it.

        The driver may move them to main memory if the card is full, at the price of time; that is not counted on here.
        """
        return self.gpu.usable_bytes - self.device_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def _rounded(size: float) -> int:
    return -(-int(size) // BLOCK) * BLOCK


def _kernel(shape: ModelShape, run: FineTuning, gpu: GPU, masked: bool) -> str:
    """The attention kernel that serves a run."""
    if shape.model_type in EAGER_ONLY:
        return "eager"
    if run.attention != "sdpa":
        return run.attention
    if gpu.compute_capability < (8, 0) or masked:
        return "efficient"
    if run.compute_dtype == "float32":  # FlashAttention takes 16 bits only, and the next kernel no shared key heads
        return "math" if shape.num_key_value_heads != shape.num_attention_heads else "efficient"
    return "flash"


def layer_settings(shape: ModelShape, run: FineTuning, gpu: GPU) -> LayerSettings:
    """How a decoder layer is run. Fields that the method does not use have a value of their own."""
    compute = WIDTHS[run.compute_dtype]
    upcast = run.upcast_fp32 and run.method != "full"
    # beyond the window transformers makes a mask, which FlashAttention does not take
    masked = shape.sliding_window is not None and run.seq_len > shape.sliding_window
    lora, four_bit = run.method != "full", run.method == "qlora"
    adapted = frozenset(target.name for target in shape.targets(run.target_modules)) if lora else frozenset()
    return LayerSettings(
        batch_size=run.batch_size,
        seq_len=run.seq_len,
        compute=compute,
        stream=FLOAT32 if upcast else compute,
        wide_norms=shape.has_layer_norm and four_bit and run.compute_dtype != "float32",
        adapter=WIDTHS[run.adapter_dtype] if lora else compute,
        weight=FLOAT32 if upcast and run.method == "lora" else compute,
        autocast=run.compute_dtype != "float32",
        float16=run.compute_dtype == "float16",
        method=run.method,
        double_quant=four_bit and run.double_quant,
        block_size=run.block_size if four_bit else BLOCK_SIZES[0],
        rank=run.lora_rank if lora else 1,
        dropout=lora and run.lora_dropout > 0,
        adapted=adapted,
        kernel=_kernel(shape, run, gpu, masked),
        masked=masked,
    )


@dataclass(frozen=True)
class Peak:
    """The most that a piece of the step takes, in bytes, and what of it is of a kind that is shown by itself."""

    total: int
    dequantised: int = 0
    tile: int = 0

    @classmethod
    def of(cls, tape: Tape, without: int) -> "Peak":
        return cls(tape.peak - without, tape.peak_of.get(DEQUANTISED, 0), tape.peak_of.get(TILE, 0))


@dataclass(frozen=True)
class Cost:
    """A piece of the model: bytes that its forward pass keeps, and its peaks on the way forward and on the way back.

    Its input is in none of them; the gradient of its output is in `backward`.
    """

    kept: int
    forward: Peak
    backward: Peak


@dataclass(frozen=True)
class Phase:
    """A phase of the step: bytes that are there beside what stands in all phases.

    Args:
        at_work: what the piece of the model takes that is run.
        gradients: of trained weights.
        activations: checkpoints, or all that the layers have kept.
        copies: of adapters in 16 bits, which autocast holds during the forward pass.
    """

    at_work: Peak
    gradients: int = 0
    activations: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        return self.at_work.total + self.gradients + self.activations + self.copies


def cost_of(shape: ModelShape, how: LayerSettings, apply, keep_input: bool, first: bool = False) -> Cost:
    """Run a piece of the model on a tape, forward and back.

    Args:
        apply: from a `DecoderLayer` and its input to the result, such as `DecoderLayer.__call__`.
        keep_input: the input stays whether or not a gradient needs it.
        first: the input asks for no gradient.
    """
    tape = Tape()
    layer = DecoderLayer(shape, how, tape)
    elements = how.tokens * shape.hidden_size
    x = tape.new(elements, how.stream) if first else tape.source(elements, how.between)
    size = x.buffer.size
    out = apply(layer, x)
    forward = Peak.of(tape, size)
    node, out_elements, out_width = out.node, out.elements, out.width
    if not keep_input:
        del x
        size = 0
    del out
    kept = tape.live - size
    gradient = tape.new(out_elements, out_width)
    tape.forget_peak()
    tape.backward(node, gradient)
    return Cost(kept, forward, Peak.of(tape, size))


def _head(layer: DecoderLayer, x: Tensor) -> Tensor:
    """The final norm and TRL's fused output head, down to the loss."""
    shape, how, tape = layer.shape, layer.how, layer.tape
    new, h, s = tape.new, shape.hidden_size, how.stream
    normed = layer.layer_norm(x, h) if shape.has_layer_norm else layer.rms_norm(x, h)
    del x
    width = normed.width
    scored = how.batch_size * max(how.seq_len - 1, 1)  # the last token of a sequence predicts nothing
    whole = how.tokens * h

    def unpick(g):  # the gradient is laid into zeros twice: for the tokens that count, and for all but the last
        picked = new(scored * h, width)
        gradient = new(whole, width)
        del picked
        return (gradient,)

    hidden = tape.apply(scored * h, width, (normed,), unpick)
    statistics = new(7 * scored, FLOAT32)
    rows = min(scored, TILE_TOKENS)
    trained = how.method == "full"

    def tile(pieces: int) -> list[Tensor]:
        taken = [new(rows * TILE_VOCABULARY, how.compute, TILE)]
        if width != how.compute:
            taken.append(new(rows * h, how.compute))
        if s != how.compute:  # 16-bit copies of pieces of the float32 head
            taken.append(new(min(pieces * TILE_VOCABULARY, shape.vocab_size) * h, how.compute))
        return taken

    taken = tile(1)
    del taken, statistics
    kept = new(2 * scored, FLOAT32)

    def backward(g, saved=(hidden, kept)):
        # all of these are alive until the function returns
        wide = new(scored * h, FLOAT32)
        wide_weight = new(shape.vocab_size * h, FLOAT32) if trained else None
        taken = tile(2)  # a piece is dropped after the next is made
        of_hidden = wide if width == FLOAT32 else new(scored * h, width)
        if trained:
            tape.keep_weight_gradient(new(shape.vocab_size * h, how.weight))
        del wide, wide_weight, taken
        return (of_hidden,)

    return tape.apply(1, FLOAT32, (hidden,), backward)


@lru_cache(maxsize=4096)
def _costs(shape: ModelShape, how: LayerSettings, checkpointing: bool) -> tuple[Cost, Cost, Cost]:
    """The cost of the first decoder layer, of each further one, and of the head."""
    layer = first = cost_of(shape, how, DecoderLayer.__call__, keep_input=checkpointing)
    # with checkpointing TRL lets the embeddings' output ask for a gradient; with trained embeddings it does anyway
    if not checkpointing and how.method != "full":
        first = cost_of(shape, how, DecoderLayer.__call__, keep_input=False, first=True)
    return first, layer, cost_of(shape, how, _head, keep_input=False)


def _weights(shape: ModelShape, run: FineTuning) -> dict[str, int]:
    """Bytes of the loaded model by part."""
    width = FLOAT32 if run.upcast_fp32 and run.method != "full" else WIDTHS[run.compute_dtype]
    rest = (shape.embedding_parameters + shape.small_parameters) * width + shape.buffer_bytes
    if run.method != "qlora":
        linears = shape.linear_parameters * width
        return {"4-bit weights": 0, "quantisation constants": 0, "16-bit weights": linears + rest}
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
        "16-bit weights": rest,
    }


def loaded_bytes(shape: ModelShape, run: FineTuning, method: str) -> int:
    """Bytes of the base as `method` loads it, by the other settings of a run."""
    return sum(_weights(shape, replace(run, method=method, upcast_fp32=False)).values())


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
    rest = shape.parameters - sum(elements * times for elements, times, _ in tensors)  # norms and biases
    tensors.append((shape.hidden_size, rest // shape.hidden_size, False))
    tensors.append((rest % shape.hidden_size, 1, False))
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


def _share_below(shape: ModelShape, run: FineTuning, width: int) -> float:
    """The share of the trained parameters that lies in tensors of the allocator's small pool."""
    sizes = [(elements * times, elements * width < SMALL_REQUEST) for elements, times, _ in _trained(shape, run)]
    return sum(size for size, below in sizes if below) / sum(size for size, _ in sizes)


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
    if not isinstance(shape, ModelShape):
        raise ValueError(f"shape is {shape!r}; give a ModelShape, such as find_shape({str(shape)!r})")
    if not isinstance(run, FineTuning):
        raise ValueError(f"run is a {type(run).__name__}; give a FineTuning(...)")
    gpu = find_gpu(gpu)
    _check(shape, run)
    how = layer_settings(shape, run, gpu)
    first, layer, head = _costs(shape, how, run.gradient_checkpointing)
    layers, h, checkpointing = shape.num_hidden_layers, shape.hidden_size, run.gradient_checkpointing

    weights = _weights(shape, run)
    loaded = sum(_weights(shape, replace(run, upcast_fp32=False)).values())
    trained = sum(elements * times for elements, times, _ in _trained(shape, run))
    trained_width = WIDTHS[run.adapter_dtype] if run.method != "full" else WIDTHS[run.compute_dtype]
    adapters = 0 if run.method == "full" else trained * trained_width
    gradients = trained * trained_width
    on_gpu, paged, temporaries = _optimizer(shape, run, trained_width)

    pairs = run.batch_size * run.seq_len**2  # of tokens; a mask is made once, for all layers together
    if how.kernel == "eager":  # Gemma 2 has a mask with a window and one without
        masks = pairs * how.compute * (2 if shape.model_type == "gemma2" else 1)
    else:
        masks = pairs if how.masked else 0
    standing = sum(weights.values()) + adapters + on_gpu + gpu.workspace_bytes + masks
    copies = trained * how.compute if how.autocast and trained_width != how.compute else 0  # autocast's cache
    of_layers = trained_width * shape.linear_parameters if run.method == "full" else gradients
    x = _rounded(how.tokens * h * how.between)
    table = shape.vocab_size * h * trained_width if run.method == "full" else 0
    above = table + (layers - 1) * (of_layers // layers)  # gradients that are there when the first layer's turn comes

    # the last layer's output is there when the loss is computed
    loss = replace(head.forward, total=head.forward.total + x)
    if checkpointing:
        kept = _rounded(how.tokens * h * how.stream) + (layers - 1) * x
        # a layer is run again with the gradient of its output waiting
        again = max(layer.backward, replace(layer.forward, total=layer.forward.total + x), key=lambda peak: peak.total)
        phases = {
            "loss": Phase(loss, 0, kept, copies),
            "loss backward": Phase(head.backward, 0, kept),
            "last layer backward": Phase(again, table, kept),
            "first layer backward": Phase(again, above, x),
        }
    else:
        kept = first.kept + (layers - 1) * layer.kept
        phases = {
            "loss": Phase(loss, 0, kept),
            "loss backward": Phase(head.backward, 0, kept),
            "last layer backward": Phase(layer.backward, table, kept - layer.kept),
            "first layer backward": Phase(first.backward, above),
        }
    if run.method == "full":
        # the head's gradient is there; if it shares its weight with the embeddings, theirs is made beside it
        of_embeddings = table if shape.tie_word_embeddings else 0
        phases["embeddings backward"] = Phase(Peak(x + of_embeddings), gradients)
    phases["optimizer step"] = Phase(Peak(temporaries), gradients)
    if run.accumulation > 1:  # the gradients of the passes before are there, and each new one is added to its own
        phases = {name: replace(phase, gradients=gradients) for name, phase in phases.items()}

    name = max(phases, key=lambda name: phases[name].total)
    highest = phases[name]
    at_work, in_step = highest.at_work, name == "optimizer step"
    parts = {
        **weights,
        "adapters": adapters,
        "gradients": highest.gradients,
        "optimizer (GPU)": on_gpu + (temporaries if in_step else 0),
        "optimizer (paged)": paged,
        "checkpointed activations" if checkpointing else "activations": highest.activations,
        "recomputed layer" if checkpointing else "layer at work": (
            masks if in_step else masks + highest.copies + at_work.total - at_work.tile - at_work.dequantised
        ),
        "logits tile": at_work.tile,
        "dequantised weight": at_work.dequantised,
        "workspace": gpu.workspace_bytes,
        "CUDA context": gpu.context_bytes,
    }
    # the small pool is fullest at the optimizer's step, when the gradients and the temporaries are there
    small = _share_below(shape, run, trained_width)
    holes = HOLES_WITH_CHECKPOINTING if checkpointing else HOLES

    def held(name: str) -> float:
        phase = phases[name]
        later = 0 if name == "optimizer step" else small * max(gradients + temporaries - phase.gradients, 0)
        return standing + phase.total + later + holes * (phase.total - phase.gradients)

    reserved = int(max(map(held, phases)))
    resident = -(-paged // PAGE_POOL) * PAGE_POOL
    return Prediction(
        shape=shape,
        run=run,
        gpu=gpu,
        loaded_bytes=loaded,
        peak_allocated_bytes=standing + highest.total,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + gpu.context_bytes + resident,
        host_bytes_to_load=2 * shape.largest_tensor + HOST_PROCESS,
        disk_bytes=2 * shape.parameters,
        trainable_parameters=trained,
        peak_phase=name,
        parts=parts,
        phases={name: standing + phase.total for name, phase in phases.items()},
    )
