"""The loss that a training goes down by and an evaluation reports: of all learnt tokens, however they are laid out."""

import pytest
import torch

from qwen1 import QWenLMHeadModel
from qwen1.training.finetuning import load_examples, parse_arguments, run
from qwen1.training.models import load_tokenizer

ALL_IN_ONE_STEP = ["--max_steps", 1, "--gradient_accumulation_steps", 6]  # of two rows each
PLAIN_STEP = ["--optim", "sgd", "--learning_rate", 0.5, "--lr_scheduler_type", "constant", "--warmup_steps", 0]
PLAIN_STEP += ["--weight_decay", 0, "--max_grad_norm", 1]  # far below what it is
SMOOTHED = ["--label_smoothing_factor", 0.1]


@pytest.fixture
def examples(options, checkpoint_folder):
    """What the words of `options` train on."""
    _, data, _, args = parse_arguments(options())
    return load_examples(load_tokenizer(checkpoint_folder), data, args).examples


def expected_loss(model, examples, smoothing=0.0, training=True):
    """By torch's formula, an example at a time; beyond the trained length attention is scaled in evaluation only."""
    model.train(training)
    logits, labels = [], []
    for example in examples:
        ids, wanted = (torch.tensor([list(example[key])], dtype=torch.long) for key in ("input_ids", "labels"))
        logits.append(model(ids).logits[0, :-1])
        labels.append(wanted[0, 1:])
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), label_smoothing=smoothing)


def logged(trainer, name):
    return next(line[name] for line in reversed(trainer.state.log_history) if name in line)


# --- label smoothing ---


@pytest.mark.parametrize("more", [[], ["--packing"], ["--bf16"]], ids=["rows", "packed", "bf16"])
def test_a_step_with_label_smoothing_is_that_of_the_formula(options, examples, data, checkpoint_folder, more):
    trainer = run(parse_arguments(options(*ALL_IN_ONE_STEP, *PLAIN_STEP, *SMOOTHED, "--eval_data_path", data, *more)))
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    rough = 3e-2 if "--bf16" in more else 1e-5
    loss = expected_loss(model, examples, 0.1)
    assert abs(loss.item() - expected_loss(model, examples).item()) > 1e-3
    assert logged(trainer, "train_loss") == pytest.approx(loss.item(), rel=rough)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
    torch.optim.SGD(model.parameters(), 0.5).step()
    with torch.no_grad():
        after = expected_loss(model, examples, 0.1, training=False).item()
    for found, weight in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.data, weight.data, rtol=rough, atol=rough)
    assert logged(trainer, "eval_loss") == pytest.approx(after, rel=rough)


def test_label_smoothing_with_an_adapter(options, examples, data, checkpoint_folder):
    words = ["--use_lora", "--lora_r", 4, "--learning_rate", 0, *SMOOTHED, "--eval_data_path", data]
    trainer = run(parse_arguments(options(*ALL_IN_ONE_STEP, *words)))
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder)  # a new adapter changes nothing
    for name, training in {"train_loss": True, "eval_loss": False}.items():
        loss = expected_loss(model, examples, 0.1, training=training).item()
        assert logged(trainer, name) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("factor", [-0.1, 1, 1.5])
def test_a_share_that_is_none(options, failed, factor):
    said = failed(options("--label_smoothing_factor", factor), status=2)
    assert f"--label_smoothing_factor {float(factor)} must be from 0 to below 1" in said


# --- evaluation ---


@pytest.mark.parametrize("more", [[], ["--packing"], SMOOTHED], ids=["rows", "packed", "smoothed"])
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_the_loss_of_an_evaluation_is_that_of_all_its_tokens(options, examples, data, checkpoint_folder, batch, more):
    words = ["--max_steps", 1, "--learning_rate", 0, "--eval_data_path", data, "--per_device_eval_batch_size", batch]
    trainer = run(parse_arguments(options(*words, *more)))
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    loss = expected_loss(model, examples, 0.1 if more == SMOOTHED else 0.0, training=False)
    assert logged(trainer, "eval_loss") == pytest.approx(loss.item(), rel=1e-5)
    assert logged(trainer, "eval_perplexity") == pytest.approx(loss.exp().item(), rel=1e-4)


# --- the best model ---


@pytest.mark.parametrize("metric", ["loss", "perplexity", "eval_perplexity"])
def test_the_best_model_is_that_of_the_lowest_perplexity(options, data, metric):
    each_step = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "best", "--save_total_limit", 1]
    words = ["--max_steps", 3, *each_step, "--eval_data_path", data, "--metric_for_best_model", metric]
    trainer = run(parse_arguments(options(*words, "--load_best_model_at_end")))
    name = f"eval_{metric.removeprefix('eval_')}"
    values = {line["step"]: line[name] for line in trainer.state.log_history if name in line}
    best = min(values, key=values.__getitem__)
    assert len(values) == 3 and max(values.values()) > values[best]
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (best, values[best])


def test_what_is_better_can_be_said(options):
    words = ["--metric_for_best_model", "perplexity", "--greater_is_better", "True"]
    assert parse_arguments(options(*words))[-1].greater_is_better is True
