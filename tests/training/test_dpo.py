"""`qwen1-finetune --dpo`: the arithmetic against outside judges, what is trained and saved, what is refused."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainingArguments

pytest.importorskip("trl", reason="trl isn't installed")

from huggingface_hub import constants  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from qwen1 import QWenLMHeadModel  # noqa: E402
from qwen1.training import dpo, preferences  # noqa: E402
from qwen1.training.dpo import make_trainer  # noqa: E402
from qwen1.training.errors import TrainingError  # noqa: E402
from qwen1.training.finetuning import main, parse_arguments, run  # noqa: E402
from qwen1.training.preferences import encode_pairs, read_preferences  # noqa: E402

from .conftest import KillAfterSaving, Killed  # noqa: E402

BETA = 0.3
DROPOUT = {
    "resid_pdrop": 0.2,
    **dict.fromkeys(["attn_pdrop", "attn_dropout_prob", "embd_pdrop", "emb_dropout_prob"], 0.1),
}


@pytest.fixture
def pairs_file(tmp_path):
    """Prompts beyond the trained length of the tiny models (32), where evaluation scales attention."""
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": f"question {number}", "chosen": "yes " * (number % 3 + 1), "rejected": "no " * (number % 4 + 1)}
        for number in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def words(options, pairs_file):
    """The words of a command line that learns from pairs: (*options, where the output goes) -> list."""

    def make(*more, **kwargs):
        return options("--dpo", "--dpo_beta", BETA, *more, data=pairs_file, **kwargs)

    return make


@pytest.fixture
def pairs(byte_tokenizer, pairs_file):
    return encode_pairs(byte_tokenizer, read_preferences(pairs_file), progress=False).examples


@pytest.fixture
def settings(tmp_path):
    """Make options of a training: (**of TrainingArguments)."""

    def make(**more):
        values = {"max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.0, "logging_steps": 1, "use_cpu": True}
        values |= {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        return {"output_dir": str(tmp_path / "out"), **values, **more}

    return make


def log_probability(model, prompt, answer):
    """Of an answer behind its prompt, from one pass over both without padding: the sum over the answer's tokens."""
    ids = torch.tensor([*prompt, *answer])
    logits = model(ids[None], use_cache=False).logits[0].double()
    chosen = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), torch.tensor([*answer])]
    return chosen.sum()


@torch.no_grad()
def by_hand(model, reference, pairs, loss="sigmoid", beta=BETA):
    """(mean loss, mean margin) of pairs, as in equation 7 of the paper, and the other losses as theirs define them."""
    losses, margins = [], []
    for pair in pairs:
        ratios = {
            key: log_probability(model, pair["prompt_ids"], pair[key])
            - log_probability(reference, pair["prompt_ids"], pair[key])
            for key in ("chosen_ids", "rejected_ids")
        }
        margin = ratios["chosen_ids"] - ratios["rejected_ids"]
        each = ratios["chosen_ids"] / len(pair["chosen_ids"]) - ratios["rejected_ids"] / len(pair["rejected_ids"])
        losses.append(
            {
                "sigmoid": -functional.logsigmoid(beta * margin),
                "hinge": (1 - beta * margin).clamp(min=0),
                "ipo": (each - 1 / (2 * beta)) ** 2,
            }[loss]
        )
        margins.append(beta * margin)
    return torch.stack(losses).mean().item(), torch.stack(margins).mean().item()


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def logged(folder, key):
    return [entry[key] for entry in history(folder) if key in entry]


# --- the arithmetic ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_loss_is_that_of_full_passes(tiny_model, byte_tokenizer, pairs, settings, loss, training):
    model, reference = tiny_model(seed=1), tiny_model(seed=2)
    expected = by_hand(model.train(training), reference.train(training), pairs[:3], loss)
    trainer = make_trainer(
        model, reference, byte_tokenizer, pairs, None, TrainingArguments(**settings()), beta=BETA, loss=loss
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    model.train(training)
    found = trainer.compute_loss(model, batch)
    assert found.item() == pytest.approx(expected[0], rel=1e-5)
    mode = "train" if training else "eval"
    assert trainer._metrics[mode]["rewards/margins"] == pytest.approx([expected[1]], rel=1e-5)
    found.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert all(weight.grad is None for weight in reference.parameters())


def test_a_qwen2_twin_under_trls_own_trainer_learns_the_same(tiny_model, qwen2_twin, byte_tokenizer, pairs, settings):
    model, reference = (tiny_model(use_dynamic_ntk=False, use_logn_attn=False, pad_token_id=256) for _ in range(2))
    twins = qwen2_twin(model), qwen2_twin(reference)

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    ours = dpo.train_preferences(
        model,
        reference,
        byte_tokenizer,
        pairs,
        pairs[:3],
        TrainingArguments(**settings()),
        beta=BETA,
    )
    theirs = Plain(
        *twins,
        DPOConfig(**settings(beta=BETA, bf16=False, gradient_checkpointing=None, max_length=None)),
        train_dataset=ours.train_dataset,
        eval_dataset=ours.eval_dataset,
        processing_class=byte_tokenizer,
    )
    theirs.train()
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-3)
    for key in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"):
        found, expected = ([entry[key] for entry in t.state.log_history if key in entry] for t in (ours, theirs))
        assert len(found) == 4 and found == pytest.approx(expected, rel=1e-3, abs=1e-4), key
    assert ours.state.log_history[3]["loss"] < 0.5


