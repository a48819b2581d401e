"""Several files of data, weights, evaluation held out, and files that are larger than what memory may take."""

import json
import pickle
import tracemalloc
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from qwen1.training import files, sources
from qwen1.training.data import read_conversations, read_items
from qwen1.training.errors import DataError
from qwen1.training.examples import IGNORED, encode_all
from qwen1.training.mixing import WeightedRows, make_rows
from qwen1.training.packing import ExampleDataset
from qwen1.training.sources import Part, read_data
from qwen1.training.store import ExampleStore

EXAMPLES = [
    {"input_ids": [257, 0, 5, 256], "labels": [IGNORED, IGNORED, 5, 256]},
    {"input_ids": [0], "labels": [0]},
    {"input_ids": [7, 2**31 - 1], "labels": [IGNORED, IGNORED]},
]


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def write(tmp_path):
    """Write a file of conversations: (name, *answers) -> its name."""

    def write(name, *answers):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(conversation("q", answer)) for answer in answers))
        return str(path)

    return write


def plain(examples):
    return [{key: list(map(int, values)) for key, values in example.items()} for example in examples]


def answers(examples):
    """What is learnt of each example, as text."""
    return [bytes(label for label in example["labels"] if 0 <= label < 256).decode() for example in examples]


# --- a piece at a time ---


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_lists_are_read_alike_whatever_the_pieces(tmp_path, monkeypatch, piece, indent):
    records = [conversation('é你\\"好😀', "a\u2028b" * n) for n in range(1, 5)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records, indent=indent) + "\n")
    expected = read_conversations(path)
    monkeypatch.setattr(files, "_PIECE", piece)
    assert read_conversations(path) == expected == [record["messages"] for record in records]
    read = []
    list(read_items(path, plain_texts=False, advanced=read.append))
    assert sum(read) == path.stat().st_size


BAD_LISTS = {
    "no comma": ('[{"a": 1}\n {"b": 2}]', "line 2: invalid JSON (expected ',' or ']' after a record)"),
    "bad value": ('[{"a": 1},\n {"b" 2}]', "line 2: invalid JSON (Expecting ':' delimiter at column 7)"),
    "bad value on a long line": ('[{"a": 1}, {"b" 2}]', "line 1: invalid JSON (Expecting ':' delimiter at column 17)"),
    "cut": ('[{"a": 1},\n {"b', "line 2: invalid JSON (Unterminated string starting at at column 3)"),
    "not UTF-8": (b'[{"a": 1},\n {"b": "\xe4\xbd"}]', "line 2: not UTF-8"),
    "number": ("[123,\n 4]", "line 1: a record must be an object, got 123 (and 1 more bad records)"),
}


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("content, reason", BAD_LISTS.values(), ids=BAD_LISTS)
def test_errors_have_their_places_whatever_the_pieces(tmp_path, monkeypatch, piece, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(files, "_PIECE", piece)
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}, {reason}")


# --- the store ---


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_stored_is_read(tmp_path, on_disk):
    store = ExampleStore(tmp_path / "tokens" if on_disk else None)
    for example in EXAMPLES:
        store.append(example)
    store.finish()
    assert plain(store) == plain(store[:]) == EXAMPLES and plain([store[-1]]) == EXAMPLES[-1:]
    assert (len(store), store.tokens, store.learnt) == (3, 7, 2)
    assert store.lengths().tolist() == [4, 1, 2] and store.lengths(1, 2).tolist() == [1]
    assert plain(pickle.loads(pickle.dumps(store))) == EXAMPLES  # as workers get it
    with pytest.raises(IndexError):
        store[3]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_stores_of_other_examples_have_another_checksum():
    def checksum(*examples):
        store = ExampleStore()
        for example in examples:
            store.append(example)
        return store.checksum

    assert checksum(*EXAMPLES) == checksum(*EXAMPLES) != checksum(*EXAMPLES[::-1])
    assert checksum(EXAMPLES[1]) != checksum({"input_ids": [0], "labels": [IGNORED]})


def test_workers_read_the_file_themselves(tmp_path):
    store = ExampleStore(tmp_path / "tokens")
    for number in range(40):
        store.append({"input_ids": [number] * (number + 1), "labels": [number] * (number + 1)})
    store.finish()
    loader = DataLoader(ExampleDataset(store), num_workers=2, collate_fn=list, multiprocessing_context="fork")
    assert [row["input_ids"].tolist() for (row,) in loader] == [[n] * (n + 1) for n in range(40)]


