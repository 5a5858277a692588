"""The predicted memory of a real-size run is what the run takes, measured with the course's own callback."""

import gc

import pytest
import torch

from qlora_helpers.hardware import detect
from qlora_helpers.memory import predict
from qlora_helpers.memory.comparison import compare
from qlora_helpers.memory.live_run import settings_of, shape_of
from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training.trainer import build_trainer

BATCH, TOKENS, STEPS = 4, 1_024, 2


def test_the_predicted_peak_of_1_5b_is_within_8_per_cent(stand_ins, tmp_path, monkeypatch):
    from data.scripts.make import stand_in_models as stand_in

    monkeypatch.setenv("QLORA_GEAR", "ampere")
    gc.collect()
    torch.cuda.empty_cache()
    folder = stand_ins("Qwen2.5-1.5B")
    tokenizer = load_tokenizer(folder)
    chats = stand_in.chats(BATCH * STEPS, TOKENS, tokenizer)
    before = torch.cuda.memory_allocated()
    measurement = Measurement()
    with measurement.phase("load"):
        model = load_model(folder)
    settings = Settings(
        steps=STEPS, batch_size=BATCH, dropout=0.05, max_length=TOKENS, warmup_steps=1, gradient_checkpointing=True
    )
    trainer = build_trainer(model, tokenizer, chats, tmp_path, settings, detect())
    trainer.add_callback(MemoryCallback(measurement))
    trainer.train()
    prediction = predict(shape_of(trainer), settings_of(trainer), "h200")
    print("\n" + compare(prediction, measurement))
    steady = measurement.phases["steady steps"]
    # memory left over from earlier tests does not belong to the run
    assert prediction.peak_allocated_bytes == pytest.approx(steady.peak_allocated_bytes - before, rel=0.08)
