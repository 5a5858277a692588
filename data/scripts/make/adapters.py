"""Make the adapter that ships with the course: lesson 4's run, saved so that later lessons can start where it ended.

python -m data.scripts.make.adapters      # two minutes on two cores
"""

import json
import tempfile
from pathlib import Path

from qlora_helpers import evaluation
from qlora_helpers.adapters.files import describe, save_adapter
from qlora_helpers.chats import read_chats
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train

FOLDER = data_path() / "adapters" / "sentences"


def main() -> None:
    cpu, tokenizer, settings = detect("cpu"), load_tokenizer(), Settings()
    train_chats, test_chats = (
        read_chats(data_path("chats", f"{part}.jsonl"), tokenizer, settings.max_length) for part in ("train", "test")
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_model(hardware=cpu), tokenizer, train_chats, Path(folder) / "run", settings, hardware=cpu)
        save_adapter(run.model, FOLDER, overwrite=True)
    score = evaluation.exact_match(run.model, tokenizer, test_chats)
    (FOLDER / "scores.json").write_text(
        json.dumps({"exact_match": score, "test_chats": len(test_chats)}, indent=1) + "\n", encoding="utf-8"
    )
    print(describe(FOLDER), score)


if __name__ == "__main__":
    main()
