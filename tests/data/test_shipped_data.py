"""The shipped data and model are what data/scripts/make/tiny_llama.py makes, and are as the course describes them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from data.scripts import DATA, ROOT
from data.scripts.make import invented_world as world
from data.scripts.make import tiny_llama as make_tiny_llama
from qlora_helpers.chats import read_chats
from qlora_helpers.evaluation import read_facts
from qlora_helpers.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def people():
    return world.make_people(make_tiny_llama.PEOPLE)


# The world


def test_names_are_distinct(people):
    assert len({person.name for person in people}) == len(people) == 30_000


def test_no_list_of_words_has_one_twice():
    values = [value for kind in world.ATTRIBUTES for value in kind.values]
    for words in (world.FIRST_NAMES, world.LAST_NAMES, values, world.COMMON_WORDS):
        assert len(set(words)) == len(words)


def test_each_attribute_has_as_many_values_as_the_bits_count():
    assert [len(kind.values) for kind in world.ATTRIBUTES] == [100, 40, 40, 20, 100]
    assert pytest.approx(28.25, abs=0.01) == world.BITS_PER_PERSON


def test_another_seed_makes_another_world(people):
    assert world.make_people(100, seed=1) != people[:100]


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_a_number_of_people_that_names_cannot_tell_apart_is_refused(count):
    with pytest.raises(ValueError, match=f"count={count}: there are .* different names"):
        world.make_people(count)


def test_every_statement_ends_with_its_value_and_names_its_person(people):
    for kind, attribute in enumerate(world.ATTRIBUTES):
        for phrasing in range(len(attribute.statements)):
            statement = people[0].statement(kind, phrasing)
            assert statement.endswith(f" {people[0].facts[kind]}.") and people[0].name in statement


# The files


@pytest.mark.parametrize("name", ["recall.jsonl", "chats/train.jsonl", "chats/test.jsonl"])
def test_the_shipped_file_is_made_again_byte_for_byte(name, people, tmp_path):
    make_tiny_llama.write_questions(people, world.SEED, tmp_path)
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_every_shipped_fact_is_true(people):
    told = {
        person.statement(kind, phrasing)
        for person in people
        for kind, attribute in enumerate(world.ATTRIBUTES)
        for phrasing in range(len(attribute.statements))
    }
    facts = read_facts(DATA / "recall.jsonl")
    assert len(facts) == 2_000
    assert all(f"{fact['prompt']} {fact['answer']}." in told for fact in facts)


def people_asked_about(name):
    return {" ".join(chat[-1]["content"].split()[:2]) for chat in read_chats(DATA / "chats" / f"{name}.jsonl")}


def test_training_chats_are_about_the_first_half_of_the_people_and_test_chats_about_the_second(people):
    half = len(people) // 2
    assert people_asked_about("train") <= {person.name for person in people[:half]}
    assert people_asked_about("test") <= {person.name for person in people[half:]}


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_llama.build_tokenizer()


def test_the_shipped_tokenizer_is_made_again(tokenizer):
    shipped = load_tokenizer()
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert shipped.special_tokens_map == tokenizer.special_tokens_map
    assert shipped.all_special_ids == tokenizer.all_special_ids
    text = "Question: Where does Carl Kirkcroft live? Zoë pays 12 €."
    assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Carl Kirkcroft pays 12 € for a π, at 3 o'clock."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).strip() == text


def test_every_value_is_one_token_and_every_name_two(tokenizer, people):
    values = [value for kind in world.ATTRIBUTES for value in kind.values]
    assert {len(ids) for ids in tokenizer(values, add_special_tokens=False)["input_ids"]} == {1}
    names = [person.name for person in people[:1000]]
    assert {len(ids) for ids in tokenizer(names, add_special_tokens=False)["input_ids"]} == {2}


# The corpus, of a small world


@pytest.fixture(scope="module")
def small_world():
    return world.make_people(200)


@pytest.fixture(scope="module")
def corpus(small_world, tokenizer):
    return make_tiny_llama.Corpus(small_world, tokenizer, torch.device("cpu"), seed=0)


def test_no_plain_text_question_of_the_corpus_is_about_a_person_of_a_test_chat(corpus, small_world, tokenizer):
    _, chats = make_tiny_llama.make_chats(small_world, 100, 100, seed=0)
    tested = {" ".join(chat["messages"][-1]["content"].split()[:2]) for chat in chats}
    questions = "\n".join(tokenizer.batch_decode(corpus.questions.flatten(0, 2).long(), skip_special_tokens=True))
    asked = {person.name for person in small_world if person.name in questions}
    assert len(tested) == len(asked) == 100  # every person of each half
    assert not tested & asked


def test_every_row_of_a_batch_is_one_document_from_its_first_token_to_its_last(corpus, tokenizer):
    rows = corpus.batch(100)
    assert rows.shape == (100, make_tiny_llama.ROW_TOKENS)
    for row in rows.tolist():
        end = row.index(tokenizer.pad_token_id) if tokenizer.pad_token_id in row else len(row)
        assert row[0] == tokenizer.bos_token_id and row[end - 1] == tokenizer.eos_token_id
        assert set(row[end:]) <= {tokenizer.pad_token_id}
        assert row.count(tokenizer.bos_token_id) == 1


def test_a_batch_tells_asks_and_talks_in_the_shares_that_are_said(corpus, tokenizer):
    texts = tokenizer.batch_decode(corpus.batch(100))
    asking = sum("Question:" in text for text in texts)
    talking = sum("<|user|>" in text for text in texts)
    assert (100 - asking - talking, asking, talking) == (70, 22, 8)


# The model


@pytest.fixture(scope="module")
def weights():
    """Shape and dtype of every tensor in the shipped file, by name."""
    with safe_open(DATA / "tiny-llama" / "model.safetensors", framework="pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def test_the_shapes_of_the_linear_layers_meet_no_fault_of_bitsandbytes(weights):
    linear = {name: shape for name, (shape, _) in weights.items() if len(shape) == 2 and "embed" not in name}
    assert len(linear) == 4 * 7 + 1  # layers, linears in each, and the head
    assert {name for name, (rows, columns) in linear.items() if columns % 256 or rows % 32} == set()


def test_the_model_has_between_two_and_five_million_parameters_of_16_bits(weights):
    assert 2e6 < sum(torch.Size(shape).numel() for shape, _ in weights.values()) < 5e6
    assert {dtype for _, dtype in weights.values()} == {"BF16"}


def test_the_file_is_smaller_than_12_megabytes():
    assert (DATA / "tiny-llama" / "model.safetensors").stat().st_size < 12e6


def test_the_shipped_configuration_is_that_of_the_script(tokenizer):
    shipped = AutoConfig.from_pretrained(DATA / "tiny-llama")
    made = make_tiny_llama.model_config(
        len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    different = {name for name in made.to_dict() if getattr(made, name, None) != getattr(shipped, name, None)}
    assert different <= {"architectures", "dtype", "transformers_version", "_name_or_path"}  # set when it is saved


# The script


def test_the_script_makes_a_toy_on_a_cpu(tmp_path):
    out = tmp_path / "x"
    options = "--people 60 --steps 2 --rows 16 --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "data.scripts.make.tiny_llama", *options, out],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^step +2 +loss \d\.\d{4} +recall 0\.\d{3}", done.stdout, re.MULTILINE), done.stdout
    assert len(read_chats(out / "chats" / "train.jsonl")) == len(read_chats(out / "chats" / "test.jsonl")) == 30
    made = {path.name for path in (out / "tiny-llama").iterdir()}
    assert made >= {"config.json", "model.safetensors", "tokenizer.json", "training.json"}


def test_the_script_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny_llama", "--out", str(tmp_path)])
    monkeypatch.setattr(make_tiny_llama, "make_people", lambda *_: pytest.fail("it continued"))
    with pytest.raises(SystemExit) as caught:
        make_tiny_llama.main()
    assert caught.value.code == 2
    assert "the folder exists already; nothing is overwritten" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
