"""The model card of a run: front matter that the Hub's library reads, all figures of the report, texts that break nothing."""

import ast
import json
import random
import re
from dataclasses import asdict
from itertools import pairwise

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from qlora_helpers.adapters.card import _text as card_text
from qlora_helpers.adapters.card import model_card
from qlora_helpers.settings import Settings

MARKDOWN = MarkdownIt("commonmark").enable("table")
SCORES = {
    "rows": 40, "loss": 2.5, "loss_error": 0.125, "tokens": 1234, "exact_match": 0.25, "exact_match_error": 0.0791,
    "short_rows": 30, "overlap": 21.5, "overlap_error": 2.25, "long_rows": 10, "cut_off": 7, "seconds": 3.0,
}  # fmt: skip
ROW = {
    "number": 1, "question": "Who?", "right": "Ann.", "before": "Ben", "after": "Cy", "after_is_exact": False, "after_overlap": 1.0,
}  # fmt: skip
WHOLE = {
    "model": "owner/a-model-1.5B",
    "settings": asdict(Settings(steps=12, rank=8)),
    "gear": "t4",
    "hardware": "Tesla T4",
    "data_file": "/home/someone/secret/mine.csv",
    "data_form": "question-answer",
    "data_rows": 321,
    "data_tokens": 45_678,
    "data_answer_tokens": 9_876,
    "commonest_answer_rate": 0.0123,
    "data_dropped": 3,
    "data_changed": {"developer became system": 2},
    "validation_rows": 17,
    "test_rows": 40,
    "loss_history": [[step, 4.0 - step / 10] for step in range(1, 31)],
    "validation_history": [[10, 3.25], [20, 3.0]],
    "best_step": 20,
    "trainable_parameters": 1000,
    "all_parameters": 50_000,
    "train_seconds": 61.4,
    "total_seconds": 99.9,
    "peak_memory_bytes": 3 * 2**30,
    "predicted_memory_bytes": int(2.5 * 2**30),
    "scores": {
        "before": SCORES,
        "after": SCORES | {"loss": 1.5, "exact_match": 0.75, "overlap": 61.5, "cut_off": 1},
        "loss_change": [-1.0, 0.2],
        "exact_match_chance": 0.00012,
        "overlap_change": [40.0, 3.0],
        "first": [ROW],
        "worst": [ROW | {"number": 9, "question": "Where?"}],
    },
    "forgetting": {
        "what": "facts of general knowledge", "facts": 45, "items": 60, "verdict": "kept", "said": "Nothing\nwas forgotten.",
        "before": {"loss": 2.0, "loss_error": 0.1, "right": 0.9, "right_error": 0.04},
        "after": {"loss": 2.1, "loss_error": 0.1, "right": 0.88, "right_error": 0.05},
        "loss_change": [0.1, 0.2], "chance": 1.0,
    },
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}  # fmt: skip


def cells(card):
    """The texts of all cells of the card's tables, as a reader sees them."""
    tokens = MARKDOWN.parse(ModelCard(card).text)
    return [
        "".join(part.content for part in token.children)
        for before, token in pairwise(tokens)
        if before.type in ("td_open", "th_open")
    ]


def rows(card):
    """The rows of the card's tables, by their first cell."""
    found, row = {}, []
    for token in MARKDOWN.parse(ModelCard(card).text):
        if token.type == "tr_open":
            row = []
        elif token.type == "inline":
            row.append("".join(part.content for part in token.children))
        elif token.type == "tr_close":
            found[row[0]] = row[1:]
    return found


def test_the_front_matter_is_what_the_hub_s_library_reads():
    data = ModelCard(model_card(WHOLE)).data.to_dict()
    assert data == {
        "base_model": "owner/a-model-1.5B", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", "lora", "qlora"],
    }  # fmt: skip
    full = ModelCard(model_card(WHOLE | {"settings": asdict(Settings(method="full"))})).data.to_dict()
    assert full["library_name"] == "transformers" and full["tags"] == ["sft", "trl"]


