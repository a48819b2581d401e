"""Tensor parallel: processes that share a model compute what one computes.

Two runs, of two and of three processes, in which each process notes what it sees of several models; every test looks at
one side of that, beside the same model in this process.
"""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qwen1 import QWenConfig, QWenForSequenceClassification, QWenLMHeadModel, QWenTokenizerFast
from qwen1.tensor_parallel_qwen import ON_DTENSORS, check_heads, heads_of_process

pytestmark = pytest.mark.slow

UNEVEN = {"vocab_size": 464, "ffn_hidden_size": 194} if ON_DTENSORS else {"vocab_size": 465}
"""Of three processes; transformers 5.4 needs equal shares."""

SHAPES = {
    2: {
        "classes": {"num_labels": 3},
        "grouped": {"num_key_value_heads": 2},
        "odd": {"n_head": 6, "num_key_value_heads": 3},
        "plain": {},
        "tied": {"tie_word_embeddings": True},
    },
    3: {"three": {"n_head": 6, "num_key_value_heads": 3, **UNEVEN}},
}
"""Processes -> model -> what differs from the smallest."""

MODELS = [(2, "plain"), (2, "grouped"), (2, "tied"), (3, "three")]
TEXTS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
}
QUESTIONS = ["你好", "What is the capital of France?", "12+34=?"]
GREEDY = {"do_sample": False}


def ids_of(rows, tokens):
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(0))


def config_of(changes):
    values = {
        **dict(vocab_size=464, n_embd=64, n_layer=2, n_head=4, kv_channels=16, ffn_hidden_size=192),
        **dict(seq_length=32, use_dynamic_ntk=True, use_logn_attn=True, initializer_range=0.2, pad_token_id=0),
    }
    return QWenConfig(**{**values, **changes})


# --- what each process does ---


@torch.no_grad()
def write(model):
    """Logits beyond `seq_length`, and texts that pass it, of which one begins with padding."""
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    settings = {**GREEDY, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 26}
    return {name: model.generate(ids_of(2, 9), **settings, **way) for name, way in TEXTS.items()}


