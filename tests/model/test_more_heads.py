"""Heads for texts, tokens and answers: as Qwen2's on the same weights, and what they take on each release."""

import inspect
import warnings

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, DynamicCache

from qwen1 import QWenForQuestionAnswering, QWenForSequenceClassification, QWenForTokenClassification, QWenLMHeadModel
from qwen1.arguments_qwen import CACHE_NAMES

PLAIN = dict(use_dynamic_ntk=False, use_logn_attn=False, num_labels=3, pad_token_id=256)
LABELS = {
    QWenForSequenceClassification: {"labels": torch.tensor([0, 2])},
    QWenForTokenClassification: {"labels": torch.tensor([[0, 2, 1, -100] * 3, [1, 1, 2, 0] * 3])},
    QWenForQuestionAnswering: {"start_positions": torch.tensor([2, 3]), "end_positions": torch.tensor([5, 40])},
}


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", LABELS)
@pytest.mark.parametrize("training", [False, True])
def test_as_the_head_of_qwen2(tiny_model, qwen2_twin, ids, cls, training):
    model = tiny_model("sdpa", cls=cls, classifier_dropout=0.0, **PLAIN).train(training)
    other = qwen2_twin(model).train(training)
    for module in other.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 256
    arguments = dict(attention_mask=mask, **LABELS[cls])
    ours, theirs = (runner(ids, **arguments) for runner in (model, other))
    torch.testing.assert_close(ours.loss, theirs.loss)
    real = mask.bool()
    for name in theirs.keys() & {"logits", "start_logits", "end_logits"}:
        shown = real if ours[name].shape[:2] == ids.shape else slice(None)
        torch.testing.assert_close(ours[name][shown], theirs[name][shown], atol=1e-4, rtol=1e-4)
    ours.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    in_order = model(ids, mask, None, None, None, *LABELS[cls].values())
    torch.testing.assert_close(in_order.loss, ours.loss)


@pytest.mark.parametrize("cls", LABELS)
@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_cache_goes_on_under_either_name(tiny_model, ids, cls, name):
    model = tiny_model("sdpa", cls=cls, **PLAIN)
    assert list(inspect.signature(model.forward).parameters)[:5] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds",
    ]  # fmt: skip
    whole, cache = model(ids), DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model(ids[:, :8], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 8
        rest = model(ids[:, 8:], use_cache=True, **{name: cache})
        if cls is QWenForSequenceClassification:
            assert rest.cache is rest.past_key_values is rest[CACHE_NAMES[0]] is cache
    key = "start_logits" if cls is QWenForQuestionAnswering else "logits"
    expected = whole[key] if cls is QWenForSequenceClassification else whole[key][:, 8:]
    torch.testing.assert_close(rest[key], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=DynamicCache())
    as_tuple = model(ids, use_cache=False, return_dict=False)
    torch.testing.assert_close(as_tuple[0], whole[key])


@pytest.mark.parametrize("cls", LABELS)
def test_unknown_arguments_are_refused(tiny_model, ids, cls):
    model = tiny_model(cls=cls, **PLAIN)
    for name in ("past_key_value", "cache_position", "seen"):
        with pytest.raises(TypeError, match=f"doesn't know {name}"):
            model(ids, **{name: torch.zeros(1)})


@pytest.mark.parametrize("cls", LABELS)
def test_a_new_head_on_a_language_model(tiny_model, tiny_config, ids, tmp_path, cls):
    language = tiny_model(tie_word_embeddings=False)
    language.save_pretrained(tmp_path / "language")
    model, info = cls.from_pretrained(tmp_path / "language", num_labels=3, output_loading_info=True)
    new = {"qa_outputs.weight", "qa_outputs.bias"} if cls is QWenForQuestionAnswering else {"score.weight"}
    assert set(info["missing_keys"]) == new | ({"score.bias"} if cls is QWenForTokenClassification else set())
    assert not info["unexpected_keys"]
    states = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(states, language.transformer(ids).last_hidden_state)
    assert model.get_input_embeddings() is model.transformer.wte
    model.resize_token_embeddings(470)
    assert model.transformer.wte.weight.shape == (470, 64)
    model.save_pretrained(tmp_path / "own")
    again = cls.from_pretrained(tmp_path / "own").eval()
    assert again.config.num_labels == model.config.num_labels
    torch.testing.assert_close(again(ids[:1])[0], model.eval()(ids[:1])[0])
    QWenLMHeadModel.from_pretrained(tmp_path / "own")  # the other way round


def test_the_auto_classes_find_them(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)) is QWenForTokenClassification
    assert type(AutoModelForQuestionAnswering.from_pretrained(tmp_path)) is QWenForQuestionAnswering


def test_a_loss_of_ones_own_is_given_what_it_names(tiny_model, ids):
    def weighted(logits, labels, vocab_size, token_weights=None, **kwargs):
        logs = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
        return -(logs * token_weights[:, 1:]).sum()

    model, weights = tiny_model().train(), torch.rand(2, 12)
    with pytest.raises(TypeError, match="token_weights"):
        model(ids, labels=ids, token_weights=weights)
    model.loss_function = weighted
    output = model(ids, labels=ids, token_weights=weights)
    torch.testing.assert_close(output.loss, weighted(output.logits, ids, 464, weights))
    for arguments in ({"token_weights": weights}, {"labels": ids, "token_weight": weights}):
        with pytest.raises(TypeError, match="doesn't know token_weight"):
            model(ids, **arguments)
