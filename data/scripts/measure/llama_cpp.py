"""Does llama.cpp itself say what the adapter says? Exported files, asked by transformers and by llama.cpp.

python -m data.scripts.measure.llama_cpp PYTHON     writes data/measured/llama_cpp.json

PYTHON is an interpreter whose environment has xllamacpp, which carries llama.cpp built for the CPU; this project does not
install it. Its server is asked over the loopback interface alone. Compared are the tokens of each prompt and the greedy answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from qlora_helpers.adapters.file_merge import merge_files
from qlora_helpers.adapters.gguf_export import KINDS, export_gguf
from qlora_helpers.adapters.same_answers import said
from qlora_helpers.chats import read_chats
from qlora_helpers.json_files import write_json
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path

QUESTIONS, TOKENS = 60, 40
# run by the other interpreter: asks its server, and prints what came as JSON
_ASK = """
import importlib.metadata, json, sys, urllib.request
import xllamacpp as x
path, chats, tokens = json.load(sys.stdin)
options = x.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.port = path, 512, 1, 0, 0
options.use_jinja, options.warmup, options.verbosity, options.cpuparams.n_threads = True, False, 0, 1
server = x.Server(options)
def post(route, **body):
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
rows = []
for chat in chats:
    prompt = post("/apply-template", messages=chat)["prompt"]
    ids = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    answer = post("/v1/chat/completions", messages=chat, temperature=0, max_tokens=tokens)
    rows.append([ids, answer["choices"][0]["message"]["content"].strip()])
print(json.dumps({"version": importlib.metadata.version("xllamacpp"), "rows": rows}))
"""


def asked(python: str, path: Path, chats: list[Any], tokens: int = TOKENS) -> dict[str, Any]:
    """What llama.cpp says to the chats: for each, the tokens of its prompt and its answer; and the version of xllamacpp."""
    done = subprocess.run(
        [python, "-c", _ASK],
        input=json.dumps([str(path), chats, tokens]),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(python: str, folder: Path) -> dict[str, Any]:
    """The record: of each kind of file of the shipped adapter, to how many questions both say the same.

    Args:
        folder: an empty one, for the files.
    """
    chats = [chat[:1] for chat in read_chats(data_path("chats", "test.jsonl"))[:QUESTIONS]]
    merged = merge_files(data_path("tiny-llama"), data_path("adapters", "sentences"), folder / "merged")
    wanted = said(load_model(str(merged), quantization=None), load_tokenizer(str(merged)), chats, max_new_tokens=TOKENS)
    rows, version = [], ""
    for kind in KINDS:
        file = export_gguf(merged, folder / f"{kind}.gguf", kind)
        found = asked(python, file.path, chats)
        version = found["version"]
        rows.append(
            {
                "kind": kind,
                "questions": len(chats),
                "same_tokens": sum(
                    ids == list(prompt) for (ids, _), prompt in zip(found["rows"], wanted.prompts, strict=True)
                ),
                "same_answers": sum(
                    answer == text for (_, answer), text in zip(found["rows"], wanted.texts, strict=True)
                ),
            }
        )
    return {"xllamacpp": version, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", metavar="PYTHON", help="an interpreter with xllamacpp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(args.python, Path(folder))
    write_json(data_path("measured") / "llama_cpp.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
