"""The rotary dictionary of transformers' configurations: both spellings, overrides, round trips, refusals."""

import copy
import json
import logging

import pytest
from transformers import AutoConfig, Qwen2Config

from qwen1 import QWenConfig, QWenModel

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 3.0},
    YARN,
    {**YARN, "attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
]
BOTH = ("rope_parameters", "rope_scaling")


def refusal(**changes):
    with pytest.raises(ValueError) as error:
        QWenConfig(**changes)
    return str(error.value)


def test_without_scaling_it_says_what_the_other_keys_say():
    config = QWenConfig(rotary_emb_base=1000000, rotary_pct=0.5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}
    assert config.rope_scaling is None
    assert not set(BOTH) & set(config.to_dict())


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("rope", SCALINGS)
def test_both_spellings_are_read_and_written(tmp_path, spelling, rope):
    config = QWenConfig(**{spelling: rope}, rotary_emb_base=1000000)
    expected = {**rope, "rope_theta": 1000000, "partial_rotary_factor": 1.0}
    assert config.rope_parameters == config.rope_scaling == expected
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"] == expected
    assert written["rope_scaling"] == {**expected, "type": rope["rope_type"]}
    again = QWenConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == expected and again.to_dict() == config.to_dict()
    assert again.rotary_scaling == config.rotary_scaling
    for other in (copy.deepcopy(config), QWenConfig(**config.to_dict())):
        assert other.to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_the_older_type_and_whole_numbers_are_understood():
    config = QWenConfig(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": None})
    assert config.rope_parameters["rope_type"] == "yarn" and "type" not in config.rope_parameters
    assert (config.rotary_scaling.factor, config.rotary_scaling.beta_fast, config.rotary_scaling.beta_slow) == (
        4,
        16,
        1,
    )


def test_yarn_measures_by_the_longest_position_where_nothing_else_is_said():
    """As transformers does, which writes it down."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    ours = QWenConfig(n_positions=512, rope_parameters=rope)
    theirs = Qwen2Config(max_position_embeddings=512, rope_parameters=dict(rope))
    for config in (ours, theirs):
        assert config.rope_parameters["original_max_position_embeddings"] == 512
    assert ours.rotary_scaling.length == 512


@pytest.mark.parametrize("spelling", BOTH)
def test_theta_and_share_inside_are_spellings_of_the_documented_keys(spelling):
    inside = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    config = QWenConfig(**{spelling: inside})
    assert (config.rotary_emb_base, config.rope_theta, config.rotary_pct, config.rotary_dim) == (5000, 5000, 0.5, 64)
    assert config.to_dict()["rotary_emb_base"] == config.to_dict()["rope_theta"] == 5000
    for name, value in (("rotary_emb_base", 700), ("rope_theta", 700), ("rotary_pct", 0.25)):
        message = refusal(**{spelling: inside, name: value})
        assert f"{name}={value}" in message and "contradict" in message
    assert "contradict" in refusal(**{spelling: inside}, rope_theta=10000)  # given, though it is the default


def test_the_two_spellings_may_not_differ(tmp_path):
    assert "rope_scaling.factor=3.0" in refusal(
        rope_parameters=SCALINGS[0], rope_scaling={"type": "linear", "factor": 3.0}
    )
    assert "contradict" in refusal(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 3.0})
    QWenConfig(rope_parameters={**YARN, "rope_theta": 5000.0}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rotary_emb_base": 10000}))
    with pytest.raises(ValueError, match="rotary_emb_base=10000.*contradict"):
        QWenConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("spelling", BOTH)
def test_an_override_keeps_theta_and_replaces_the_scaling(tmp_path, spelling):
    QWenConfig(rotary_emb_base=1000000, rope_parameters=SCALINGS[1]).save_pretrained(tmp_path)
    given = {"rope_type": "yarn", "factor": 2.0}
    config = QWenConfig.from_pretrained(tmp_path, **{spelling: given}, max_position_embeddings=64)
    assert config.rotary_emb_base == 1000000
    assert (config.rotary_scaling.kind, config.rotary_scaling.factor, config.rotary_scaling.length) == ("yarn", 2, 64)
    assert given == {"rope_type": "yarn", "factor": 2.0}
    assert QWenConfig.from_pretrained(tmp_path, **{spelling: None}).rotary_scaling.kind == "default"
    assert QWenConfig.from_pretrained(tmp_path, **{spelling: {"rope_theta": 5.0}}).rotary_emb_base == 5.0
    with pytest.raises(ValueError, match="'longrope'"):
        QWenConfig.from_pretrained(tmp_path, **{spelling: {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match="contradict"):
        QWenConfig.from_pretrained(tmp_path, **{spelling: {"rope_theta": 5.0}}, rope_theta=6.0)


def test_models_are_loaded_with_it(tmp_path, tiny_model):
    tiny_model(cls=QWenModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dynamic_ntk=False"):
        QWenModel.from_pretrained(tmp_path, rope_scaling={"type": "yarn", "factor": 2.0})
    model = QWenModel.from_pretrained(tmp_path, use_dynamic_ntk=False, rope_scaling={"type": "yarn", "factor": 2.0})
    assert model.rotary_emb.scaling.kind == "yarn"
    model.save_pretrained(tmp_path)
    assert QWenModel.from_pretrained(tmp_path).rotary_emb.scaling == model.rotary_emb.scaling


def test_setting_one_key_leaves_shallow_copies_alone():
    config = QWenConfig()
    other = copy.copy(config)
    other.rotary_emb_base = 5
    assert (config.rotary_emb_base, other.rotary_emb_base, other.rope_parameters["rope_theta"]) == (10000, 5, 5)


def test_what_other_programs_call_is_harmless():
    """vLLM sets the standard names and asks for completion before it reads the dictionary."""
    config = QWenConfig(rope_parameters=YARN)
    expected = copy.deepcopy(config.rope_parameters)
    config.rope_theta, config.partial_rotary_factor = config.rotary_emb_base, config.rotary_pct
    config.standardize_rope_params()
    config.validate_rope()
    assert config.rope_parameters == expected


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, ["rope_type='longrope'", "'yarn'"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["rope_type='llama3'"]),
        ({"rope_type": "proportional"}, ["rope_type='proportional'"]),
        ({"type": "su"}, ["rope_type='su'"]),
        ({"type": ["linear"]}, ["rope_type=['linear']"]),
        ({"full_attention": {"rope_type": "default"}}, ["full_attention="]),
        ({"factor": 2.0}, ["factor=2.0", "rope_type='default'"]),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, ["mrope_section=[2, 3, 3]"]),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, ["alpha=1000.0", "'dynamic'"]),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, ["beta_fast=3.0", "'linear'"]),
        ({"rope_type": "linear"}, ["'linear'", "factor"]),
        ({"rope_type": "linear", "factor": 0.5}, ["factor=0.5"]),
        ({"rope_type": "yarn", "factor": "4"}, ["factor='4'"]),
        ({"rope_type": "yarn", "factor": True}, ["factor=True"]),
        ({**YARN, "original_max_position_embeddings": 0}, ["original_max_position_embeddings=0"]),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast=1.0", "beta_slow=2.0"]),
        ({**YARN, "truncate": "no"}, ["truncate='no'"]),
        ({**YARN, "rope_theta": 1.0}, ["rope_theta=1.0"]),
        ({"rope_type": "default", "rope_theta": -1.0}, ["rotary_emb_base=-1.0"]),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, ["rotary_pct=1.5"]),
        ("yarn", ["rope_parameters='yarn'"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(rope, named):
    message = refusal(rope_parameters=rope)
    assert all(part in message for part in named), message


@pytest.mark.parametrize("rope", SCALINGS)
def test_two_stretches_at_once_are_refused(rope):
    message = refusal(rope_parameters=rope, use_dynamic_ntk=True)
    assert "use_dynamic_ntk=True" in message and repr(rope["rope_type"]) in message and "=False" in message
    QWenConfig(rope_parameters=rope, use_logn_attn=True)
    QWenConfig(rope_parameters={"rope_type": "default"}, use_dynamic_ntk=True)


def test_dynamic_scaling_needs_four_rotated_channels():
    assert "4 or more" in refusal(kv_channels=2, rope_parameters=SCALINGS[1])


def test_a_length_that_dynamic_scaling_does_not_go_by_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("qwen1.configuration_qwen"), "propagate", True)
    QWenConfig(seq_length=2048, n_positions=2047, rope_parameters=SCALINGS[1])
    assert "n_positions" not in caplog.text
    QWenConfig(seq_length=2048, n_positions=6145, rope_parameters=SCALINGS[1])
    assert "n_positions=6145" in caplog.text and "max_position_embeddings=2048" in caplog.text
