"""peft's methods that reach for the cache: those that put something before the prompt, and the shadow model."""

import pytest
import torch

peft = pytest.importorskip("peft")

VIRTUAL = 5
CONFIGURATIONS = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "shadow": lambda: peft.ShadowConfig(task_type="CAUSAL_LM", r=2, shadow_num_hidden_layers=1),
}


@pytest.fixture(params=CONFIGURATIONS)
def adapted(request, tiny_model):
    """A model with a method of peft's that has learnt something; without stretching, which a longer text would get."""
    model = tiny_model(use_dynamic_ntk=False, use_logn_attn=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, CONFIGURATIONS[request.param]()).eval()
    for name, parameter in adapted.named_parameters():
        if "prompt_encoder" in name or "shadow" in name:
            torch.nn.init.normal_(parameter.data)
    return adapted


@pytest.fixture
def prompt():
    return torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(3))


def test_generate_goes_on_from_what_was_learnt(adapted, prompt):
    generated = adapted.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            logits = adapted(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_what_was_learnt_counts(adapted, prompt):
    settings = {"input_ids": prompt, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = adapted.generate(**settings)
    with adapted.disable_adapter():
        assert not torch.equal(generated, adapted.generate(**settings))