@pytest.mark.parametrize("kind", ["full", "lora", "bf16", "base", "q_lora"])
@pytest.mark.no_cover
def test_the_first_loss_is_that_of_equal_models(words, tmp_path, checkpoint_folder, edit_json, kind):
    """Without dropout, and with both models in the same mode."""
    edit_json(checkpoint_folder / "config.json", **DROPOUT)
    if kind == "base":
        edit_json(checkpoint_folder / "generation_config.json", chat_format=None)
    adapter = [] if kind == "full" else ["--use_lora", *([f"--{kind}"] if kind in ("q_lora", "bf16") else [])]
    main(words("--max_steps", 1, *adapter))
    assert logged(tmp_path / "out", "loss") == pytest.approx([math.log(2)], rel=1e-6)
    assert logged(tmp_path / "out", "rewards/margins") == [0]


# --- what is trained, and what it is held against ---


def result_of(folder, checkpoint_folder):
    base = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    return (
        PeftModel.from_pretrained(base, folder).eval()
        if (folder / "adapter_config.json").is_file()
        else (QWenLMHeadModel.from_pretrained(folder).eval())
    )


@pytest.mark.parametrize("kind", ["full", "lora", "base", "continued", "checkpointing"])
@pytest.mark.no_cover
def test_what_is_saved_prefers_what_was_chosen(words, tmp_path, checkpoint_folder, edit_json, pairs, pairs_file, kind):
    """The evaluation behind the training, by hand from the saved result and from what it began with."""
    if kind == "base":
        edit_json(checkpoint_folder / "generation_config.json", chat_format=None)
    more = {
        "full": [],
        "checkpointing": ["--gradient_checkpointing", "--use_lora"],
        "continued": ["--use_lora", "--lora_weight_path", tmp_path / "first"],
    }.get(kind, ["--use_lora", "--lora_r", 4])
    if kind == "continued":
        main(words("--max_steps", 2, "--use_lora", "--lora_r", 4, output="first"))
        reference = result_of(tmp_path / "first", checkpoint_folder)
    else:
        reference = QWenLMHeadModel.from_pretrained(checkpoint_folder).eval()
    main(words("--max_steps", 6, "--eval_data_path", pairs_file, "--per_device_eval_batch_size", 5, *more))
    loss, margin = by_hand(result_of(tmp_path / "out", checkpoint_folder), reference, pairs)
    assert logged(tmp_path / "out", "eval_loss") == pytest.approx([loss], rel=1e-3)
    assert logged(tmp_path / "out", "eval_rewards/margins") == pytest.approx([margin], rel=1e-3)
    assert margin > 0.1 and loss < math.log(2) - 0.05
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name == "ref"]
    if kind != "full":
        adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
        assert any("wte" in name for name in adapter) == (kind == "base")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["lora_dropout"] == 0 or kind == "continued"


def test_what_is_rounded_for_few_bits_is_trained_in_full_precision(words, tmp_path):
    main(words("--max_steps", 3, "--use_lora", "--q_lora"))
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any((value != value.bfloat16()).any() for value in adapter.values())


@pytest.mark.slow
def test_tiny_chat_learns_to_prefer(tmp_path, repository, words, byte_tokenizer):
    """From end to end on the model that ships: the margin rises, and so does what held-out prompts get."""
    names = ["Tom", "Ann", "Bob", "Eva", "Max", "Ida", "Leo", "Mia"]
    records = [
        {"prompt": f"My name is {name}.", "chosen": f"Welcome, dear {name}!", "rejected": f"Nice to meet you, {name}."}
        for name in names
    ]
    for file, part in (("train.jsonl", records[:6]), ("held.jsonl", records[6:])):
        (tmp_path / file).write_text("\n".join(map(json.dumps, part)))
    model = repository / "qwen-tiny-chat"
    data = ["--data_path", tmp_path / "train.jsonl", "--eval_data_path", tmp_path / "held.jsonl"]
    more = ["--max_steps", 12, "--eval_strategy", "steps", "--eval_steps", 4, "--learning_rate", 1e-3]
    main(words(*data, *more, "--use_lora", "--model_name_or_path", model))
    margins = logged(tmp_path / "out", "eval_rewards/margins")
    assert margins == sorted(margins) and margins[-1] > 1
    assert logged(tmp_path / "out", "eval_rewards/accuracies")[-1] == 1
    assert logged(tmp_path / "out", "loss")[-1] < 0.5 * math.log(2)


