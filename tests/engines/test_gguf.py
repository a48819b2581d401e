"""What `convert --to gguf` writes, in llama.cpp: logits, replies, ids. The environment is made as in docs/gguf.md."""

import random
import unicodedata

import pytest
import torch

from qwen1 import QWenLMHeadModel, QWenTokenizerFast
from qwen1.conversion.commands import app

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
pytestmark = pytest.mark.slow

WORDS = (
    "Hello world don't WE'LL naïve Ω ß İ ﬁ 1234 ３ ½ 你好 世界 한국어 日本語 नमस्ते ไทย 👍🏽 🚀 \u200b \ufffd ... !? (a) "
    "<| |> <|im_end| x=1; _a 's"
).split(" ") + [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\u3000", "\xa0"]
ERROR = {"f32": 5e-4, "q8_0": 0.6}
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
"""Largest error of the logarithm of a probability above 1e-4; of half precision that of torch, which rounds as much."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Convert a folder: (folder, outtype) -> GGUF."""

    def convert(folder, outtype):
        path = tmp_path_factory.mktemp("gguf") / f"{outtype}.gguf"
        arguments = ["convert", str(folder), str(path), "--to", "gguf", "--outtype", outtype]
        app(arguments, standalone_mode=False)
        return path

    return convert


def texts_of(count):
    words = random.Random(0)
    for _ in range(count):
        yield unicodedata.normalize("NFC", "".join(words.choices(WORDS, k=words.randrange(1, 12))))


def error_of(likely, ours):
    """Of the logarithms of the probabilities above 1e-4 that llama.cpp gives after each token."""
    errors = [
        abs(ours[place, token] - torch.tensor(chance, dtype=torch.float64).log())
        for place, found in enumerate(likely)
        for token, chance in found
        if chance > 1e-4
    ]
    assert len(errors) >= len(likely)
    return float(max(errors))


def log_chances(model, prompts):
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in prompts]


@pytest.mark.parametrize("outtype", [*ERROR, *HALF])
def test_logits_and_replies(written, llama_cpp, shipped, outtype):
    exact = log_chances(QWenLMHeadModel.from_pretrained(shipped.folder, fp32=True).eval(), shipped.prompts)
    found = llama_cpp(written(shipped.folder, outtype), shipped.prompts, measured=shipped.prompts)
    allowed = ERROR.get(outtype)
    if outtype in HALF:
        half = QWenLMHeadModel.from_pretrained(shipped.folder, dtype=HALF[outtype]).eval()
        rounded = log_chances(half, shipped.prompts)
        allowed = max(float((r - e)[e.exp() > 1e-4].abs().max()) for r, e in zip(rounded, exact, strict=True))
    assert max(map(error_of, found.likely, exact)) < allowed
    assert [shipped.tokenizer.decode(ids) for ids in found.replies] == list(shipped.replies.values())


@pytest.mark.no_cover
def test_a_thousand_texts_get_the_published_ids(written, llama_cpp, published_folder):
    tokenizer, path = QWenTokenizerFast.from_pretrained(published_folder), written(published_folder, "bf16")
    plain = list(texts_of(1000))
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n<|endoftext|><|extra_7|>" for text in plain]
    for texts, allowed in ((plain, set()), (turns, "all")):
        found = llama_cpp(path, texts=texts, special=bool(allowed))
        wanted = [tokenizer.encode(text, allowed_special=allowed) for text in texts]
        assert [(text, ids) for text, ids, others in zip(texts, found.ids, wanted, strict=True) if ids != others] == []


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32, "beta_fast": 24.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"rotary_emb_base": 1000000.0, "layer_norm_epsilon": 1e-3},
        {"rope_parameters": LINEAR},
        {"rope_parameters": YARN, "seq_length": 32, "n_positions": 128},
    ],
    ids=["grouped heads", "tied", "base and norm", "linear", "yarn"],
)
def test_other_shapes(written, llama_cpp, checkpoint_folder, tiny_model, changes):
    model = tiny_model(**{"seq_length": 128, "use_dynamic_ntk": False, "use_logn_attn": False, **changes})
    model.save_pretrained(checkpoint_folder)
    ids = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0)).tolist()
    found = llama_cpp(written(checkpoint_folder, "f32"), measured=ids)
    assert error_of(found.likely[0], *log_chances(model, ids)) < 1e-3
