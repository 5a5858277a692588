"""Will it fit? The memory of a fine-tuning run, predicted part by part."""

from .architectures import ModelShape
from .gpus import GPU, find_gpu
from .prediction import FineTuning, Prediction, predict

__all__ = ["GPU", "FineTuning", "ModelShape", "Prediction", "find_gpu", "predict"]
