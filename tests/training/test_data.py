"""Files of training data: both forms of conversations, texts, and what is refused, by file, line and reason."""

import json

import pytest

from qwen1.training.data import parse_conversation, read_conversations, read_texts
from qwen1.training.errors import DataError

TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "你好"), ("assistant", "您好")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
PUBLISHED = {"id": "identity_0", "conversations": [{"from": role, "value": text} for role, text in TURNS]}
SYSTEM = {"role": "system", "content": ""}
GOOD = json.dumps({"messages": MESSAGES})


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def chat(*roles, key="messages", names=("role", "content")):
    return {key: [{names[0]: role, names[1]: "text"} for role in roles]}


# --- conversations ---


def test_published_list(write):
    assert read_conversations(write(json.dumps([PUBLISHED, PUBLISHED], indent=2))) == [MESSAGES, MESSAGES]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "no_suffix"])
def test_lists_and_lines_are_told_apart_by_content(write, name):
    record = {"messages": [SYSTEM, *MESSAGES]}
    expected = [[SYSTEM, *MESSAGES], MESSAGES]
    assert read_conversations(write(json.dumps([record, PUBLISHED]), name)) == expected
    lines = f"\n{json.dumps(record)}\r\n \n{json.dumps(PUBLISHED, ensure_ascii=False)}"
    assert read_conversations(write(lines, name)) == expected
    assert read_conversations(write("\ufeff" + lines, name)) == expected  # a byte order mark


def test_names_of_roles_that_others_use():
    published = parse_conversation(chat("human", "gpt", key="conversations", names=("from", "value")))
    assert published == [{"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}]
    turns = parse_conversation(chat("system", "human", "gpt", "user", "assistant"))
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]


def test_line_separators_of_unicode_end_no_line(write):
    record = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, MESSAGES[1]]}
    assert read_conversations(write(json.dumps(record, ensure_ascii=False)))[0][0]["content"] == "a\u2028b\x85c"


BAD_RECORDS = {
    "no object": (["a"], "a record must be an object, got ['a']"),
    "number": (3, "a record must be an object, got 3"),
    "no key": ({"text": "a"}, "found none of them, but ['text']"),
    "both keys": ({**PUBLISHED, "messages": MESSAGES}, "'instruction'; found 'conversations' and 'messages'"),
    "no turns": ({"messages": []}, "'messages' must be a list with a user's and an assistant's turn, got []"),
    "no list": ({"conversations": "hi"}, "'conversations' must be a list"),
    "turn no object": ({"messages": ["hi"]}, "turn 1 must be an object with 'role' and 'content', got 'hi'"),
    "mixed forms": ({"messages": PUBLISHED["conversations"]}, "turn 1 must be an object with 'role' and 'content'"),
    "no content": ({"messages": [MESSAGES[0], {"role": "assistant"}]}, "turn 2 must be an object with"),
    "unknown role": (chat("user", "bot"), "turn 2 has the unknown role 'bot': use system, user, assistant or tool"),
    "role no text": (chat("user", ["assistant"]), "turn 2 has the unknown role ['assistant']"),
    "content no text": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]},
        "turn 2: 'content' must be a text, got None",
    ),
    "empty": ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "turn 2 of the assistant is empty"),
    "NUL": ({"messages": [{"role": "user", "content": "a\0"}, MESSAGES[1]]}, "turn 1 holds a NUL character"),
    "no answer": (chat("user"), "no turn is the assistant's, so there is nothing to learn"),
    "system alone": (chat("system"), "no turn is the assistant's"),
    "second system": (chat("user", "assistant", "system"), "turn 3 is a system message: only the first one can be"),
    "assistant first": (chat("assistant", "user"), "turn 1 is the assistant's, expected the user's"),
    "after system": (chat("system", "assistant"), "turn 2 is the assistant's, expected the user's"),
    "twice": (chat("user", "user", "assistant"), "turn 2 is the user's, expected the assistant's"),
    "open end": (chat("user", "assistant", "user"), "the last turn is the user's: add the assistant's answer"),
}


