"""Data parallel in every way, with whole weights and with shards: loss, gradients and logits of a single process.

Each process has its own rows of a batch, with equally many tokens that count, so that means over the processes are
means over the batch. DeepSpeed is optional here (pip install deepspeed); its engine is used as the Trainer uses it.
"""

import importlib.util
import inspect
import os

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from qwen1 import QWenLMHeadModel
from qwen1.arguments_qwen import QWenCausalLMOutput
from qwen1.logits_qwen import QWenTrainingOutput
from qwen1.modeling_qwen import QWenBlock

IDS = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))  # beyond seq_length: NTK has its part
LABELS = IDS.masked_fill(torch.arange(40) < 10, -100)
SHARDS_BY_ITSELF = "fsdp_size" in inspect.signature(DistributedConfig).parameters  # transformers 5.4 doesn't yet

MODELS = ["plain", "tied", "grouped"]
BLOCKS = [f"transformer.h.{number}" for number in range(4)]
WAYS = {
    "transformers": ["", *BLOCKS, "transformer.wte", "transformer.ln_f", "lm_head"],
    "accelerate": ["", *BLOCKS],  # from 1.13 on, embedding and head too
    "by hand": ["", *BLOCKS],
    "head too": ["", *BLOCKS, "lm_head"],
    "FSDP1": ["", *BLOCKS],
    "DDP": [],
    "ZeRO-2": [],
    "ZeRO-3": [],  # last: it puts functions of its own into torch
}
"""Way -> modules that must be wrapped, each by itself."""

STAGES = {"ZeRO-2": 2, "ZeRO-3": 3}
WHOLE_LOGITS = ("FSDP1", "ZeRO-3")
"""These have the head in pieces that nobody but them can put together."""

OUTSIDE = ("DDP", "FSDP1", *STAGES)
"""These wrap the model in an object of their own."""

STEPS = {
    "loss without logits": {},
    "loss from logits": {"skip_logits": False},
    "no logits at all": {"skip_logits": True},
    "logits read late": {},
    "loss and logits": {},
}


# --- in each process ---


def load(folder, way):
    """The model of a folder, distributed in one of the `WAYS`."""
    if way == "transformers":
        return QWenLMHeadModel.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    model = QWenLMHeadModel.from_pretrained(folder)
    if way in STAGES:
        return by_deepspeed(model, STAGES[way])
    if way == "DDP":
        return DistributedDataParallel(model)
    if way == "FSDP1":
        policy = ModuleWrapPolicy({QWenBlock})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    if way == "accelerate":
        return by_accelerate(model)
    for block in model.transformer.h:
        fully_shard(block)
    if way == "head too" and not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, reshard_after_forward=True)
    return fully_shard(model)


def by_accelerate(model):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards nothing over CPUs
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    return Accelerator(fsdp_plugin=plugin).prepare(model, torch.optim.SGD(model.parameters()))[0]


def by_deepspeed(model, stage):
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # kernels that take minutes to compile, in place of gloo's
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # small ones would stay whole
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def wrapped_modules(model):
    names = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    found = [name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)]
    return sorted(names + [name.replace("_fsdp_wrapped_module.", "") for name in found])


def gradients(model):
    """The whole gradients, by the names of a plain model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): weight.grad.clone()
                for name, weight in model.named_parameters()
            }
    if hasattr(model, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(weight) for name, weight in model.module.named_parameters()}
    found = {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def custom_loss(logits):
    return (logits.float().log_softmax(-1)[..., :-1, 5].tanh() * 3).mean()


def train_step(model, ids, labels, step):
    """Loss of one step, what it returned, and the gradients."""
    model.train()
    model.zero_grad()
    output = model(ids, labels=labels, **STEPS[step])
    loss = output.loss if step != "logits read late" else 0.0
    if step in ("logits read late", "loss and logits"):
        loss = loss + custom_loss(output.logits)
    engine = hasattr(model, "zero_optimization_stage")
    model.backward(loss) if engine else loss.backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    if engine:
        model.step()  # of a learning rate of 0
    return loss.detach(), type(output).__name__, found


def each_step(folder, way, saved):
    """What this process finds out about a model and a way."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model, found = load(folder, way), {}
    for step in STEPS:
        try:
            found[step] = train_step(model, IDS[rows], LABELS[rows], step)
        except ValueError as error:
            found[step] = str(error)
    model.eval()
    with torch.no_grad():
        found["logits"] = model(IDS[rows]).logits
    found["wrapped"] = wrapped_modules(model)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(saved)
    return found


def each_way(folders, saved, ways):
    return {(name, way): each_step(folders[name], way, saved / f"{name} {way}") for way in ways for name in MODELS}


# --- here ---


