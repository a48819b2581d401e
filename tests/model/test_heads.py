"""Forward arguments and outputs of the three model classes."""

import math

import pytest
import torch
from transformers import DynamicCache

from qwen1 import QWenForSequenceClassification, QWenModel


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_head_is_given_states_of_plain_strides(tiny_model, ids):
    """With those of a slice torch 2.13 expands and copies the weights of the head, which takes longer than the rest."""
    model, given = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    for rows in (1, 2):
        model(ids[:1].expand(rows, -1), logits_to_keep=1)
    assert [states.stride() for states in given] == [torch.empty(states.shape).stride() for states in given]


def test_logits_to_keep(tiny_model, ids):
    model = tiny_model()
    logits = model(ids).logits
    assert logits.shape == (2, 12, 464)
    for kept, expected in ((0, logits), (1, logits[:, -1:]), (3, logits[:, -3:])):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected)
    picked = torch.tensor([0, 5, 11])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, logits[:, picked])


@torch.no_grad()
def test_loss_is_the_mean_over_following_tokens(tiny_model, ids):
    model = tiny_model()
    labels = ids.clone()
    labels[0, :5] = -100
    output = model(ids, labels=labels)
    logs = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -logs[counted].mean())
    scaled = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(scaled, -logs[counted].sum() / 100)


@torch.no_grad()
def test_embeddings_in_place_of_ids(tiny_model, ids):
    model = tiny_model()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


@torch.no_grad()
def test_positions_given_win(tiny_model, ids):
    model = tiny_model()
    plain = model(ids).logits
    given = model(ids, position_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(given, plain)
    spread = model(ids, position_ids=torch.arange(0, 24, 2)[None], use_cache=True).logits
    assert not torch.allclose(spread, plain, atol=1e-2)


@torch.no_grad()
def test_tuple_and_dict_outputs(tiny_model, ids):
    for model in (tiny_model(), tiny_model(cls=QWenModel)):
        as_dict = model(ids, use_cache=False)
        as_tuple = model(ids, use_cache=False, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple[0], as_dict[0])


@torch.no_grad()
def test_cache_only_where_wanted(tiny_model, ids):
    model = tiny_model()
    assert isinstance(model(ids).past_key_values, DynamicCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@torch.no_grad()
def test_hidden_states(tiny_model, ids):
    model = tiny_model()
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(states[-1], model.transformer(ids).last_hidden_state)
    torch.testing.assert_close(model.lm_head(states[-1]), model(ids).logits)


def test_embeddings_can_be_replaced_and_resized(tiny_model, ids):
    model = tiny_model(padded_vocab_size=480)
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (480, 64)
    before = model(ids).logits
    model.resize_token_embeddings(500)
    assert model.config.vocab_size == model.config.embedding_rows == 500
    torch.testing.assert_close(model(ids).logits[..., :480], before)
    model.resize_token_embeddings(300)
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (300, 64)
    assert model.config.embedding_rows == 300
    torch.testing.assert_close(model(ids).logits, before[..., :300])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tiny_model, ids, tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    model.resize_token_embeddings(500)
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    model(ids, labels=ids).loss.backward()
    assert model.transformer.wte.weight.grad is not None


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_classification_scores_the_last_real_token(tiny_model, ids, padding_side):
    model = tiny_model(cls=QWenForSequenceClassification, num_labels=3, pad_token_id=256)
    alone = torch.cat([model(row[None]).logits for row in (ids[0], ids[1, :7])])
    assert alone.shape == (2, 3)
    padding = torch.full((5,), 256)
    second = [padding, ids[1, :7]] if padding_side == "left" else [ids[1, :7], padding]
    batch = torch.stack([ids[0], torch.cat(second)])
    logits = model(batch, attention_mask=(batch != 256).long()).logits
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_classification_learns(tiny_model, ids):
    model = tiny_model(cls=QWenForSequenceClassification, num_labels=2, pad_token_id=256).train()
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(ids, labels=labels).loss
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < first / 2


def test_initialisation(tiny_config):
    from qwen1 import QWenLMHeadModel

    torch.manual_seed(0)
    config = tiny_config(n_embd=256, kv_channels=64, ffn_hidden_size=1024, n_layer=8, no_bias=False)
    model = QWenLMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.05, name


def test_published_names_and_shapes(tiny_model):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model(n_layer=1).state_dict().items()}
    assert shapes == {
        "transformer.wte.weight": (464, 64),
        "transformer.h.0.ln_1.weight": (64,),
        "transformer.h.0.attn.c_attn.weight": (192, 64),
        "transformer.h.0.attn.c_attn.bias": (192,),
        "transformer.h.0.attn.c_proj.weight": (64, 64),
        "transformer.h.0.ln_2.weight": (64,),
        "transformer.h.0.mlp.w1.weight": (96, 64),
        "transformer.h.0.mlp.w2.weight": (96, 64),
        "transformer.h.0.mlp.c_proj.weight": (64, 96),
        "transformer.ln_f.weight": (64,),
        "lm_head.weight": (464, 64),
    }
