"""QWenConfig: defaults, both published spellings, round trips, errors."""

import copy
import inspect
import json
import math
import pickle

import pytest
from transformers import GenerationConfig

from qwen1 import QWenConfig
from qwen1.configuration_qwen import AUTO_MAP

DOCUMENTED_DEFAULTS = {
    "vocab_size": 151851,
    "n_embd": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_inner": None,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "use_cache": True,
    "eos_token_id": 151643,
    "apply_residual_connection_post_layernorm": False,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "kv_channels": 128,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "use_flash_attn": True,
    "ffn_hidden_size": 22016,
    "no_bias": True,
    "tie_word_embeddings": False,
}
SPELLINGS = [
    ("hidden_size", "n_embd", 64),
    ("num_attention_heads", "n_head", 8),
    ("num_hidden_layers", "n_layer", 3),
    ("max_position_embeddings", "n_positions", 77),
    ("intermediate_size", "ffn_hidden_size", 100),
    ("attn_dropout_prob", "attn_pdrop", 0.25),
    ("emb_dropout_prob", "embd_pdrop", 0.5),
    ("attention_dropout", "attn_pdrop", 0.25),
    ("rms_norm_eps", "layer_norm_epsilon", 0.01),
    ("rope_theta", "rotary_emb_base", 1000000),
    ("partial_rotary_factor", "rotary_pct", 0.5),
    ("head_dim", "kv_channels", 64),
]


def published_configs(golden):
    files = [*golden.glob("published_configs/*.config.json"), *golden.glob("model/*/config.json")]
    return {file: json.loads(file.read_text()) for file in sorted(files)}


def test_constructor_is_the_documented_one():
    parameters = list(inspect.signature(QWenConfig.__init__).parameters.values())[1:]
    documented = {p.name: p.default for p in parameters[: len(DOCUMENTED_DEFAULTS)]}
    assert list(documented.items()) == list(DOCUMENTED_DEFAULTS.items())
    config = QWenConfig()
    assert {name: getattr(config, name) for name in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS


def test_positional_arguments_keep_their_order():
    config = QWenConfig(320, 64, 2, 4, None, 0.1, 0.2)
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_head) == (320, 64, 2, 4)
    assert (config.embd_pdrop, config.attn_pdrop) == (0.1, 0.2)


def test_class_attributes_are_the_documented_ones():
    assert QWenConfig.model_type == "qwen"
    assert QWenConfig.keys_to_ignore_at_inference == ["past_key_values", "cache"]
    assert QWenConfig.attribute_map == {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_hidden_layers": "n_layer",
    }


def test_published_files_survive_two_round_trips(golden, tmp_path):
    files = published_configs(golden)
    assert len(files) == 11
    for file, published in files.items():
        first = QWenConfig.from_dict(dict(published))
        first.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        ours = {"auto_map", "transformers_version"}
        lost = {key: value for key, value in published.items() if key not in ours and written.get(key, "lost") != value}
        assert not lost, file
        again = QWenConfig.from_pretrained(tmp_path)
        assert again.to_dict() == first.to_dict(), file


@pytest.mark.parametrize("spelling", [spelling for alias, name, _ in SPELLINGS for spelling in (alias, name)])
def test_every_spelling_is_listed(spelling):
    """Programs such as ms-swift look for the names that they know in `dir(config)`."""
    assert spelling in dir(QWenConfig()) and len(set(dir(QWenConfig()))) == len(dir(QWenConfig()))


@pytest.mark.parametrize(("alias", "name", "value"), SPELLINGS)
def test_both_spellings_are_read_set_and_written(alias, name, value):
    config = QWenConfig(**{alias: value})
    assert getattr(config, name) == getattr(config, alias) == value
    assert config.to_dict()[name] == config.to_dict().get(alias, value) == value
    changed = QWenConfig()
    setattr(changed, alias, value)
    assert getattr(changed, name) == value