@pytest.mark.parametrize("listed", [True, False], ids=["list", "lines"])
@pytest.mark.parametrize("record, reason", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_named_by_line(write, record, reason, listed):
    path = write(f"[{GOOD},\n\n{json.dumps(record)}]" if listed else f"{GOOD}\n\n{json.dumps(record)}\n")
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert reason in str(error.value)


def test_further_bad_records_are_counted(write):
    with pytest.raises(DataError, match=r"line 2: .*none of them.* \(and 2 more bad records\)$"):
        read_conversations(write(f"{GOOD}\n{{}}\n3\n{GOOD}\n[]"))


def test_long_values_are_shown_in_part(write):
    with pytest.raises(DataError) as error:
        read_conversations(write(json.dumps(["x" * 10_000])))
    assert len(str(error.value)) < len(str(write("a"))) + 200


BAD_FILES = {
    "empty": ("", None, "is empty"),
    "blank": (" \n\n", None, "is empty"),
    "empty list": ("[\n]", None, "has no records: give a JSON list"),
    "not UTF-8": (b"{}\n\xff\xfe", 2, "not UTF-8 (invalid start byte); convert the file"),
    "invalid line": (
        f'{GOOD}\n{{"a" 1}}',
        2,
        "invalid JSON (Expecting ':' delimiter at column 6); expected a JSON list",
    ),
    "indented object": ('{\n"messages": []\n}', 1, "or one JSON object a line"),
    "line too deep": (f"{GOOD}\n{{" + '"a":[' + "[" * 200_000, 2, "invalid JSON"),
    "number too long": (f"{GOOD}\n" + "1" * 5000, 2, "invalid JSON (Exceeds the limit"),
    "invalid record": (f'[{GOOD},\n{{"a" 1}}]', 2, "invalid JSON (Expecting ':' delimiter at column 6)"),
    "record too deep": (f"[{GOOD},\n" + "[" * 200_000, 2, "invalid JSON"),
    "number too long in list": (f"[{GOOD},\n\n" + "1" * 5000 + "]", 3, "invalid JSON (Exceeds the limit"),
    "no comma": (f"[{GOOD}\n{GOOD}]", 2, "invalid JSON (expected ',' or ']' after a record)"),
    "not closed": (f"[{GOOD}\n", 2, "invalid JSON (expected ',' or ']' after a record)"),
    "cut after comma": (f"[{GOOD},\n", 2, "invalid JSON (Expecting value at column 1)"),
    "comma before the end": (f"[{GOOD},\n]", 2, "invalid JSON (Expecting value at column 1)"),
    "two lists": (f"[{GOOD}]\n\n[]", 3, "there is more behind the JSON list"),
}


@pytest.mark.parametrize("content, line, reason", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(write, content, line, reason):
    path = write(content)
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}" if line is None else f"{path}, line {line}: ")
    assert reason in str(error.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_conversations(tmp_path / "none.json")


# --- texts ---


def test_texts_with_blank_lines_between(write):
    content = "\n  first\nsecond line \n\n\n 第二 \r\n \t\r\nthird\n\n"
    assert read_texts(write(content, "data.TXT")) == ["  first\nsecond line ", " 第二 ", "third"]


def test_texts_as_records(write):
    records = [{"text": "a\n\nb"}, {"text": " c", "source": "x"}]
    assert read_texts(write(json.dumps(records))) == ["a\n\nb", " c"]
    assert read_texts(write("\n".join(map(json.dumps, records)), "data.jsonl")) == ["a\n\nb", " c"]


BAD_TEXTS = {
    "no object": ("data.jsonl", '{"text": "a"}\n"b"', 2, "must be an object with a text under 'text', got 'b'"),
    "other key": ("data.jsonl", '{"text": "a"}\n{"content": "b"}', 2, "must be an object with a text under 'text'"),
    "no text": ("data.json", '[{"text": "a"},\n{"text": 1}]', 2, "must be an object with a text under 'text'"),
    "empty text": ("data.jsonl", '{"text": "a"}\n\n{"text": " "}', 3, "the text is empty: leave the record out"),
    "NUL": ("data.jsonl", '{"text": "\\u0000"}', 1, "the text holds a NUL character"),
    "NUL in txt": ("data.txt", "a\n\nb\0", 3, "a NUL character; is this a text file?"),
    "empty": ("data.txt", "\n \n", None, "is empty"),
    "suffix": ("data.csv", "a", None, "is neither .txt (texts with blank lines between them) nor .jsonl"),
}


@pytest.mark.parametrize("name, content, line, reason", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_texts(write, name, content, line, reason):
    path = write(content, name)
    with pytest.raises(DataError) as error:
        read_texts(path)
    assert str(error.value).startswith(f"{path}" if line is None else f"{path}, line {line}: ")
    assert reason in str(error.value)