@pytest.mark.parametrize("base", ["tiny-llama", "/home/me/tiny-llama", "C:\\models\\tiny-llama", "a/b: c\n- d"])
def test_a_base_that_is_not_on_the_hub_is_not_named_in_the_front_matter(base):
    card = model_card(WHOLE | {"model": base})
    assert ModelCard(card).data.base_model is None
    assert "/home/me" not in card and "models" + "\\" not in card


def test_every_figure_of_the_report_is_in_the_card_and_no_folder():
    card = model_card(WHOLE)
    found = rows(card)
    assert {name: found[name] for name in (
        "file", "form", "chats trained on", "their tokens", "tokens of their answers", "rows left out", "developer became system", "chats for validation",
        "chats for the scores below", "optimizer steps", "LoRA rank", "peak learning rate", "trained parameters",
        "weights kept from step", "device", "seconds of training", "seconds in all", "peak memory, predicted",
        "peak memory, measured", "validation loss", "loss, nats per token", "exact match", "overlap (chrF, of 100)",
        "answers cut off", "right, of 4 choices", "torch", "Who?", "Where?",
    )} == {
        "file": ["mine.csv"], "form": ["question-answer"], "chats trained on": ["321"], "their tokens": ["45,678"],
        "tokens of their answers": ["9,876"],
        "rows left out": ["3"], "developer became system": ["2 rows"], "chats for validation": ["17"],
        "chats for the scores below": ["40"], "optimizer steps": ["12"], "LoRA rank": ["8"], "peak learning rate": ["0.001"],
        "trained parameters": ["1,000 of 50,000"], "weights kept from step": ["20"], "device": ["Tesla T4"],
        "seconds of training": ["61"], "seconds in all": ["100"], "peak memory, predicted": ["2.50 GiB"],
        "peak memory, measured": ["3.00 GiB"], "validation loss": ["3.250", "3.000"],
        "loss, nats per token": ["2.000 ± 0.100", "2.100 ± 0.100", "60 facts and texts"],
        "exact match": ["25.0% ± 7.9%", "75.0% ± 7.9%", "30 short answers"],
        "overlap (chrF, of 100)": ["21.5 ± 2.2", "61.5 ± 2.2", "10 longer answers"],
        "answers cut off": ["7", "1", "of 40"], "right, of 4 choices": ["90.0% ± 4.0%", "88.0% ± 5.0%", "45 facts of general knowledge"],
        "torch": ["2.13.0"], "Who?": ["Ann.", "Ben", "Cy"], "Where?": ["Ann.", "Ben", "Cy"],
    }  # fmt: skip
    assert (
        len(found["training loss"]) == 8
        and found["training loss"][0] == "3.900"
        and found["training loss"][-1] == "1.000"
    )
    text = " ".join(card.split())
    for said in (
        "2.500 ± 0.125",
        "-1 ± 0.2",
        "would match 1.2%",
        "probability of 0.00012",
        "Nothing was forgotten.",
        "No licence is stated",
    ):
        assert said in text
    assert "secret" not in card and "someone" not in card


def test_what_was_not_measured_is_said_or_left_out():
    card = model_card({"model": "owner/m", "settings": {"method": "lora"}})
    found = rows(card)
    for name in ("chats trained on", "device", "seconds of training", "peak memory, measured"):
        assert found[name] == ["not measured"]
    assert "Answers and loss were not measured." in card and "what its base knew was not measured." in card
    assert "Sample answers" not in card and "Versions" not in card and "None" not in card.replace("=None", "")
    broken = WHOLE["scores"] | {"after": SCORES | {"loss": None, "loss_error": None}, "loss_change": [None, None]}
    assert "| not a finite number |" in model_card(WHOLE | {"scores": broken})


@pytest.mark.parametrize("name", ["model", "settings"])
def test_a_report_without_its_base_or_settings_is_refused(name):
    with pytest.raises(ValueError, match=rf"^report\['{name}'\] is missing"):
        model_card({key: value for key, value in WHOLE.items() if key != name})