@pytest.mark.parametrize(("alias", "name", "value"), SPELLINGS)
def test_contradicting_spellings_are_an_error(alias, name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*{alias}=") as error:
        QWenConfig(**{name: value, alias: value * 2})
    assert repr(value) in str(error.value) and repr(value * 2) in str(error.value)
    assert getattr(QWenConfig(**{name: value, alias: value}), name) == value


@pytest.mark.parametrize(
    ("name", "saved", "edited"),
    [("n_layer", 24, 32), ("layer_norm_epsilon", 1e-6, 1e-5), ("rotary_emb_base", 1000000, 10000)],
)
def test_a_file_edited_in_one_spelling_is_an_error(tmp_path, name, saved, edited):
    """Also where the new value is a default, which the constructor couldn't tell from none given."""
    QWenConfig(**{name: saved}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: edited}))
    with pytest.raises(ValueError, match=rf"{name}={edited}.*contradict"):
        QWenConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("override", [{"n_layer": 0}, {"rotary_pct": 2.0}, {"bf16": True, "fp16": True}, {"n_head": 5}])
def test_overrides_are_checked(tmp_path, override):
    QWenConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="=".join(map(str, next(iter(override.items()))))):
        QWenConfig.from_pretrained(tmp_path, **override)
    assert QWenConfig.from_pretrained(tmp_path, num_hidden_layers=3).n_layer == 3


def test_unused_arguments_are_given_back(tmp_path):
    QWenConfig().save_pretrained(tmp_path)
    config, unused = QWenConfig.from_pretrained(tmp_path, bf16=True, other=1, return_unused_kwargs=True)
    assert config.bf16 and unused == {"other": 1}


def test_an_override_replaces_the_flag_of_the_file():
    config = QWenConfig(fp32=True)
    config.override({"bf16": True, "n_layer": 3})
    assert (config.bf16, config.fp32, config.n_layer) == (True, False, 3)
    config.override({"bf16": False})
    assert config.precision_flag() is None


def test_comparison_sees_every_key():
    assert QWenConfig() == QWenConfig()
    assert QWenConfig() != QWenConfig(n_layer=3)
    assert QWenConfig() != QWenConfig(my_key=1)


def test_null_alias_means_not_given():
    assert QWenConfig(intermediate_size=None).ffn_hidden_size == 22016


def test_unknown_and_null_keys_are_kept(tmp_path):
    config = QWenConfig(onnx_safe=None, bias_dropout_fusion=True, my_key={"a": [1, 2]})
    config.save_pretrained(tmp_path)
    again = QWenConfig.from_pretrained(tmp_path)
    assert (again.onnx_safe, again.bias_dropout_fusion, again.my_key) == (None, True, {"a": [1, 2]})


def test_auto_map_names_every_class_and_keeps_foreign_entries():
    config = QWenConfig(auto_map={"AutoModelForDecision": "other.Model", "AutoModel": "old.Model"})
    assert config.to_dict()["auto_map"] == {"AutoModelForDecision": "other.Model", **AUTO_MAP}


def test_heads_default_to_no_groups():
    assert QWenConfig(n_head=16).num_key_value_heads == 16
    assert QWenConfig(n_head=16, num_key_value_heads=4).num_key_value_heads == 4


def test_seq_length_has_a_default():
    assert QWenConfig().seq_length == 2048


def test_embedding_rows_follow_the_padded_vocabulary():
    assert QWenConfig(vocab_size=300).embedding_rows == 300
    assert QWenConfig(vocab_size=300, padded_vocab_size=320).embedding_rows == 320
    assert QWenConfig(vocab_size=330, padded_vocab_size=320).embedding_rows == 330


