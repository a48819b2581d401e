"""Logits of a training step, computed when they are read: the values and gradients of a plain step, or an error."""

import copy
import pickle
from contextlib import nullcontext

import peft
import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from qwen1.arguments_qwen import CACHE_NAME, QWenCausalLMOutput
from qwen1.logits_qwen import QWenTrainingOutput, UnreadLogits

READERS = {
    "attribute": lambda output: output.logits,
    "key": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "index": lambda output: output[1],
    "slice": lambda output: output[:2][1],
    "tuple": lambda output: output.to_tuple()[1],
    "unpacked": lambda output: {**output}["logits"],
    "dictionary": lambda output: dict(output)["logits"],
    "values": lambda output: list(output.values())[1] * 1,
    "items": lambda output: torch.clone(dict(output.items())["logits"]),
}


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def count_head(monkeypatch):
    """Count the calls of a model's head from now on, by no hook, which would have it called."""

    def watch(model):
        calls, head, forward = [], model.get_output_embeddings(), torch.nn.Linear.forward

        def counted(module, states):
            calls.extend([1] * (module is head))
            return forward(module, states)

        monkeypatch.setattr(torch.nn.Linear, "forward", counted)
        return calls

    return watch


@pytest.fixture
def process_group(tmp_path):
    """This process alone, as a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def custom_loss(logits):
    return (logits.float().log_softmax(-1)[..., :-1, 5].tanh() * 3).mean()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("tied", [False, True])
def test_read_in_any_way_they_train_as_plain_ones(tiny_model, ids, reader, tied):
    model, found = tiny_model(tie_word_embeddings=tied).train(), []
    for skip in (None, False):
        model.zero_grad()
        output = model(ids, labels=ids, skip_logits=skip)
        logits = READERS[reader](output)
        (custom_loss(logits) + output.loss).backward()
        found.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(*found)


def test_whoever_does_not_read_them_calls_no_head(tiny_model, ids, count_head):
    model = tiny_model().train()
    calls = count_head(model)
    output = model(ids, labels=ids)
    assert isinstance(output, QWenTrainingOutput) and isinstance(output, QWenCausalLMOutput)
    assert list(output.keys()) == list(output) == ["loss", "logits", CACHE_NAME]
    assert "logits" in output and "logits" in dir(output) and len(output) == 3
    assert "UnreadLogits(shape=(2, 12, 464), dtype=torch.float32)" in repr(output)
    leaves, spec = pytree.tree_flatten(output)
    for other in (copy.copy(output), output.copy(), pytree.tree_unflatten(leaves, spec), convert_to_fp32(output)):
        assert isinstance(other, QWenTrainingOutput) and list(other) == list(output)
        assert isinstance(other.unread, UnreadLogits)
    assert hasattr(output.unread, "to") and not hasattr(output.unread, "_asdict")
    assert output.unread.shape == (2, 12, 464) and output.unread.device == ids.device
    output.loss.backward()
    assert not calls
    logits = output.logits
    assert len(calls) == 1 and output.logits is logits is output["logits"] is output[1] and len(calls) == 1


def test_they_can_be_replaced(tiny_model, ids):
    output = tiny_model().train()(ids, labels=ids)
    output.logits = torch.ones(1)
    assert output["logits"] == output.logits == output[1] == 1
    output["logits"] = torch.zeros(1)
    output.loss = torch.tensor(7.0)
    assert output.logits == output.to_tuple()[1] == 0 and output["loss"] == output[0] == 7


def test_read_for_a_metric_first_they_still_have_a_gradient(tiny_model, ids):
    for context in (torch.no_grad, torch.inference_mode):
        output = tiny_model().train()(ids, labels=ids)
        with context():
            output.logits.argmax(-1)
        assert output.logits.requires_grad and not output.logits.is_inference()
        custom_loss(output.logits).backward()


def test_under_autocast_they_are_read_as_they_would_have_been_made(tiny_model, ids):
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, plain = model(ids, labels=ids), model(ids, labels=ids, skip_logits=False)
    assert output.unread.dtype == output.logits.dtype == plain.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, plain.logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = convert_to_fp32(model(ids, labels=ids))
    assert cast.unread.dtype == cast.logits.dtype == torch.float32
    assert torch.equal(cast.logits, plain.logits.float())


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_a_trained_head_is_not_asked_for_old_logits(tiny_model, ids, optimizer):
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **optimizer)
    output = model(ids, labels=ids)
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        output.logits  # noqa: B018


def test_a_frozen_head_gives_them_after_the_step_too(tiny_model, ids):
    model = tiny_model().train()
    model.lm_head.requires_grad_(False)
    expected = model(ids, labels=ids, skip_logits=False).logits
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    output = model(ids, labels=ids)
    output.loss.backward()
    optimizer.step()
    torch.testing.assert_close(output.logits, expected)


def test_an_adapter_that_comes_too_late_is_an_error(tiny_model, ids):
    model = tiny_model().train()
    output = model(ids, labels=ids)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
    assert model(ids, labels=ids).logits is not None  # of the adapter
    model.lm_head = nn.Linear(64, 464, bias=False)  # of the next call
    torch.testing.assert_close(output.logits, output.unread)
    output = model(ids, labels=ids)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
    model.lm_head.base_layer.weight = nn.Parameter(torch.zeros(464, 64))
    with pytest.raises(RuntimeError, match="the head has changed"):
        output.logits  # noqa: B018


def test_tuples_have_them_in_their_place(tiny_model, ids):
    model = tiny_model().train()
    plain = model(ids, labels=ids, skip_logits=False)
    given = model(ids, labels=ids, return_dict=False)
    assert len(given) == 3
    skipped = model(ids, labels=ids, return_dict=False, skip_logits=True)
    assert len(skipped) == 2 and skipped[1].get_seq_length() == 12
    as_tuple = model(ids, labels=ids).to_tuple()
    model.config.return_dict = False
    for loss, logits, *_ in (given, as_tuple, model(ids, labels=ids)):
        torch.testing.assert_close((loss, logits), (plain.loss, plain.logits))


def test_asked_for_none_there_are_none(tiny_model, ids):
    output = tiny_model().train()(ids, labels=ids, skip_logits=True)
    assert output.logits is None and "logits" not in output and output.get("logits") is None


def test_pickled_they_are_read(tiny_model, ids):
    output = tiny_model().train()(ids, labels=ids, use_cache=False)
    again = pickle.loads(pickle.dumps(output))
    assert isinstance(again, QWenTrainingOutput)
    torch.testing.assert_close(again.logits, output.logits)


def test_a_tree_of_casts_moves_and_detaches_holds_for_the_logits(tiny_model, ids):
    model = tiny_model().train()
    expected = model(ids, labels=ids, skip_logits=False, use_cache=False).logits
    output = model(ids, labels=ids, use_cache=False)
    cast = pytree.tree_map(lambda tensor: tensor.double(), output)
    assert cast.unread.dtype == cast.logits.dtype == torch.float64
    torch.testing.assert_close(cast.logits, expected.double())
    assert not pytree.tree_map(lambda tensor: tensor.detach(), output).logits.requires_grad
    assert pytree.tree_map(lambda tensor: tensor.shape, output, is_leaf=torch.is_tensor).logits == (2, 12, 64)


@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("read", [True, False])
def test_distributed_data_parallel(tiny_model, ids, count_head, process_group, settings, read):
    plain, model = tiny_model().train(), tiny_model().train()
    calls = count_head(model)
    wrapped = DistributedDataParallel(model, **settings)
    for step in (1, 2):
        for runner in (plain, wrapped):
            output = runner(ids, labels=ids, skip_logits=False if runner is plain else None)
            (custom_loss(output.logits) if read else output.loss).backward()
        torch.testing.assert_close(gradients(model), gradients(plain))
        assert len(calls) == read * step


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("read", [True, False])
def test_fully_sharded(tiny_model, ids, count_head, process_group, half, read):
    plain, model = tiny_model().train(), tiny_model().train()
    calls = count_head(model)
    mesh, dtype = dist.init_device_mesh("cpu", (1,)), torch.bfloat16 if half else None
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32))
    for runner in (plain, model):
        output = runner(ids, labels=ids, skip_logits=False if runner is plain else None)
        assert runner is plain or isinstance(output.unread, UnreadLogits)
        (custom_loss(output.logits) if read else output.loss).backward()
    assert len(calls) == read and output.loss.dtype == torch.float32
    assert not read or output.logits.dtype == torch.float32
    found = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    expected = gradients(plain)
    assert found.keys() == expected.keys()
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= (0.05 if half else 1e-6) * size, name


def test_fully_sharded_again_they_are_refused(tiny_model, ids, process_group):
    model = tiny_model().train()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    output = model(ids, labels=ids)
    output.loss.backward()
    with pytest.raises(RuntimeError, match="sharded again"):
        output.logits  # noqa: B018


def test_with_checkpointed_blocks(tiny_model, ids, count_head):
    plain, model = tiny_model().train(), tiny_model().train()
    model.gradient_checkpointing_enable()
    calls = count_head(model)
    custom_loss(plain(ids, labels=ids, skip_logits=False).logits).backward()
    output = model(ids, labels=ids)
    assert not calls
    custom_loss(output.logits).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_a_compiler_gets_plain_ones(tiny_model, ids):
    model = tiny_model("sdpa").train()
    plain = model(ids, labels=ids, skip_logits=False, use_cache=False)
    output = torch.compile(model, backend="eager", fullgraph=True)(ids, labels=ids, use_cache=False)
    assert type(output) is QWenCausalLMOutput
    torch.testing.assert_close(output.logits, plain.logits)


def test_prompts_of_peft_train_on_them(tiny_model, byte_tokenizer, ids, tmp_path):
    """CPT computes its loss from the logits, though it hands the labels down too."""
    byte_tokenizer.save_pretrained(tmp_path)
    settings = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[1, 2, 3, 4],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        tokenizer_name_or_path=str(tmp_path),
    )
    model = peft.get_peft_model(tiny_model(), settings).train()
    kinds = torch.full_like(ids, 4)
    losses = []
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids, input_type_mask=kinds).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}, {"own": True}])
def test_trainer(tiny_model, ids, count_head, tmp_path, settings):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = custom_loss(outputs.logits)
            return (loss, outputs) if return_outputs else loss

    own = settings.pop("own", False)
    model, texts = tiny_model(), [{"input_ids": row, "labels": row} for row in ids]
    calls = count_head(model)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", dataloader_pin_memory=False, **settings
    )
    trainer = (Own if own else Trainer)(model, arguments, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    asked = own or bool(settings.get("label_smoothing_factor"))
    assert len(calls) == (2 if asked else 0)
    predicted = trainer.predict(texts)
    assert predicted.predictions.shape == (2, 12, 464) and "test_loss" in predicted.metrics
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16) if settings.get("bf16") else nullcontext(), torch.no_grad():
        expected = model(ids).logits.float()
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected)
