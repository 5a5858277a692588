"""What a run trains: its tensors, their gradients, and what the optimizer keeps for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.memory.tape import FLOAT32, rounded
from qlora_helpers.settings import DTYPES, Settings
from qlora_helpers.units import MIB

__all__ = [
    "OPTIMIZERS",
    "PAGE_POOL",
    "SMALLEST_8BIT",
    "SMALLEST_PAGED",
    "Optimizer",
    "Trained",
    "TrainedTensor",
    "state_sizes",
    "trained_of",
    "trained_tensors",
    "trained_width",
    "what_is_trained",
]

# bitsandbytes keeps the state of a tensor in 32 bits below this many elements (optim/optimizer.py, min_8bit_size) ...
SMALLEST_8BIT = 4_096
# ... and pages none below this many (optim/optimizer.py, get_state_buffer).
SMALLEST_PAGED = 100_000
# Managed memory is allocated in pieces of this size (measured on an H200: data/measured/h200_peaks.json, 70B: 49 of them).
PAGE_POOL = 128 * MIB
# torch serves requests below this size from a pool of their own (c10/cuda/CUDACachingAllocator.cpp, kSmallSize), which
# large tensors cannot use: each of the two pools keeps the most that it ever held.
SMALL_REQUEST = MIB


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each trained parameter.

    Args:
        bits: of one state: 8 or 32; 0 for the parameter's own dtype.
        paged: large states are in managed memory.
        temporaries: extra copies of all parameters during the step (torch's foreach version takes a square root of each).
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
class TrainedTensor:
    """Trained tensors of one size.

    Args:
        elements: of one tensor.
        count: how many tensors there are.
        is_embedding: the token embeddings, which transformers treats differently.
    """

    elements: int
    count: int
    is_embedding: bool = False


@dataclass(frozen=True)
class Trained:
    """All that is trained, in bytes unless said otherwise.

    Attributes:
        parameters: how many there are.
        width: of one parameter, and of its gradient.
        adapters: the adapters; 0 if the model's own weights are trained.
        states: optimizer states in torch's tensors.
        paged: optimizer states in managed memory.
        temporaries: what the optimizer takes during its step.
        share_of_small: the share of the parameters that is in the allocator's small pool.
    """

    parameters: int
    width: int
    adapters: int
    states: int
    paged: int
    temporaries: int
    share_of_small: float

    @property
    def gradients(self) -> int:
        return self.parameters * self.width

    @property
    def resident_pages(self) -> int:
        """Managed memory that the paged states take if all of them are on the card."""
        return -(-self.paged // PAGE_POOL) * PAGE_POOL


def trained_tensors(shape: ModelShape, settings: Settings, shards: int = 1) -> list[TrainedTensor]:
    """Every trained tensor: the two matrices of each adapter, or all weights.

    Args:
        shards: that each is split into, along its first dimension: then the largest one of each, padding included.
    """
    layers, rank = shape.num_hidden_layers, settings.rank
    if settings.method != "full":
        return [
            TrainedTensor(elements, layers)
            for linear in shape.targets(settings.target_modules)
            for elements in (-(-rank // shards) * linear.in_features, -(-linear.out_features // shards) * rank)
        ]
    if shards > 1:
        whole = trained_tensors(shape, settings)
        return [replace(tensor, elements=-(-tensor.elements // shards)) for tensor in whole]
    table = shape.vocab_size * shape.hidden_size
    tensors = [TrainedTensor(linear.weights, layers) for linear in shape.linears]
    tensors.append(TrainedTensor(table, 1, is_embedding=True))
    if not shape.tie_word_embeddings:
        tensors.append(TrainedTensor(table, 1))
    norms_and_biases = shape.parameters - sum(tensor.elements * tensor.count for tensor in tensors)
    tensors.append(TrainedTensor(shape.hidden_size, norms_and_biases // shape.hidden_size))
    tensors.append(TrainedTensor(norms_and_biases % shape.hidden_size, 1))
    return tensors


def what_is_trained(shape: ModelShape, settings: Settings) -> Trained:
    """What is trained in a run, and what the optimizer keeps for it."""
    return trained_of(trained_tensors(shape, settings), settings)


def trained_of(tensors: Iterable[TrainedTensor], settings: Settings) -> Trained:
    """What the optimizer keeps for these trained tensors.

    Args:
        settings: of the run, with its dtype and its optimizer.
    """
    full, kind, width = settings.method == "full", OPTIMIZERS[settings.optimizer], trained_width(settings)
    parameters = states = paged = temporaries = small = 0
    for tensor in tensors:
        on_gpu, in_pages = state_sizes(tensor, kind, width)
        parameters += tensor.elements * tensor.count
        states, paged = states + tensor.count * sum(map(rounded, on_gpu)), paged + tensor.count * in_pages
        temporaries += kind.temporaries * tensor.count * rounded(tensor.elements * width)
        small += tensor.elements * tensor.count if tensor.elements * width < SMALL_REQUEST else 0
    adapters = 0 if full else parameters * width
    return Trained(parameters, width, adapters, states, paged, temporaries, small / parameters)


def trained_width(settings: Settings) -> int:
    """Bytes of one trained parameter."""
    # with FSDP accelerate makes trained weights float32, unless there are bitsandbytes' layers (fsdp2_prepare_model)
    if settings.sharding and settings.method != "qlora" and settings.compute_dtype != "float32":
        return FLOAT32
    return DTYPES[settings.compute_dtype if settings.method == "full" else settings.adapter_dtype]


def state_sizes(tensor: TrainedTensor, kind: Optimizer, width: int) -> tuple[tuple[int, ...], int]:
    """Bytes of each piece that an optimizer keeps for one trained tensor in torch's tensors; and in managed memory."""
    # transformers keeps the states of embeddings in 32 bits (Trainer.create_optimizer)
    if kind.bits == 8 and tensor.elements >= SMALLEST_8BIT and not tensor.is_embedding:
        state, scales = tensor.elements, 2 * (-(-tensor.elements // 256) * FLOAT32,)  # two per block of 256
    else:
        state, scales = tensor.elements * (FLOAT32 if kind.bits else width), ()
    if kind.paged and tensor.elements >= SMALLEST_PAGED:
        return scales, 2 * state
    return (state, state, *scales), 0