def test_copies_and_pickles():
    config = QWenConfig(n_layer=3, my_key=1)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), QWenConfig(**config.to_dict())):
        assert other.n_layer == 3 and other.my_key == 1
        assert other.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_head": 32, "num_key_value_heads": 5}, ["n_head=32", "num_key_value_heads=5"]),
        ({"rotary_pct": 0.0}, ["rotary_pct=0.0"]),
        ({"rotary_pct": 1.5}, ["rotary_pct=1.5"]),
        ({"rotary_pct": 0.01}, ["kv_channels=128", "rotary_pct=0.01"]),
        ({"kv_channels": 2, "use_dynamic_ntk": True}, ["kv_channels=2", "4 or more"]),
        ({"vocab_size": -1}, ["vocab_size=-1"]),
        ({"n_layer": 0}, ["n_layer=0"]),
        ({"n_head": 2.0}, ["n_head=2.0"]),
        ({"kv_channels": True}, ["kv_channels=True"]),
        ({"ffn_hidden_size": 101}, ["ffn_hidden_size=101"]),
        ({"intermediate_size": -2}, ["ffn_hidden_size=-2"]),
        ({"padded_vocab_size": 0}, ["padded_vocab_size=0"]),
        ({"seq_length": -5}, ["seq_length=-5"]),
        ({"seq_length": 1, "use_logn_attn": True}, ["seq_length=1"]),
        ({"attn_pdrop": 1.0}, ["attn_pdrop=1.0"]),
        ({"emb_dropout_prob": -0.1}, ["embd_pdrop=-0.1"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon=0"]),
        ({"rotary_emb_base": -1}, ["rotary_emb_base=-1"]),
        ({"initializer_range": -1}, ["initializer_range=-1"]),
        ({"use_flash_attn": "yes"}, ["use_flash_attn='yes'"]),
        ({"bf16": True, "fp16": True}, ["bf16=True", "fp16=True"]),
        ({"fp32": True, "fp16": True}, ["fp32=True", "fp16=True"]),
        ({"embd_pdrop": "0.1"}, ["embd_pdrop='0.1'"]),
        ({"rms_norm_eps": "1e-6"}, ["layer_norm_epsilon='1e-6'"]),
        ({"layer_norm_epsilon": None}, ["layer_norm_epsilon=None"]),
        ({"layer_norm_epsilon": math.inf}, ["layer_norm_epsilon=inf"]),
        ({"rotary_emb_base": math.nan}, ["rotary_emb_base=nan"]),
        ({"rotary_pct": None}, ["rotary_pct=None"]),
        ({"initializer_range": None}, ["initializer_range=None"]),
        ({"padded_vocab_size": 320.5}, ["padded_vocab_size=320.5"]),
        ({"padded_vocab_size": True}, ["padded_vocab_size=True"]),
        ({"bf16": "no"}, ["bf16='no'"]),
        ({"no_bias": "x"}, ["no_bias='x'"]),
        ({"use_dynamic_ntk": 1}, ["use_dynamic_ntk=1"]),
        ({"use_flash_attn": 1}, ["use_flash_attn=1"]),
    ],
)
def test_impossible_values_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        QWenConfig(**changes)
    assert all(part in str(error.value) for part in named), str(error.value)


def test_the_repository_ships_the_7b_chat_configuration(golden, repository):
    published = json.loads((golden / "published_configs" / "2023-08-chat.config.json").read_text())
    ours = json.loads((repository / "config.json").read_text())
    added = {"auto_map": AUTO_MAP, "intermediate_size": 22016, "rms_norm_eps": 1e-6, "rope_theta": 10000}
    del published["transformers_version"]
    assert ours == {**published, **added}
    config = QWenConfig.from_pretrained(repository)
    assert (config.n_layer, config.seq_length, config.use_dynamic_ntk) == (32, 2048, True)


def test_the_repository_ships_the_7b_chat_generation_configuration(golden, repository):
    published = json.loads((golden / "published_configs" / "2023-08-chat.generation_config.json").read_text())
    ours = json.loads((repository / "generation_config.json").read_text())
    del published["transformers_version"]
    # Pipelines and servers know nothing of stop words: a reply has to end at <|im_end|> for them too.
    assert ours == {**published, "eos_token_id": [151645, 151643], "max_window_size": 6144}
    config = GenerationConfig.from_pretrained(repository)
    assert (config.chat_format, config.max_window_size, config.top_k) == ("chatml", 6144, 0)


def test_the_width_need_not_divide_into_heads():
    """Heads have a width of their own; transformers' tests of configurations use such a shape."""
    assert QWenConfig(hidden_size=37).kv_channels == 128


def test_a_file_has_two_spellings_of_each_key_to_edit(tmp_path):
    """Those of the published files; a third would make whoever edits both contradict it."""
    QWenConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {alias for alias, *_ in SPELLINGS} - written.keys() == {"attention_dropout"}
    assert QWenConfig(attention_dropout=0.1).attn_pdrop == 0.1
