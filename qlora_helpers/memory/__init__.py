"""Will it fit? The memory of a fine-tuning run, predicted part by part."""

from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.catalogue import find_shape, known_config, known_models, resolve
from qlora_helpers.memory.gpus import GPU, find_gpu, known_gpus
from qlora_helpers.memory.ladder import Change, cures
from qlora_helpers.memory.merge_memory import MergeMemory, predict_merge
from qlora_helpers.memory.prediction import Prediction, predict
from qlora_helpers.memory.search import Suggestion, largest_batch, longest_sequence, suggest, what_fits
from qlora_helpers.memory.several import CheapSet, cheapest_sets, several_gpus
from qlora_helpers.memory.shape import ModelShape
from qlora_helpers.settings import GPU_RUN, Settings

__all__ = [
    "GPU",
    "GPU_RUN",
    "AnyShape",
    "Change",
    "CheapSet",
    "MergeMemory",
    "ModelShape",
    "Prediction",
    "Settings",
    "Suggestion",
    "cheapest_sets",
    "cures",
    "find_gpu",
    "find_shape",
    "known_config",
    "known_gpus",
    "known_models",
    "largest_batch",
    "longest_sequence",
    "predict",
    "predict_merge",
    "resolve",
    "several_gpus",
    "suggest",
    "what_fits",
]