HOSTILE = [
    "a | b || c", "`code` and ``more``", "<script>alert(1)</script>", "[x](http://y.example) ![i](z)", "**b** _i_ ~~s~~ # h",
    "$x$ and $$y$$", "&lt; &amp; &copy;", "back\\slash \\| end\\", "http://a.example www.b.example c@d.example", "---", "- [ ] x",
    "<!-- --> <br>", "1. one", "| --- |", ":smile:", "mailto:a", "@someone",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_of_the_user_s_is_shown_as_it_is(text):
    row = ROW | dict.fromkeys(("question", "right", "before", "after"), text)
    report = WHOLE | {"scores": WHOLE["scores"] | {"first": [row], "worst": []}, "data_form": text}
    card = model_card(report)
    assert cells(card).count(text) == 5
    assert len(cells(card)) == len(cells(model_card(WHOLE))) - 8  # the worst row and its head are gone, nothing else
    html = MARKDOWN.render(ModelCard(card).text)
    assert "<script>" not in html and "<a " not in html and "<img" not in html and "<!--" not in html
    # what some sites make a link, a formula or an emoji of is escaped, too
    assert not re.search(
        r"(?<!\\)://|(?<!\\)\$|www\.|(?<!\\)@\w|(?<!\\):\w+:|mailto:", card.partition("## How to load")[0]
    )


@pytest.mark.parametrize(
    "text",
    [
        "KL 0.0021 nats per token: 1.4% of what the adapter changes.", "sha256:1f2e", "q_proj, v_proj in my_run/adapter",
        "Tuesday to Saturday, 9:30 am to 6 pm!", "a < b > c, 3 * 4 = 12, ~ 5", "C# & C++ (see above); what? no. 50%", "C:\\models\\a",
    ],
)  # fmt: skip
def test_what_markdown_shows_as_it_is_anyway_is_not_escaped(text):
    assert card_text(text) == text
    assert text in cells(model_card(WHOLE | {"data_form": text}))


SIGNS = ["a", "b1", *" \\`*_[]()<>#|~$&;:@!-+/"]


def test_any_signs_are_shown_as_they_are_in_a_cell_a_point_and_a_heading():
    github = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    chance = random.Random(0)
    for _ in range(5_000):
        text = "".join(chance.choices(SIGNS, k=chance.randint(1, 10))).strip() or "a"
        escaped = card_text(text)
        for before, name in (("| a |\n|---|\n| ", "td_open"), ("Said: ", "paragraph_open"), ("# ", "heading_open")):
            tokens = github.parse(f"{before}{escaped}{' |' * (name == 'td_open')}")
            found = [after for token, after in pairwise(tokens) if token.type == name]
            assert [child.type for child in found[0].children if child.type not in ("text", "text_special")] == [], text
            shown = "".join(child.content for child in found[0].children).removeprefix("Said: ")
            assert shown == text, (text, escaped)


def test_hidden_characters_long_texts_and_line_ends_are_made_visible():
    row = ROW | {"question": "a\nb\x1b[31m\u202e", "right": "", "before": "x" * 1000, "after": "---\nlicense: mit\n---"}
    card = model_card(WHOLE | {"scores": WHOLE["scores"] | {"first": [row]}, "data_file": "we|ird`name\n.csv"})
    found = rows(card)
    assert found["a⏎b\\x1b[31m\\u202e"] == [
        "(nothing)", "x" * 300 + "… (1,000 characters)", "---⏎license: mit⏎---",
    ]  # fmt: skip
    assert found["file"] == ["we|ird`name⏎.csv"]
    assert ModelCard(card).data.license is None


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("base", ["owner/m", 'a "quoted" folder'])
def test_the_code_of_the_card_is_python_and_names_what_there_is(method, base):
    card = model_card(WHOLE | {"model": base, "settings": asdict(Settings(method=method))})
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        tree = ast.parse(block)
        exec("\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)), {})
    assert ("PeftModel" in blocks[0]) == (method != "full") and ("BitsAndBytesConfig" in blocks[0]) == (
        method == "qlora"
    )
    assert (json.dumps(base) in blocks[1]) == (method != "full")
    assert ("float16" in blocks[0]) == (method == "qlora")  # the t4 gear's


def test_the_card_says_where_a_base_that_was_fetched_is():
    card = model_card(WHOLE | {"model": "smollm2-135m"})
    assert "`python -m qlora_helpers fetch smollm2-135m` says where smollm2-135m is on a disk: write that path" in card
    assert "tiny-llama is a folder: write its path there." in model_card(WHOLE | {"model": "tiny-llama"})
