"""A folder loaded by transformers alone."""

import pytest
import torch

from qlora_helpers.adapters.plain_loading import let_go, loaded_plainly
from qlora_helpers.models.fingerprint import KEPT
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU


def test_nothing_of_this_package_is_in_what_is_loaded():
    model, tokenizer = loaded_plainly(data_path("tiny-llama"), CPU)
    assert not model.training and model.dtype == torch.float32 and not hasattr(model, KEPT)
    template = (data_path("tiny-llama") / "chat_template.jinja").read_text(encoding="utf-8")
    assert tokenizer.chat_template == template
    del model
    let_go()
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere: name the folder of a merged model"):
        loaded_plainly("nowhere")
