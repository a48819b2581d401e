"""`pipeline("text-generation")` with messages, one conversation or several."""

import pytest
from transformers import pipeline

GREEDY = {"do_sample": False, "max_new_tokens": 64}


@pytest.fixture(scope="module")
def chat(shipped):
    return pipeline("text-generation", model=str(shipped.folder), trust_remote_code=True)


def conversation(text):
    return [{"role": "system", "content": "Answer in Chinese."}, {"role": "user", "content": text}]


def expected(shipped, text):
    return shipped.model.chat(shipped.tokenizer, text, system="Answer in Chinese.", do_sample=False)[0]


def test_messages_come_back_with_the_reply_of_chat(chat, shipped):
    messages = conversation("12+34=?")
    (result,) = chat(messages, **GREEDY)
    reply = {"role": "assistant", "content": expected(shipped, "12+34=?")}
    assert result["generated_text"] == [*messages, reply]


def test_a_batch_of_conversations_gives_the_replies_of_each_alone(chat, shipped):
    texts = ["你好", "What is the capital of France?", "12+34=?"]
    results = chat([conversation(text) for text in texts], batch_size=3, **GREEDY)
    replies = [result["generated_text"][-1]["content"] for (result,) in results]
    assert replies == [expected(shipped, text) for text in texts]
