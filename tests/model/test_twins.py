"""Transformers' own Qwen2 and LLaMA classes as twins, on the same random weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.qwen import hf_to_qwen
from qwen1.conversion.formats.recipes import convert_tensors

SHAPE = dict(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)


def to_qwen(model, tensors=None):
    """The weights of a Qwen2 or LLaMA model, or other tensors of the same names, under QWen's names."""
    architecture = read_hf(model.config.to_dict())
    state = convert_tensors(hf_to_qwen(architecture, torch.float32), tensors or model.state_dict())
    return {"lm_head.weight": state["transformer.wte.weight"], **state}  # stored once where it is tied


@pytest.fixture(params=["qwen2", "qwen2-grouped-tied", "llama-grouped"])
def twins(request):
    """Their model and ours with the same weights, (implementation) -> (theirs, ours)."""

    def make(implementation="eager"):
        torch.manual_seed(0)
        grouped, tied = "grouped" in request.param, "tied" in request.param
        config_class, model_class = (
            (LlamaConfig, LlamaForCausalLM) if request.param.startswith("llama") else (Qwen2Config, Qwen2ForCausalLM)
        )
        theirs = model_class(
            config_class(
                **SHAPE,
                num_key_value_heads=2 if grouped else 4,
                intermediate_size=172,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                tie_word_embeddings=tied,
                initializer_range=0.2,
                attn_implementation=implementation,
            )
        )
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        ours = QWenLMHeadModel(
            QWenConfig(
                **SHAPE,
                num_key_value_heads=2 if grouped else 4,
                ffn_hidden_size=344,
                kv_channels=16,
                layer_norm_epsilon=1e-6,
                rotary_emb_base=1e6,
                tie_word_embeddings=tied,
                use_flash_attn=False,
                attn_implementation=implementation,
            )
        )
        ours.load_state_dict(to_qwen(theirs))
        return theirs.eval(), ours.eval()

    return make


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_padding_and_cache(twins, implementation):
    theirs, ours = twins(implementation)
    ids = torch.randint(0, 320, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :25] = mask[2, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    output = ours(ids, attention_mask=mask, use_cache=True)
    real = mask.bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=5e-5, rtol=0)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], dim=1)
    more = torch.randint(0, 320, (3, 4))
    positions = (mask.cumsum(-1) - 1)[:, -4:]
    expected = theirs(more, attention_mask=mask, position_ids=positions, past_key_values=expected.past_key_values)
    output = ours(more, attention_mask=mask, past_key_values=output.past_key_values)
    torch.testing.assert_close(output.logits, expected.logits, atol=5e-5, rtol=0)


def test_greedy_text(twins):
    theirs, ours = twins("sdpa")
    ids = torch.randint(0, 320, (2, 10))
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ours.generate(ids, **settings).tolist() == theirs.generate(ids, **settings).tolist()


def test_loss_and_gradients(twins):
    theirs, ours = twins("eager")
    ids = torch.randint(0, 320, (2, 30))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    losses = [model.train()(ids, labels=labels).loss for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    golden = to_qwen(theirs, {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        if "c_attn.bias" in name and theirs.config.model_type == "llama":
            continue  # LLaMA has none to compare with
        assert (parameter.grad - golden[name]).norm() <= 1e-4 * golden[name].norm(), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_bfloat16_error_is_bounded_by_theirs(twins, implementation):
    """At most three times the error that their class makes in bf16 on the same weights."""
    theirs, ours = twins(implementation)
    ids = torch.randint(0, 320, (4, 64))
    exact = theirs(ids).logits
    errors = [(model.bfloat16()(ids).logits.float() - exact).abs() for model in (theirs, ours)]
    assert errors[1].mean() <= 3 * errors[0].mean()
    assert errors[1].max() <= 3 * errors[0].max()