@pytest.mark.parametrize("listed", [False, True], ids=["lines", "list"])
def test_memory_stays_flat_however_large_the_file_is(tmp_path, byte_tokenizer, listed, monkeypatch):
    """What reading and encoding take at most is a small part of the file, and doesn't grow with it."""
    monkeypatch.setattr(files, "_PIECE", 2**14)
    monkeypatch.setattr(sources, "_MOST_CHARACTERS", 2**13)
    record = json.dumps(conversation("question " * 100, "answer " * 100))

    def peak(kilobytes, folder):
        path, count = tmp_path / f"{kilobytes}.json", kilobytes * 2**10 // len(record)
        with path.open("w") as file:
            file.write("[" * listed)
            file.writelines(f"{record}{',' * (listed and number < count - 1)}\n" for number in range(count))
            file.write("]" * listed)
        tracemalloc.start()
        read = read_data(byte_tokenizer, [str(path)], max_length=4096, seed=0, folder=folder)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(read.examples) == count and len(read.examples[count - 1]["input_ids"]) > 1600
        read.close()
        return most

    peak(64, tmp_path)
    small, large = peak(300, tmp_path), peak(1200, tmp_path)
    assert large < 900 * 2**10 and large < 1.1 * small
    assert peak(1200, None) > 4 * large  # as the tokens do in memory


# --- several files ---


def test_files_follow_one_another(tmp_path, byte_tokenizer, write):
    names = [write("a.jsonl", "one", "two"), write("b.jsonl", "three")]
    said = []
    read = read_data(byte_tokenizer, names, max_length=64, seed=0, say=said.append)
    assert answers(read.examples) == ["one", "two", "three"] and read.held_out is None
    assert read.parts == [Part(names[0], 2), Part(names[1], 1)]
    expected = encode_all(byte_tokenizer, [m for name in names for m in read_conversations(name)], 64, progress=False)
    assert plain(read.examples) == plain(expected.examples)
    tokens = sum(len(example["input_ids"]) for example in expected.examples[:2])
    assert said[0] == f"{names[0]}: 2 conversations, {tokens:,} tokens, 8 of them with a loss."
    assert said[1].startswith(f"{names[1]}: 1 conversation, ")


def test_what_is_left_out_is_said(tmp_path, byte_tokenizer):
    path = tmp_path / "data.jsonl"
    long = conversation("q", "a")
    long["messages"] = long["messages"] + conversation("q", "b" * 90)["messages"]
    path.write_text("\n".join(map(json.dumps, [conversation("q", "a"), {**conversation("q", "c" * 90)}, long])))
    said = []
    read_data(byte_tokenizer, [str(path)], max_length=80, seed=0, say=said.append)
    assert (
        "1 left out, because not even the first answer fits into --model_max_length 80 (the first on line 2)" in said[0]
    )
    assert "1 without their last turns, which don't fit into --model_max_length 80" in said[0]
    texts = tmp_path / "texts.txt"
    texts.write_text("short\n\n" + "long " * 40)
    read_data(byte_tokenizer, [str(texts)], plain_texts=True, max_length=80, seed=0, say=said.append)
    assert said[1].startswith(f"{texts}: 2 texts, 20") and "1 cut into pieces of --model_max_length 80." in said[1]


def test_the_first_token_of_a_text_has_no_loss(tmp_path, byte_tokenizer):
    path, said = tmp_path / "texts.txt", []
    path.write_text("a\n\nbc")
    read_data(byte_tokenizer, [str(path)], plain_texts=True, max_length=8, seed=0, say=said.append)
    assert said == [f"{path}: 2 texts, 5 tokens, 3 of them with a loss."]


def test_keys_that_are_not_read_are_said(tmp_path, byte_tokenizer):
    path, said = tmp_path / "data.jsonl", []
    path.write_text(json.dumps(conversation("q", "a") | {"sytem": "Be brief."}))
    read_data(byte_tokenizer, [str(path)], max_length=80, seed=0, say=said.append)
    assert said[0].endswith("with a loss. Keys that aren't read: 'sytem' (line 1).")


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_part_of_each_file_is_held_out(tmp_path, byte_tokenizer, write, on_disk):
    names = [write("a.jsonl", *"abcdefghij"), write("b.jsonl", *"klmn")]
    folder = tmp_path if on_disk else None
    read = read_data(byte_tokenizer, names, eval_fraction=0.3, max_length=64, seed=1, folder=folder)
    kept, held = answers(read.examples), answers(read.held_out)
    assert sorted(kept + held) == list("abcdefghijklmn") and kept == sorted(kept)
    assert [part.count for part in read.parts] == [7, 3] and len([a for a in held if a < "k"]) == 3
    again = read_data(byte_tokenizer, names, eval_fraction=0.3, max_length=64, seed=1)
    other = read_data(byte_tokenizer, names, eval_fraction=0.3, max_length=64, seed=2)
    assert answers(again.held_out) == held != answers(other.held_out)
    assert read.examples.lengths().tolist() == [len(example["input_ids"]) for example in read.examples]
    assert answers(read.examples[2:4]) == kept[2:4]
    read.close()
    assert not list(tmp_path.glob("training"))