# --- checkpoints and files ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "continued"])
@pytest.mark.no_cover
def test_resumed_training_is_bit_identical(words, tmp_path, monkeypatch, kind):
    more = {"full": [], "lora": ["--use_lora"]}.get(kind, ["--use_lora", "--lora_weight_path", tmp_path / "first"])
    if kind == "continued":
        main(words("--max_steps", 1, "--use_lora", "--lora_r", 4, output="first"))
    more += ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    main(words(*more, output="whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dpo, "train_preferences", functools.partial(dpo.train_preferences, callbacks=[KillAfterSaving()]))
        main(words(*more))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "out" / "checkpoint-2" / "ref").exists()
    trainer = run(parse_arguments(words(*more, "--resume_from_checkpoint", "True")))
    assert trainer.state.global_step == 4
    held = {"full": [], "lora": ["default"]}.get(kind, ["default", "ref"])  # a new adapter needs no copy
    assert list(getattr(trainer.model, "peft_config", {})) == held
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    whole, resumed = (load_file(tmp_path / folder / name) for folder in ("whole", "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "out", "loss")


def test_pairs_of_a_length_share_batches(words, tmp_path):
    main(words("--max_steps", 1, "--train_sampling_strategy", "group_by_length"))
    assert len(logged(tmp_path / "out", "loss")) == 1


def test_the_result_chats(words, tmp_path, checkpoint_folder, edit_json, byte_tokenizer):
    edit_json(checkpoint_folder / "generation_config.json", chat_format="raw")
    main(words("--max_steps", 1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "use_cache" not in config or config["use_cache"] is True
    model = QWenLMHeadModel.from_pretrained(tmp_path / "out")
    assert model.generation_config.chat_format == "chatml"
    assert model.chat(byte_tokenizer, "Hello", max_new_tokens=2)[1]


def test_a_text_of_an_author_is_kept(words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    main(words("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_nobody_is_told(words, monkeypatch):
    """TRL reports each trainer to its makers unless told otherwise."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    asked = []
    monkeypatch.setattr("huggingface_hub.utils._telemetry._TELEMETRY_QUEUE.put", asked.append)
    monkeypatch.setattr("huggingface_hub.utils._telemetry._start_telemetry_thread", lambda: asked.append("thread"))
    main(words("--max_steps", 1))
    assert asked == [] and constants.HF_HUB_DISABLE_TELEMETRY is False


# --- what is refused ---


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--packing"], "--dpo goes with none of --plain_texts, --packing"),
        (["--streaming"], "--streaming and --data_weights: leave them out"),
        (["--data_weights", "2"], "--streaming and --data_weights: leave them out"),
        (["--plain_texts"], "--dpo goes with none of --plain_texts, --packing"),
        (["--use_lora", "--lora_dropout", "0.1"], "--lora_dropout has no effect with --dpo"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor has no effect with --dpo"),
        (["--dpo_beta", "0"], "--dpo_beta 0.0 must be above 0"),
        (["--dpo_loss", "l2"], "invalid choice: 'l2'"),
    ],
)
def test_wrong_usage(words, failed, more, reason):
    assert reason in failed(words(*more), status=2)


def test_the_best_model_is_told_by_what_preferences_are_measured_by(words, failed, tmp_path):
    metric = ["--metric_for_best_model", "rewards/margins", "--load_best_model_at_end"]
    each_step = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    main(words(*metric, "--max_steps", 3, *each_step, "--eval_fraction", 0.2))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    margins = [line["eval_rewards/margins"] for line in state["log_history"] if "eval_loss" in line]
    assert len(margins) == 3 and state["best_metric"] == max(margins)
    said = failed(words("--metric_for_best_model", "perplexity", output="other"))
    assert "perplexity is no metric of these evaluations: they have loss, rewards/margins, " in said


def test_settings_of_preferences_without_them(options, failed):
    assert "--dpo_beta and --dpo_loss need --dpo" in failed(options("--dpo_beta", 0.2), status=2)


def test_what_trl_refuses_is_one_sentence(tiny_model, byte_tokenizer, pairs, settings):
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "lm_head"])
    wrapped = get_peft_model(model, config)
    with pytest.raises(TrainingError, match="TRL can't train so: .*lm_head"):
        make_trainer(wrapped, None, byte_tokenizer, pairs, None, TrainingArguments(**settings()), new_adapter=True)


def test_an_old_trl_is_one_sentence(words, failed, monkeypatch):
    monkeypatch.setattr(preferences, "version", lambda name: "1.9.0")
    said = failed(words())
    assert said == "qwen1-finetune: --dpo needs trl 1.16 or newer, found 1.9.0: pip install --upgrade trl\n"


def test_an_old_python_is_one_sentence(words, failed, monkeypatch):
    monkeypatch.setattr(preferences, "sys", SimpleNamespace(version_info=(3, 10, 4)))
    assert failed(words()) == "qwen1-finetune: --dpo needs trl 1.16, which needs Python 3.11 or newer\n"


def test_too_long_pairs_leave_nothing(words, failed, tmp_path):
    said = failed(words("--model_max_length", 20))
    assert "Training data: none fits into --model_max_length 20; raise it." in said