def missing(way):
    """Why a way can't be tried here, None where it can."""
    if way in STAGES and importlib.util.find_spec("deepspeed") is None:
        return "needs DeepSpeed: pip install deepspeed"
    if way == "transformers" and not SHARDS_BY_ITSELF:
        return "this release of transformers shards nothing by itself"
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(in_processes, model_folders, saved):
    """(model, way) -> what each of two processes found."""
    ways = [way for way in WAYS if not missing(way)]
    ranks = in_processes(each_way, model_folders, saved, ways, environment={"DS_ACCELERATOR": "cpu"})
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


@pytest.fixture(scope="module")
def alone(model_folders):
    """(model, step) -> loss and gradients of a single process; (model, "logits") -> logits."""
    expected = {}
    for name in MODELS:
        model = QWenLMHeadModel.from_pretrained(model_folders[name])
        for step in STEPS:
            loss, _, grads = train_step(model, IDS, LABELS, step)
            expected[name, step] = loss, grads
        with torch.no_grad():
            expected[name, "logits"] = model.eval()(IDS).logits
    return expected


@pytest.fixture(params=[(name, way) for name in MODELS for way in WAYS], ids=lambda pair: "-".join(pair))
def pair(request):
    if reason := missing(request.param[1]):
        pytest.skip(reason)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_that_of_one_process(found, alone, pair, step):
    ranks = [rank[step] for rank in found[pair]]
    if pair[1] in WHOLE_LOGITS and step == "no logits at all":
        assert all("skip_logits=True needs" in rank for rank in ranks)
        return
    loss, expected = alone[pair[0], step]
    torch.testing.assert_close(torch.stack([rank[0] for rank in ranks]).mean(), loss)
    for _, _, grads in ranks:
        assert grads.keys() == expected.keys()
        size = torch.stack([grad.norm() for grad in expected.values()]).norm()
        errors = {name: ((grads[name] - grad).norm() / size).item() for name, grad in expected.items()}
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.slow
def test_logits_are_those_of_one_process(found, alone, pair):
    logits = torch.cat([rank["logits"] for rank in found[pair]])
    torch.testing.assert_close(logits, alone[pair[0], "logits"])


@pytest.mark.slow
def test_each_block_is_wrapped_by_itself(found, pair):
    name, way = pair
    expected = [module for module in WAYS[way] if not (name == "tied" and module == "lm_head")]
    for rank in found[pair]:
        assert set(expected) <= set(rank["wrapped"])


@pytest.mark.slow
def test_the_loss_needs_no_logits(found, pair):
    kind = QWenCausalLMOutput if pair[1] in WHOLE_LOGITS else QWenTrainingOutput
    assert {rank["loss without logits"][1] for rank in found[pair]} == {kind.__name__}


@pytest.mark.slow
def test_what_is_saved_is_an_ordinary_checkpoint(found, pair, saved, model_folders):
    if pair[1] in OUTSIDE:
        pytest.skip("wraps the model in another object")
    model, original = (
        QWenLMHeadModel.from_pretrained(place) for place in (saved / " ".join(pair), model_folders[pair[0]])
    )
    assert type(model) is QWenLMHeadModel and model.config.architectures == ["QWenLMHeadModel"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in original.state_dict().items())


# --- checkpoints of the Trainer ---


def trained(folder, output, state_dict_type, resume_from=None):
    """Whole weights of a model after four steps of the Trainer, with a checkpoint after the second."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict_type  # which early releases read in the place of the setting
    arguments = TrainingArguments(
        output,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        fsdp="full_shard auto_wrap",
        fsdp_config={
            "version": 2,
            "transformer_layer_cls_to_wrap": ["QWenBlock"],
            "state_dict_type": state_dict_type,
        },
    )
    arguments.device  # noqa: B018  makes accelerate's state, which the next line changes
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards nothing over CPUs
    texts = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(QWenLMHeadModel.from_pretrained(folder), arguments, train_dataset=texts)
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.model.save_pretrained(f"{output}/model")
    return wrapped_modules(trainer.model)


def resumed(folder, output):
    """Modules that were wrapped, for each kind of checkpoint."""
    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        for name, start in (("straight", None), ("resumed", f"{output}/{kind}-straight/checkpoint-2")):
            found[kind, name] = trained(folder, f"{output}/{kind}-{name}", kind, start)
    return found


@pytest.fixture(scope="module")
def runs(in_processes, model_folders, tmp_path_factory):
    """Folder of the runs, and what was wrapped in each."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, in_processes(resumed, model_folders["plain"], str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_ends_as_a_straight_one(runs, model_folders, kind):
    folder, ranks = runs
    for rank in ranks:
        assert set(BLOCKS) <= set(rank[kind, "straight"])
    assert (folder / f"{kind}-straight" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir() == ("SHARDED" in kind)
    start, straight, again = (
        QWenLMHeadModel.from_pretrained(place).state_dict()
        for place in (
            model_folders["plain"],
            *(folder / f"{kind}-{name}" / "model" for name in ("straight", "resumed")),
        )
    )
    assert not torch.equal(start["lm_head.weight"], straight["lm_head.weight"])
    for name, value in straight.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)
