"""Linear, dynamic and YaRN scaling of rotary positions: transformers' own functions and its Qwen2 class decide."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.qwen import as_qwen, hf_to_qwen, qwen_config
from qwen1.conversion.formats.recipes import convert_tensors
from qwen1.modeling_qwen import RotaryEmbedding
from qwen1.positions_qwen import text_lengths

TRAINED = 32
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "attention_factor": 1.4,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "yarn-inferred": {"rope_type": "yarn", "factor": 2.0},
}


def their_config(name, **changes):
    values = dict(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=172,
        max_position_embeddings=TRAINED,
        initializer_range=0.2,
        use_sliding_window=False,
        rope_parameters={**SCALINGS[name], "rope_theta": 1000.0},
        attn_implementation="eager",
    )
    return Qwen2Config(**{**values, **changes})


@pytest.fixture(params=SCALINGS)
def twins(request):
    """Qwen2 and ours with the same weights and scaling, the latter by way of the converters."""
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(their_config(request.param)).eval()
    architecture = read_hf(theirs.config.to_dict())
    config = QWenConfig.from_dict({**qwen_config(as_qwen(architecture)), "use_flash_attn": False})
    config._attn_implementation = "eager"
    ours = QWenLMHeadModel(config).eval()
    ours.load_state_dict(convert_tensors(hf_to_qwen(architecture, torch.float32), theirs.state_dict()))
    assert ours.config.rope_parameters["rope_type"] == SCALINGS[request.param]["rope_type"]
    return theirs, ours


@pytest.mark.parametrize("length", [7, TRAINED, TRAINED + 1, 100])
@torch.no_grad()
def test_a_full_pass_gives_the_logits_of_qwen2(twins, length):
    theirs, ours = twins
    ids = torch.randint(0, 320, (2, length))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("prompt", [20, 60])
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_qwen2(twins, prompt):
    """Within, across and beyond the trained length; dynamic scaling leaves the keys that are there as they are."""
    ids = torch.randint(0, 320, (1, prompt + 20))
    chunks = [ids[:, :prompt], ids[:, prompt : prompt + 5], *ids[:, prompt + 5 :].split(1, dim=-1)]
    caches = [None, None]
    for chunk in chunks:
        outputs = [
            model(chunk, past_key_values=cache, use_cache=True) for model, cache in zip(twins, caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=5e-5, rtol=0)


def test_greedy_text_is_that_of_qwen2(twins):
    theirs, ours = twins
    settings = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = torch.randint(0, 320, (1, 20))
    assert ours.generate(ids, **settings).tolist() == theirs.generate(ids, **settings).tolist()


@torch.no_grad()
def test_a_row_of_a_batch_gets_what_it_gets_alone(twins):
    """Transformers stretches all rows by the longest; here none sees the others, nor an earlier call."""
    _, ours = twins
    ids = torch.randint(0, 320, (2, 60))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    alone = ours(ids[1:, 40:]).logits
    together = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[1:, 40:], alone, atol=5e-5, rtol=0)
    torch.testing.assert_close(together[:1], ours(ids[:1]).logits, atol=5e-5, rtol=0)


def test_scaling_counts_in_training_too(twins):
    ids = torch.randint(0, 320, (2, 50))
    losses = [model.train()(ids, labels=ids).loss for model in twins]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("length", [5, TRAINED, 200, 5000])
def test_angles_are_those_of_transformers(name, heads, length):
    theirs = their_config(name, num_attention_heads=heads, num_key_value_heads=heads)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs, seq_len=length)
    ours = QWenConfig(
        n_positions=TRAINED, kv_channels=64 // heads, rope_parameters={**SCALINGS[name], "rope_theta": 1000.0}
    )
    rotary = RotaryEmbedding(ours.rotary_dim, ours.rotary_emb_base, ours.rotary_scaling)
    positions = torch.arange(length)[None]
    torch.testing.assert_close(rotary.angles(positions)[0, -1, 0, : 32 // heads], (length - 1) * inv_freq)
    cos, _ = rotary.cos_sin(torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(cos, torch.full_like(cos, attention_factor))


@pytest.mark.parametrize("name", SCALINGS)
def test_only_the_rotated_share_of_a_head_is_scaled(name, tiny_model):
    """Qwen2 has no partial rotation; transformers' functions do."""
    rope = {**SCALINGS[name], "partial_rotary_factor": 0.5}
    model = tiny_model(use_dynamic_ntk=False, n_positions=TRAINED, rope_parameters=rope)
    assert model.config.rotary_dim == 8
    angles = model.transformer.rotary_emb.angles(torch.arange(50)[None])
    assert angles.shape == (1, 50, 1, 8)
    if name != "default":
        theirs = their_config(name, rope_parameters={**rope, "rope_theta": 10000.0})
        inv_freq, _ = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs, seq_len=50)
        torch.testing.assert_close(angles[0, -1, 0, :4], 49 * inv_freq)


def test_each_packed_document_has_its_own_length():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14]])
    assert text_lengths(positions).tolist() == [[4, 4, 4, 4, 2, 2, 1, 1], [1, 1, *6 * [6]], 8 * [15]]
    assert text_lengths(positions[:, -1:]).tolist() == [[1], [6], [15]]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_dynamic_scaling_compiles_into_one_graph(tiny_model):
    model = tiny_model("sdpa", use_dynamic_ntk=False, n_positions=TRAINED, rope_parameters=SCALINGS["dynamic"])
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (20, 40, 70):
        ids = torch.randint(0, 320, (1, length))
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=5e-5, rtol=0)


def test_a_configuration_changed_in_place_is_what_the_model_computes(tiny_config):
    config = tiny_config(use_dynamic_ntk=False)
    config.rope_parameters.update({"rope_type": "linear", "factor": 2, "rope_theta": 500.0})
    rotary = QWenLMHeadModel(config).transformer.rotary_emb
    assert (rotary.base, rotary.scaling.kind, rotary.scaling.factor) == (500.0, "linear", 2.0)
    config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(ValueError, match="'longrope'"):
        QWenLMHeadModel(config)