def test_files_to_evaluate_on(tmp_path, byte_tokenizer, write):
    names = [write("a.jsonl", "a"), write("b.jsonl", "b"), write("c.jsonl", "c")]
    read = read_data(byte_tokenizer, names[:1], eval_paths=names[1:], max_length=64, seed=0, folder=tmp_path)
    assert (answers(read.examples), answers(read.held_out)) == (["a"], ["b", "c"])
    read.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_nothing_to_learn_or_to_examine(tmp_path, byte_tokenizer, write):
    good, bad = write("good.jsonl", "a"), write("bad.jsonl", "b" * 100)
    with pytest.raises(DataError, match=r"bad.jsonl: none of it fits into --model_max_length 80; raise it"):
        read_data(byte_tokenizer, [good, bad], max_length=80, seed=0, folder=tmp_path)
    with pytest.raises(DataError, match=r"good.jsonl: --eval_fraction 0.5 leaves nothing to train on"):
        read_data(byte_tokenizer, [good], eval_fraction=0.5, max_length=80, seed=0, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]


def test_a_disk_that_is_full(tmp_path, byte_tokenizer, write, monkeypatch):
    def append(self, example):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExampleStore, "append", append)
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(DataError, match="data can't hold the data: No space left on device. Make room, or leave --str"):
        read_data(byte_tokenizer, [write("a.jsonl", "a")], max_length=64, seed=0, folder=folder)
    assert not folder.exists()


# --- weights ---


def rows_of(*parts, packing=False, seed=3):
    """Weighted rows of (rows, weight) each; the row number n holds the id n."""
    count = sum(rows for rows, _ in parts)
    examples = [{"input_ids": [number, number], "labels": [number, number]} for number in range(count)]
    named = [Part(f"{number}.jsonl", rows, weight) for number, (rows, weight) in enumerate(parts)]
    return make_rows(examples, named, packing=packing, max_length=4, seed=seed)


def epoch(rows, number):
    rows.begin_epoch(number)
    return Counter(int(i) for index in range(len(rows)) for i in rows[index]["input_ids"][::2])


def test_weights_say_how_often_rows_come_in_an_epoch():
    rows = rows_of((10, 2), (8, 0.5), (5, 1))
    assert len(rows) == 20 + 4 + 5
    for number in range(3):
        seen = epoch(rows, number)
        assert all(seen[i] == 2 for i in range(10)) and all(seen[i] == 1 for i in range(18, 23))
        assert sum(seen[i] for i in range(10, 18)) == 4 == len([i for i in range(10, 18) if seen[i]])
    first, second = epoch(rows, 0), epoch(rows, 1)
    assert all(first[i] + second[i] == 1 for i in range(10, 18))  # the one half, then the other
    assert rows.report().splitlines() == [
        "0.jsonl: weight 2, 20 of 10 rows in each epoch.",
        "1.jsonl: weight 0.5, 4 of 8 rows in each epoch.",
        "2.jsonl: weight 1, 5 of 5 rows in each epoch.",
    ]


def test_uneven_weights_go_round():
    rows = rows_of((7, 1.3), (3, 0.01))
    assert len(rows) == 9 + 1
    total = sum((epoch(rows, number) for number in range(21)), Counter())
    assert all(total[i] == 27 for i in range(7)) and all(total[i] == 7 for i in range(7, 10))
    assert epoch(rows, 5) == epoch(rows_of((7, 1.3), (3, 0.01)), 5)
    assert [epoch(rows, n) for n in range(4)] != [epoch(rows_of((7, 1.3), (3, 0.01), seed=4), n) for n in range(4)]


def test_packed_rows_are_of_one_part():
    rows = rows_of((6, 2), (4, 1), packing=True)
    assert len(rows) == 6 + 2
    seen = epoch(rows, 0)
    assert all(seen[i] == 2 for i in range(6)) and all(seen[i] == 1 for i in range(6, 10))
    for index in range(len(rows)):
        assert len({int(i) < 6 for i in rows[index]["input_ids"]}) == 1


def test_weights_of_one_change_nothing():
    assert isinstance(rows_of((6, 1), (4, 1)), ExampleDataset)


def test_workers_that_live_on_see_the_epoch():
    rows = rows_of((8, 0.5))
    loader = DataLoader(rows, num_workers=1, persistent_workers=True, collate_fn=list)
    seen = []
    for number in range(2):
        rows.begin_epoch(number)
        seen += [int(row["input_ids"][0]) for (row,) in loader]
    assert sorted(seen) == list(range(8))
    assert isinstance(rows, WeightedRows) and torch.equal(rows[-1]["input_ids"], rows[3]["input_ids"])
