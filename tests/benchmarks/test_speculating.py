"""`benchmarks/speculating.py`: a model that writes a given text, whichever way of guessing it is asked for."""

import runpy

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def speculating(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return runpy.run_path(str(repository / "benchmarks" / "speculating.py"))


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 8}, {"assistant_model": "another"}])
def test_the_given_text_is_written(speculating, repository, settings):
    model, assistant = (AutoModelForCausalLM.from_pretrained(repository / "qwen-tiny-chat") for _ in range(2))
    if settings.get("assistant_model"):
        settings = {"assistant_model": assistant}
    texts = speculating["texts_to_write"](AutoTokenizer.from_pretrained(repository / "qwen-tiny-chat"))
    reciter = speculating["Reciter"](model)
    for prompt, reply in texts["plain text"]:
        speculating["run_speculation"](model, reciter, [(prompt, reply)], **settings)  # raises where it writes another
        assert len(reply) == speculating["TOKENS"]
