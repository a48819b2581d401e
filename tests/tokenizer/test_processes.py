"""Threads, forks and pickles: what data loaders, servers and `Dataset.map` do with a tokenizer."""

import faulthandler
import importlib
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen1 import tokenization_qwen
from qwen1.tokenization_qwen import QWenTokenizerFast

TEXT = "hello world<|im_end|>"
SECONDS = 90  # far more than a child takes; what hangs fails
MODULES = sorted(path.stem for path in (Path(__file__).parents[2] / "qwen-tiny-chat").glob("*.py"))
LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore, threading.Event)


@pytest.fixture(scope="module", params=["local", "remote"])
def loaded(request, repository):
    """Load a class of tokenizer from the model that ships, as an import or as remote code."""
    folder = repository / "qwen-tiny-chat"

    def load(backend):
        if request.param == "remote":
            options = {"backend": "tiktoken"} if backend == "tiktoken" else {}
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)
        return QWenTokenizerFast.from_pretrained(folder, backend=backend)

    return load


@pytest.fixture(params=["tokenizers", "tiktoken"])
def tokenizer(request, loaded):
    return loaded(request.param)


def ids_of(tokenizer, **options):
    return tokenizer(TEXT, **options)["input_ids"]


def run_in_thread(work):
    """The result of `work`, or a failure if it takes too long."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert results, "hangs"
    return results[0]


def everything(tokenizer):
    """One call of every kind that keeps something, or sets something on the backend."""
    ids = ids_of(tokenizer, truncation=True, max_length=3)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}])["input_ids"]
    batch = tokenizer([TEXT, TEXT * 2], padding=True)["attention_mask"]
    return ids, chat, batch, tokenizer.decode(chat), len(tokenizer), tokenizer.mergeable_ranks[b"a"]


@pytest.mark.parametrize("name", MODULES)
def test_no_class_and_no_module_of_remote_code_has_a_lock(name):
    """dill pickles such classes by value, and their locks can never be acquired again."""
    module = importlib.import_module(f"qwen1.{name}")
    classes = [item for item in vars(module).values() if getattr(item, "__module__", None) == module.__name__]
    values = [value for owner in (module, *filter(inspect.isclass, classes)) for value in vars(owner).values()]
    objects = [value for value in values if not inspect.ismodule(value) and not inspect.isclass(value)]
    inner = [part for value in objects for part in attributes(value)]
    assert [value for value in values + inner if isinstance(value, LOCKS)] == []


def attributes(value):
    slots = [getattr(value, slot) for slot in getattr(type(value), "__slots__", ()) if hasattr(value, slot)]
    return [*slots, *getattr(value, "__dict__", {}).values()]


def test_pickled(tokenizer):
    expected = everything(tokenizer)
    assert everything(pickle.loads(pickle.dumps(tokenizer))) == expected


def test_pickled_by_value(tokenizer):
    dill = pytest.importorskip("dill")
    expected = everything(tokenizer)
    for recurse in (False, True):
        copy = dill.loads(dill.dumps(tokenizer, recurse=recurse))
        assert run_in_thread(lambda copy=copy: everything(copy)) == expected


def test_mapped_by_two_processes(tokenizer):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"t": [f"hello {i}" for i in range(8)]})
    options = {"truncation": True, "max_length": 4}

    def mapped():
        return data.map(lambda e: tokenizer(e["t"], **options), num_proc=2)["input_ids"][:]

    assert run_in_thread(mapped) == [tokenizer(text, **options)["input_ids"] for text in data["t"]]


@pytest.mark.slow
def test_sent_to_a_process_that_begins_anew(small_vocabulary):
    tokenizer = QWenTokenizerFast(small_vocabulary)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # A method, and no function from here: that process doesn't find the tests.
        assert pool.apply_async(tokenizer.encode, (TEXT,)).get(SECONDS) == tokenizer.encode(TEXT)


def fork(work) -> int:
    """Do `work` in a forked child and leave it at once; returns its process id. One that hangs tells where."""
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(SECONDS / 2, file=sys.__stderr__)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def end_of(child, deadline):
    """The exit code of a child, or "hangs"."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.no_cover  # whose lock a thread may hold at the moment of the fork, which the child then waits for
@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_while_threads_encode(tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # else the library warns of the fork
    expected, stop = everything(tokenizer), threading.Event()

    def encode():
        while not stop.is_set():
            tokenizer(TEXT * 200, truncation=True, max_length=100)

    def work():
        assert everything(tokenizer) == expected

    threads = [threading.Thread(target=encode, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        children = [fork(work) for _ in range(8)]
        deadline = time.monotonic() + SECONDS
        assert [end_of(child, deadline) for child in children] == [0] * 8
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_threads_never_get_the_settings_of_others(tokenizer):
    failures = []
    whole = ids_of(tokenizer)

    def work(options, expected):
        for _ in range(100):
            if (found := ids_of(tokenizer, **options)) != expected:
                failures.append((options, found))

    pad = tokenizer.pad_token_id
    cases = [
        ({}, whole),
        ({"truncation": True, "max_length": 2}, whole[:2]),
        ({"padding": "max_length", "max_length": 40}, whole + [pad] * (40 - len(whole))),
        ({"padding": "max_length", "max_length": 40, "padding_side": "left"}, [pad] * (40 - len(whole)) + whole),
        ({"split_special_tokens": True}, ids_of(tokenizer, split_special_tokens=True)),
    ]
    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_backend_keeps_the_settings_of_its_owner(small_vocabulary):
    tokenizer = QWenTokenizerFast(small_vocabulary)
    tokenizer(TEXT, truncation=True, max_length=2)
    tokenizer([TEXT, "a"], padding=True)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == (None, None)
    tokenizer.backend_tokenizer.enable_truncation(1)
    assert len(ids_of(tokenizer)) > 1  # what transformers gives, whatever the backend says
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 1


@pytest.mark.parametrize("texts", [TEXT, "", [TEXT, "", "a"]], ids=["one", "empty", "batch"])
def test_settings_of_a_call_do_what_those_of_a_backend_do(small_vocabulary, monkeypatch, texts):
    """Which are set on a copy where there are pairs."""
    tokenizer = QWenTokenizerFast(small_vocabulary)
    cuts = [{}, *({"truncation": name, "max_length": n} for name in (True, "only_first") for n in (0, 1, 2, 8, 40))]
    pads = [{}, {"padding": True}, {"padding": True, "pad_to_multiple_of": 8}, {"padding": "max_length"}]
    more = [{}, {"padding_side": "left"}, {"return_overflowing_tokens": True, "return_offsets_mapping": True}]
    cases = [{"max_length": 12, **cut, **pad, **other} for cut in cuts for pad in pads for other in more]
    tokenizer.truncation_side = "left"

    def result(case):
        try:
            return dict(tokenizer(texts, **case))
        except ValueError as error:  # lengths that transformers refuses together
            return str(error)

    found = [result(case) for case in cases]
    assert sum(isinstance(item, dict) for item in found) > 100
    monkeypatch.setattr(tokenization_qwen, "BackendOfCall", tokenization_qwen.copy_backend)
    assert found == [result(case) for case in cases]
