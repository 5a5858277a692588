"""Settings, command lines and chat files of any content: each gives a result, or an error that names what is wrong."""

import contextlib
import csv
import gzip
import io
import json
import math
from dataclasses import fields

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_helpers.__main__ import main
from qlora_helpers.chats import ChatError, fault_in, read_chats, read_file, write_chats
from qlora_helpers.chats.forms import FORMS
from qlora_helpers.settings import Settings
from tests.support.short_runs import TOKENIZER

FIELDS = [field.name for field in fields(Settings)]
CHOICES = ("qlora", "lora", "full", "cosine", "all-linear", "float16", "math", "adamw_torch", ["q_proj"], 64, 512)
numbers = (
    st.integers() | st.floats() | st.integers(min_value=10**18) | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text() | st.binary(max_size=5) | st.complex_numbers() | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=4,
)


@settings(max_examples=6000)
@given(name=st.sampled_from(FIELDS), value=anything | st.integers(0, 300) | st.floats(0, 1) | st.sampled_from(CHOICES))
def attack_settings(name, value, tries):
    """Values of any kind for each field of Settings."""
    try:
        held = getattr(Settings(**{name: value}), name)
    except ValueError as error:
        assert name in str(error) and len(str(error)) < 1000
        tries["refused, with the field's name"] += 1
    else:
        assert not isinstance(held, float) or math.isfinite(held)
        json.dumps(held)  # a record and a report can hold it
        tries["taken"] += 1


words = st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS] + ["--json", "--gpu", "--output"])
values = (
    st.integers(1, 5_000).map(str)
    | numbers.map(str)
    | st.text(max_size=8)
    | st.sampled_from(["none", "t4", "h200", "all-linear", "q_proj,", "inf"])
)
models = st.sampled_from(["Qwen/Qwen2.5-7B", "Llama-3.1-8B", "tiny-llama", "nothing", ""]) | st.text(max_size=12)


@given(model=models, options=st.lists(st.tuples(words, values), max_size=3))
@example(model="Qwen/Qwen2.5-7B", options=[("--batch-size", "1000000000000000003")])
def attack_the_memory_command(model, options, tries):
    """Command lines of `memory`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(["memory", model, *(word for option in options for word in option)])
        except SystemExit as stopped:  # argparse
            code = stopped.code
    assert code in (0, 1, 2) and "Traceback" not in said.getvalue()
    tries[{0: "answered", 1: "does not fit", 2: "refused"}[code]] += 1


texts = st.text(max_size=20) | st.sampled_from(["\ud800", "<|end|>", "<|user|>", "", " ", "\0", "\u2028"])
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | texts, "content": texts})
right = st.lists(texts, min_size=1, max_size=3).map(
    lambda said: [
        {"role": role, "content": text or "?"} for one in said for role, text in (("user", one), ("assistant", one))
    ]
)
rows = (
    right.map(lambda chat: json.dumps({"messages": chat}).encode())
    | st.fixed_dictionaries({"messages": st.lists(messages, max_size=4)}).map(lambda row: json.dumps(row).encode())
    | anything.map(lambda value: repr(value).encode(errors="surrogatepass"))
    | st.binary(max_size=30)
    | st.sampled_from([b"[" * 100_000, b"9" * 5_000, b'{"messages": NaN}', b"", b"\xff\xfe", b"\xef\xbb\xbf{}"])
)


@given(lines=st.lists(rows, max_size=2), end=st.sampled_from([b"\n", b"\r\n", b""]))
def attack_chat_files(lines, end, tmp_path, tries):
    """Chat files of any content."""
    file = tmp_path / "chats.jsonl"
    file.write_bytes(end.join(lines) + end)
    try:
        chats = read_chats(file, TOKENIZER)
    except ChatError as error:
        assert str(file) in str(error) or file.name in str(error)
        tries["refused"] += 1
    else:
        assert all(chat[-1]["role"] == "assistant" for chat in chats)
        tries["read"] += 1


COLUMNS = (
    ("question", "answer"), ("prompt", "completion"), ("instruction", "input", "output"), ("messages",), ("conversations",),
    ("question", "answer", "prompt", "completion"), ("system", "query", "response"), ("id", "Frage", "Antwort"),
)  # fmt: skip
some_text = st.text(max_size=20).map(lambda text: text.strip() or "?")
turns = right | st.lists(messages, max_size=3)
shared = turns.map(lambda chat: [{"from": said["role"], "value": said["content"]} for said in chat])


def rows_of(columns):
    """Rows with mostly what these columns are for, and now and then anything."""
    for_them = {"messages": turns, "conversations": shared}
    cells = {
        name: st.integers(0, 9).flatmap(lambda n, name=name: anything if n == 9 else for_them.get(name, some_text))
        for name in columns
    }
    return st.lists(st.fixed_dictionaries(cells), max_size=4)


tables = st.sampled_from(COLUMNS).flatmap(rows_of)


def as_csv(table, delimiter):
    said = io.StringIO(newline="")
    writer = csv.writer(said, delimiter=delimiter)
    writer.writerow(table[0] if table else [])
    writer.writerows([as_json(cell) if isinstance(cell, list) else str(cell) for cell in row.values()] for row in table)
    return said.getvalue()


def as_json(table):
    return json.dumps(table, default=str)


@given(
    table=tables,
    form=st.sampled_from([None] * 5 + list(FORMS)),
    layout=st.sampled_from(["csv", "semicolons", "array", "lines", "wrapped"]),
    codec=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252", "cp1251"]),
    damage=st.none() | st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)),
    ending=st.sampled_from(["csv", "json", "jsonl", "gz", "txt"]),
)
def attack_tables(table, form, layout, codec, damage, ending, tmp_path, tries):
    """CSV and JSON in any form, encoding and under any name; some with wrong bytes."""
    text = {
        "csv": lambda: as_csv(table, ","),
        "semicolons": lambda: as_csv(table, ";"),
        "array": lambda: as_json(table),
        "lines": lambda: "\n".join(map(as_json, table)),
        "wrapped": lambda: as_json({"data": table}),
    }[layout]()
    content = text.encode(codec, "replace")
    if damage:
        place, wrong = damage
        content = content[:place] + wrong + content[place:]
    file = tmp_path / f"table.{ending}"
    file.write_bytes(gzip.compress(content) if ending == "gz" else content)
    try:
        found = read_file(file, form=form, on_bad="drop")
    except ChatError as error:
        assert file.name in str(error)
        tries["refused"] += 1
    else:
        assert found.chats and all(fault_in({"messages": chat}) is None for chat in found.chats)
        assert len(found.rows) == len(found.chats) and not set(found.rows) & set(found.dropped)
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        write_chats(out, found.chats)
        assert read_chats(out) == found.chats
        tries["read and written"] += 1


@given(content=st.binary(max_size=60), ending=st.sampled_from(["csv", "json", "jsonl", "gz", "parquet", "tsv", ""]))
@example(content=b"PAR1PAR1", ending="parquet")
@example(content=b"\x1f\x8b", ending="gz")
def attack_bytes(content, ending, tmp_path, tries):
    """Files of random bytes under any name."""
    file = tmp_path / f"bytes.{ending}"
    file.write_bytes(content)
    try:
        read_file(file)
    except ChatError as error:
        assert file.name in str(error)
        tries["refused"] += 1
    else:
        tries["read"] += 1
