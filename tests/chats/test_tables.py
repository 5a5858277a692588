"""Rows are taken out of whatever holds them, and what cannot be is said with its place."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qlora_helpers.chats.forms import known
from qlora_helpers.chats.messages import ChatError
from qlora_helpers.chats.tables import read_table

ROWS = [{"question": "Where?", "answer": "Here."}, {"question": "When?", "answer": "Now;\nat, once"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.fixture
def table(tmp_path):
    """The table in a file with this content."""

    def read(content, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return read_table(path, known)

    return read


@pytest.fixture
def fault(table):
    """What is said of a file that cannot be read as a whole."""

    def read(content, name="rows.csv"):
        with pytest.raises(ChatError) as caught:
            table(content, name)
        assert str(caught.value).startswith("path='") and name in str(caught.value)
        return str(caught.value).partition("': ")[2]

    return read


# JSON


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (LINES, "JSONL"),
        (LINES.replace("\n", "\r\n"), "JSONL"),
        (LINES.replace("\n", "\r"), "JSONL"),
        (f"\n\n{LINES}\n\n", "JSONL"),
        (json.dumps(ROWS), "JSON"),
        (json.dumps(ROWS, indent=2), "JSON"),
        (json.dumps(ROWS, indent="\t").replace("\n", "\r\n"), "JSON"),
        (LINES.replace("\n", ""), "JSON, one object after another"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "JSON, one object after another"),
        (json.dumps({"version": 1, "data": ROWS}), 'JSON, under "data"'),
        (json.dumps({"data": ROWS}, indent=2), 'JSON, under "data"'),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows"])
def test_json_in_every_layout_and_under_any_name(content, container, name, table):
    found = table(content, name)
    assert (list(found.rows.values()), found.container, found.faults) == (ROWS, container, {})
    assert found.row_name == ("line" if container == "JSONL" else "row") and found.plain == (container == "JSONL")


def test_one_object_is_one_row(table):
    for layout in (None, 2):
        assert list(table(json.dumps(ROWS[0], indent=layout), "rows.json").rows.values()) == ROWS[:1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[\n{"question":"a"},\n]', "not JSON: "),
        (b'[{"question":"a"}', "not JSON: "),
        (b'[{"question": NaN}]', "not JSON: NaN is no value of JSON"),
        (b'[{"a": 1, "a": 2}]', "not JSON that can be trusted: the key 'a' is there twice"),
        (b"[" * 100_000, "not JSON that Python reads: it is nested too deeply"),
        (b"[" + b"9" * 5_000 + b"]", "not JSON that Python reads: Exceeds the limit (4300 digits)"),
        (b'["\x81"]', "byte 3 (0x81) is not UTF-8"),
        (b"[]", "there is no row in it"),
        (b"\0\0", "it has a NUL in every few bytes"),
        (b'{"question": ["a", "b"], "answer": ["x", "y"]}', "it is one object of columns: write an object for each row"),
        (b'{"question": {"0": "a"}, "answer": {"0": "x"}}', "it is one object of columns: write an object for each row"),
        (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', 'it holds rows under several keys ("train", "test")'),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read_says_why(content, said, fault):
    assert fault(content, "rows.json").startswith(said)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_broken_utf_16_is_a_fault_of_the_file_and_not_of_each_line(name, fault):
    assert fault(LINES.encode("utf-16-le"), name).startswith(
        "it has a NUL in every few bytes, as UTF-16 without its mark"
    )
    assert fault(LINES.encode("utf-16")[:-1], name).startswith("its mark says UTF-16, but byte ")


def test_a_place_in_long_json_is_named_by_line_and_column(fault):
    content = json.dumps(ROWS, indent=1).replace('"When?"', "When?")
    assert fault(content, "rows.json") == "not JSON: Expecting value at line 7, column 15"


# CSV


@pytest.mark.parametrize(("delimiter", "container"), [(",", "CSV, commas"), (";", "CSV, semicolons"), ("\t", "TSV")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_delimiter_and_the_line_ends_are_found(delimiter, container, end, table):
    cells = [("id", "question", "answer"), ("007", "a, b; c\td", 'she said ""no""'), ("NA", "x", "")]
    content = end.join(delimiter.join(f'"{cell}"' for cell in row) for row in cells) + end
    found = table(content)
    assert found.container == container and not found.faults and not found.changed
    assert found.rows == {
        1: {"id": "007", "question": "a, b; c\td", "answer": 'she said "no"'},
        2: {"id": "NA", "question": "x", "answer": ""},
    }


def test_a_delimiter_in_the_texts_does_not_count(table):
    assert table("question;answer\na, b, c, d;e, f\n").rows == {1: {"question": "a, b, c, d", "answer": "e, f"}}
    assert table("sep=|\r\nquestion|answer\r\na;b|c,d\r\n").rows == {1: {"question": "a;b", "answer": "c,d"}}


def test_what_excel_writes(table):
    found = table('\ufeffFrage;Antwort;\r\nWann?;"Heute;\r\njetzt";\r\n;;\r\n\r\n'.encode())
    assert found.rows == {1: {"Frage": "Wann?", "Antwort": "Heute;\njetzt", "column 3": ""}}
    assert found.changed == {r"line end \r\n in a text became \n": 1, "empty row was left out": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,b,c", "the header has 2 columns, and this row 3: put a text with ','"),
        ("a", "the header has 2 columns, and this row 1: put a text with ','"),
        ('"a "b" c",d', "a quote inside a quoted text is not doubled"),
        ('"a", "b"', "a quoted text begins with a space before its quote"),
    ],
)
def test_a_bad_row_of_a_csv_is_named_and_the_next_is_read(row, said, table):
    found = table(f"question,answer\nx,y\n{row}\nv,w\n")
    assert list(found.rows) == [1, 3] and found.faults[2].startswith(said)


def test_a_quote_that_never_ends_is_named_where_it_begins(table):
    found = table('question,answer\nx,y\nv,"w\nx,y\nx,y\n')
    assert list(found.rows) == [1] and found.faults == {2: "a text begins with a quote that never ends"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there is no chat in this file"),
        (b"\xef\xbb\xbf \n", "there is no chat in this file"),
        (b"question,answer\n", 'there is no row below its header ("question", "answer")'),
        (b"question,answer,answer\na,b,c\n", 'the column "answer" is there twice: rename or remove one'),
        (b"question,answer\na\0b,c\n", "byte 18 is NUL, so it is no text file"),
        (b'"question,answer\na,b\n', "its header cannot be read: a text begins with a quote that never ends"),
        (b"question,answer\n\x81,c\n", "byte 17 (0x81) is not UTF-8"),
        (b"PK\x03\x04 and more", "this is a zip file, as an Excel workbook is: save the sheet as CSV in UTF-8"),
        (b"%PDF-1.7", "this is a PDF"),
        (b"ARROW1\0\0", "this is an Arrow file"),
    ],
)
def test_a_file_that_is_no_table_says_why(content, said, fault):
    assert fault(content).startswith(said)


def test_a_cell_of_10_mb_is_read_and_the_limit_of_csv_is_left_as_it_was(table):
    import csv

    before = csv.field_size_limit()
    assert len(table(b"question,answer\n" + b"x" * 10**7 + b",y\n").rows[1]["question"]) == 10**7
    assert csv.field_size_limit() == before


# gzip


@pytest.mark.parametrize(("content", "inside"), [(LINES, "JSONL"), ("question,answer\na,b\n", "CSV, commas")])
def test_gzip_is_unpacked(content, inside, table):
    found = table(gzip.compress(content.encode()), "rows.gz")
    assert found.container == f"{inside}, gzip" and found.rows and not found.plain


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b""), "there is no chat in this file"),
        (gzip.compress(LINES.encode())[:-9], "its gzip is damaged (Compressed file ended"),
        (b"\x1f\x8bnothing", "its gzip is damaged ("),
        (gzip.compress(gzip.compress(b"")), "it is packed with gzip twice"),
    ],
    ids=["nothing", "cut off", "no gzip", "twice"],  # gzip writes the time, and workers must give a test one name
)
def test_gzip_that_cannot_be_read(content, said, fault):
    assert fault(content, "rows.jsonl.gz").startswith(said)


# parquet and the folders of datasets

CHATS = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3


def test_parquet_with_only_the_columns_that_a_form_can_have(tmp_path, table):
    path = tmp_path / "rows.parquet"
    columns = {"thread": CHATS, "Question": ["a", None, "c"], "embedding": [[0.5]] * 3, "n": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = read_table(path, known)
    assert found.rows[2] == {"thread": CHATS[1], "Question": None} and list(found.rows) == [1, 2, 3]
    assert (found.unread, found.container) == (["embedding", "n"], "parquet")
    assert table(gzip.compress(path.read_bytes()), "p.gz").rows == found.rows


def test_parquet_that_cannot_be_read(tmp_path, fault):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": pyarrow.array([], "string")}), path)
    assert fault(path.read_bytes(), "p.parquet") == "there is no row in it"
    assert fault(b"PAR1" + b"x" * 50, "p.parquet").startswith("its parquet cannot be read (")
    assert fault(path.read_bytes()[:-9], "p.parquet").startswith("its parquet cannot be read (")


def test_a_text_of_parquet_that_is_not_utf_8_is_a_fault_of_its_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"], "binary").view("string")
    pyarrow.parquet.write_table(pyarrow.table({"question": texts}), tmp_path / "rows.parquet")
    found = read_table(tmp_path / "rows.parquet", known)
    assert list(found.rows) == [1, 3] and found.faults[2].startswith("it cannot be read ('utf-8' codec can't decode")


def test_a_folder_of_datasets_is_read_in_its_order(tmp_path):
    rows = datasets.Dataset.from_list(
        [{"question": str(number), "answer": "x", "n": number} for number in range(2_500)]
    )
    rows.select([3, 1, 2]).with_format("torch").save_to_disk(tmp_path / "some")
    found = read_table(tmp_path / "some", known)
    assert [row["question"] for row in found.rows.values()] == ["3", "1", "2"]
    assert (found.unread, found.container, found.row_name) == (["n"], "dataset folder", "row")
    rows.save_to_disk(tmp_path / "all")
    assert [row["question"] for row in read_table(tmp_path / "all", known).rows.values()] == [
        str(n) for n in range(2_500)
    ]


def test_a_split_is_named_by_its_folder_unless_there_is_only_one(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    with pytest.raises(
        ChatError, match=r"is a dataset of several splits \(train, test\): name the folder of one, such as '.*train'"
    ):
        read_table(tmp_path / "two", known)
    assert list(read_table(tmp_path / "two" / "test", known).rows.values()) == ROWS[1:]
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    assert read_table(tmp_path / "one", known).container == "dataset folder, split train"


def test_other_folders_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"it is a folder, but not one .* wrote\): name a file of [^']*$"):
        read_table(tmp_path, known)
    for name in ("notes.txt", "z.csv", "faq.CSV"):
        (tmp_path / name).touch()
    with pytest.raises(IsADirectoryError, match=r"or parquet, such as '.*faq\.CSV'$"):
        read_table(tmp_path, known)
    (tmp_path / "dataset_dict.json").write_text("[")
    with pytest.raises(ChatError, match=r"its dataset_dict\.json is damaged"):
        read_table(tmp_path, known)
    (tmp_path / "dataset_dict.json").write_text('{"splits": []}')
    with pytest.raises(ChatError, match=r"its dataset_dict\.json names no splits"):
        read_table(tmp_path, known)
    folder = tmp_path / "some"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    next(folder.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(ChatError, match=r"path='.*some': this dataset cannot be read \(\w+: "):
        read_table(folder, known)