def train(model, folder=None):
    """The loss of a step of plain gradient descent, whose result is saved."""
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(ids_of(2, 41), labels=ids_of(2, 41)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    if folder:
        model.save_pretrained(folder)
    return loss.detach()


def here(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def look_at(folder, arguments):
    if folder.name == "classes":
        model = QWenForSequenceClassification.from_pretrained(folder, **arguments).eval()
        with torch.no_grad():
            return {"logits": model(ids_of(2, 41)).logits}
    try:
        model = QWenLMHeadModel.from_pretrained(folder, **arguments).eval()
    except ValueError as error:
        return {"refused": str(error)}
    with torch.no_grad():
        output = model(ids_of(2, 41), use_cache=True)
    projection = model.transformer.h[0].attn.c_attn
    found = {
        "logits": output.logits,
        "keys": [tuple(layer.keys.shape) for layer in output.cache.layers],
        "c_attn": [tuple(here(tensor).shape) for tensor in (projection.weight, projection.bias)],
        "numbers": sum(here(parameter).numel() for parameter in model.parameters()),
        **write(model),
    }
    with pytest.raises(ValueError, match="skip_logits=True needs"):
        model.train()(ids_of(1, 9), labels=ids_of(1, 9), skip_logits=True)
    return {**found, "loss": train(model, folder.with_name(f"{folder.name}-trained"))}


def share(folder, shapes):
    """Load each model in both ways by turns."""
    ways = [{"tp_plan": "auto"}]
    if ON_DTENSORS:
        ways.append({"distributed_config": DistributedConfig(tp_size=dist.get_world_size())})
    return {name: look_at(folder / name, ways[number % len(ways)]) for number, name in enumerate(shapes)}


def share_and_shard(folder):
    """Two by two processes, which share the model and have shards of the shares."""
    both = DistributedConfig(tp_size=2, fsdp_size=2)
    model = QWenLMHeadModel.from_pretrained(folder, distributed_config=both)
    return train(model, folder.with_name(f"{folder.name}-by-four"))


def talk(model, tokenizer, reads, **settings):
    """Three turns: the reply, and how many tokens were read before it; and the history."""
    turns, history = [], None
    for question in QUESTIONS:
        reads.clear()
        reply, history = model.chat(tokenizer, question, history=history, **settings)
        turns.append((reply, reads[0]))
    return turns, history


def converse(model, tokenizer):
    """Chat in all ways; at last one process alone changes its part of the weights."""
    reads, embedding = [], torch.nn.functional.embedding

    def count(ids, *args, **kwargs):
        reads.append(ids.numel())
        return embedding(ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", count)  # a hook would end what is kept of conversations
        found = {
            "stream": list(model.chat_stream(tokenizer, QUESTIONS[0], **GREEDY)),
            "batch": model.batch_chat(tokenizer, QUESTIONS, **GREEDY)[0],
        }
        found["chat"], history = talk(model, tokenizer, reads, **GREEDY)
        found["sampled"], _ = talk(model, tokenizer, reads, do_sample=True, temperature=5.0, top_p=1.0, top_k=0)
        if not dist.is_initialized() or dist.get_rank() == 1:
            here(model.transformer.h[-1].mlp.w1.weight.detach())[0, 0] += 1.0
        reads.clear()
        model.chat(tokenizer, QUESTIONS[0], history=history, **GREEDY)
    return {**found, "read after a change": reads[0]}


def share_and_chat(folder, shapes, shipped):
    found = share(folder, shapes)
    model = AutoModelForCausalLM.from_pretrained(shipped, trust_remote_code=True, tp_plan="auto").float().eval()
    torch.manual_seed(dist.get_rank())
    return {**found, "shipped": converse(model, QWenTokenizerFast.from_pretrained(shipped))}


# --- what came of it ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All models of this file, by their names."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in (item for shapes in SHAPES.values() for item in shapes.items()):
        torch.manual_seed(0)
        model = (QWenForSequenceClassification if name == "classes" else QWenLMHeadModel)(config_of(changes))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which would all be alike
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def found(folder, in_processes, repository, tmp_path_factory):
    """What the processes found: (processes, model) -> a dictionary of each process."""
    shipped, home = repository / "qwen-tiny-chat", {"HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    of_two = in_processes(share_and_chat, folder, list(SHAPES[2]), shipped, environment=home)
    of_three = in_processes(share, folder, list(SHAPES[3]), count=3)
    return {(len(run), name): [of[name] for of in run] for run in (of_two, of_three) for name in run[0]}


@pytest.fixture(params=MODELS, ids=lambda model: model[1])
def shared(request, found, folder):
    """A model that is shared: its configuration, how many processes, what each found, and the model in this process."""
    processes, name = request.param
    return processes, found[request.param], QWenLMHeadModel.from_pretrained(folder / name).eval()


def test_logits(shared):
    _, found, model = shared
    with torch.no_grad():
        expected = model(ids_of(2, 41)).logits
    for of_process in found:
        torch.testing.assert_close(of_process["logits"], expected, atol=2e-5, rtol=0)


def test_texts(shared):
    _, found, model = shared
    for way, expected in write(model).items():
        for of_process in found:
            assert torch.equal(of_process[way], expected), way


def test_heads_and_cache_are_shared(shared):
    processes, found, model = shared
    config, width = model.config, model.transformer.h[0].attn.c_attn.out_features // processes
    for of_process in found:
        assert of_process["keys"] == [(2, config.num_key_value_heads // processes, 41, 16)] * 2
        assert of_process["c_attn"] == [(width, 64), (width,)]


def test_memory_of_the_weights(shared):
    """Norms and the biases of sums are in each process."""
    processes, found, model = shared
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(of_process["numbers"] for of_process in found) < 1.01 * whole
    assert max(of_process["numbers"] for of_process in found) < 1.04 * whole / processes


def check_step(model, losses, begun, saved):
    """A step that processes have made and saved is that of this model."""
    files = [load_file(folder / "model.safetensors") for folder in (begun, saved)]
    assert files[0].keys() == files[1].keys()
    assert "distributed" not in (saved / "config.json").read_text()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = train(model)
    for of_process in losses:
        torch.testing.assert_close(of_process, loss, atol=0, rtol=1e-6)
    trained = QWenLMHeadModel.from_pretrained(saved).state_dict()
    for key, expected in model.state_dict().items():
        assert not torch.equal(expected, before[key]), f"{key} has no gradient"
        error = (trained[key] - expected).abs().max()
        assert error < 2e-6, f"{key} is {error} off"


def test_loss_gradients_and_what_is_saved(shared, folder, request):
    _, found, model = shared
    name = request.node.callspec.params["shared"][1]
    check_step(model, [of_process["loss"] for of_process in found], folder / name, folder / f"{name}-trained")


@pytest.mark.skipif(not ON_DTENSORS, reason="transformers 5.4 does not shard so")
def test_shards_of_shares(folder, in_processes):
    model = QWenLMHeadModel.from_pretrained(folder / "plain")
    losses = in_processes(share_and_shard, folder / "plain", count=4)
    check_step(model, losses, folder / "plain", folder / "plain-by-four")


def test_classes(found, folder):
    model = QWenForSequenceClassification.from_pretrained(folder / "classes").eval()
    with torch.no_grad():
        expected = model(ids_of(2, 41)).logits
    for of_process in found[2, "classes"]:
        torch.testing.assert_close(of_process["logits"], expected, atol=2e-5, rtol=0)


def test_heads_that_cannot_be_shared(found):
    for of_process in found[2, "odd"]:
        assert "num_attention_heads=6 and num_key_value_heads=3" in of_process["refused"]
        assert "tp_size=2 processes: start 1 or 3." in of_process["refused"]


def test_a_conversation(found, repository):
    shipped = repository / "qwen-tiny-chat"
    model = QWenLMHeadModel.from_pretrained(shipped, fp32=True).eval()
    expected = converse(model, QWenTokenizerFast.from_pretrained(shipped))
    expected.pop("sampled")
    for of_process in found[2, "shipped"]:
        assert {name: of_process[name] for name in expected} == expected
    read = [tokens for _, tokens in expected["chat"]]
    assert read[2] < expected["read after a change"]  # or the comparison shows nothing of what is kept


def test_processes_draw_the_same_tokens(found):
    first, second = (of_process["sampled"] for of_process in found[2, "shipped"])
    assert first == second
    assert first != found[2, "shipped"][0]["chat"]


# --- the parts ---


@pytest.mark.parametrize("heads", [(4, 4, 4), (8, 2, 2)])
def test_the_heads_of_each_process(heads):
    packed = torch.arange(sum(heads) * 3).float()[None, None]
    parts = packed.split([count * 3 for count in heads], dim=-1)
    for process in range(2):
        own = heads_of_process(packed, heads, process, 2)
        expected = [part[..., process * part.shape[-1] // 2 :][..., : part.shape[-1] // 2] for part in parts]
        assert torch.equal(own, torch.cat(expected, dim=-1))


@pytest.mark.parametrize(
    ("heads", "processes", "fitting"), [((32, 32, 32), 3, "1 or 2 or 4"), ((6, 2, 2), 3, "1 or 2")]
)
def test_numbers_of_processes(heads, processes, fitting):
    with pytest.raises(ValueError, match=f"tp_size={processes} processes: start {fitting}"):
        check_heads(heads, processes)
    check_heads(heads, 2)


def test_the_plan_has_a_style_of_transformers_for_everything_else(tiny_model):
    model = tiny_model()
    styles = set(model.tp_plan.values())
    assert styles - {"qwen_heads"} <= {"colwise", "rowwise", "embedding_rowwise", "colwise_gather_output"}, styles
