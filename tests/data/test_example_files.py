"""The example files are what their script makes, and show what they should; one is written by hand, as a shop has it."""

from data.scripts import DATA
from data.scripts.make import example_files
from qlora_helpers.chats import read_chats, read_file

BY_HAND = "shop.csv"


def test_the_shipped_files_are_what_the_script_makes(tmp_path):
    example_files.main(tmp_path)
    shipped = {path.name: path.read_bytes() for path in (DATA / "examples").iterdir() if path.name != BY_HAND}
    assert shipped == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and len(shipped) == 3


def test_each_file_holds_other_questions_all_of_them_from_the_training_chats():
    known = {chat[-2]["content"] for chat in read_chats(DATA / "chats" / "train.jsonl")}
    texts = example_files.made()
    found = {name: {question for question in known if question in text} for name, text in texts.items()}
    assert [len(questions) for questions in found.values()] == [60, 60, 20]
    assert len(set.union(*found.values())) == 140


def test_four_rows_of_the_third_file_cannot_be_used():
    file = read_file(DATA / "examples" / "people_sharegpt.jsonl", on_bad="drop")
    assert len(file.dropped) == len(file.kinds_of_faults()) == 4 and len(file.chats) == 16


def test_the_shop_s_file_is_as_messy_as_a_real_one():
    file = read_file(DATA / "examples" / BY_HAND, on_bad="drop")
    assert len(file.chats) + len(file.dropped) == 60
    assert file.dropped == {57: '"Answer" is empty'}
    texts = [tuple(message["content"] for message in chat) for chat in file.chats]
    assert len(texts) - len(set(texts)) == 3
    assert len({asked for asked, _ in texts}) == len(set(texts))  # and no question has two answers
