"""Whose code the Auto classes run in a program that imports this package."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import qwen1

REMOTE = {"trust_remote_code": True}
LOADERS = {"configuration": AutoConfig, "model": AutoModelForCausalLM, "tokenizer": AutoTokenizer}
CODE = {
    "configuration_qwen.py": """
from transformers import PretrainedConfig
class QWenConfig(PretrainedConfig):
    model_type = "qwen"
    def __init__(self, visual=None, audio=None, **kwargs):
        self.visual, self.audio = visual, audio
        super().__init__(**kwargs)
""",
    "modeling_qwen.py": """
from torch import nn
from transformers import PreTrainedModel
from .configuration_qwen import QWenConfig
class QWenLMHeadModel(PreTrainedModel):
    config_class = QWenConfig
    sees = True
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(1, 1)
        self.post_init()
""",
    "tokenization_qwen.py": """
from transformers import PreTrainedTokenizer
class QWenTokenizer(PreTrainedTokenizer):
    sees = True
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}
    def __init__(self, vocab_file, **kwargs):
        super().__init__(**kwargs)
    vocab_size = 1
    def get_vocab(self):
        return {"a": 0}
""",
}


def with_code(folder, values, code):
    """Give a folder the code of others, under the names that the published files have."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, **values}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            }
        )
    )
    for name, text in code.items():
        (folder / name).write_text(text)
    for stale in ("tokenizer.json", "model.safetensors"):
        (folder / stale).unlink(missing_ok=True)
    return folder


@pytest.fixture(params=["visual", "audio"])
def relative(request, checkpoint_folder):
    return with_code(checkpoint_folder, {request.param: {"width": 8}}, CODE)


@pytest.fixture
def folder_of_2023(checkpoint_folder):
    """Whose code fails as soon as it is run, as that of 2023 does."""
    weights = (checkpoint_folder / "model.safetensors").read_bytes()
    with_code(checkpoint_folder, {}, dict.fromkeys(CODE, "raise SystemError('the code of the folder was run')"))
    (checkpoint_folder / "model.safetensors").write_bytes(weights)
    return checkpoint_folder


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}], ids=["default", "no"])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_relatives_are_refused_by_name(relative, loader, trust):
    with pytest.raises(ValueError, match=r"Qwen-(VL|Audio).*trust_remote_code=True.*Qwen-7B-Chat"):
        loader.from_pretrained(relative, **trust)


def test_relatives_are_refused_by_the_classes_themselves(relative):
    for own in (qwen1.QWenConfig, qwen1.QWenLMHeadModel, qwen1.QWenModel):
        with pytest.raises(ValueError, match=r"Qwen-(VL|Audio)"):
            own.from_pretrained(relative)
    with pytest.raises(ValueError, match="Qwen-VL"):
        qwen1.QWenConfig(visual={"width": 8})
    assert qwen1.QWenConfig(visual=None, audio={}).n_embd == 4096  # which says that there is none


def test_the_code_of_relatives_stays_theirs(relative, tmp_path):
    config = AutoConfig.from_pretrained(relative, **REMOTE)
    assert not isinstance(config, qwen1.QWenConfig) and (config.visual or config.audio) == {"width": 8}
    config.save_pretrained(relative)
    tokenizer = AutoTokenizer.from_pretrained(relative, **REMOTE)
    assert tokenizer.sees
    model = AutoModelForCausalLM.from_config(config, **REMOTE)
    model.save_pretrained(relative)
    assert AutoModelForCausalLM.from_pretrained(relative, **REMOTE).sees
    loaded, unused = AutoConfig.from_pretrained(relative, return_unused_kwargs=True, other=1, **REMOTE)
    assert type(loaded) is type(config) and unused == {"other": 1}


def test_code_under_other_names_is_of_somebody_else(checkpoint_folder):
    """A model of someone's own that started from this one."""
    own = {name.replace("qwen", "mine"): text.replace("_qwen", "_mine") for name, text in CODE.items()}
    auto_map = {"AutoConfig": "configuration_mine.QWenConfig", "AutoModelForCausalLM": "modeling_mine.QWenLMHeadModel"}
    folder = with_code(checkpoint_folder, {"auto_map": auto_map}, own)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_mine.QWenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "configuration_mine" in type(AutoConfig.from_pretrained(folder, **REMOTE)).__module__
    assert AutoTokenizer.from_pretrained(folder, **REMOTE).sees
    assert type(AutoConfig.from_pretrained(folder)) is qwen1.QWenConfig
    assert type(AutoTokenizer.from_pretrained(folder)) is qwen1.QWenTokenizerFast


@pytest.mark.parametrize("trust", [{}, REMOTE], ids=["default", "trusted"])
def test_code_of_2023_is_never_run(folder_of_2023, trust):
    """Not where `trust_remote_code=True` is left in either, as all programs of 2023 have it."""
    assert type(AutoConfig.from_pretrained(folder_of_2023, **trust)) is qwen1.QWenConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder_of_2023, **trust)) is qwen1.QWenLMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(folder_of_2023, **trust)
    assert type(tokenizer) is qwen1.QWenTokenizerFast and tokenizer.decode(tokenizer.encode("你好")) == "你好"
    slow = AutoTokenizer.from_pretrained(folder_of_2023, backend="tiktoken", **trust)
    assert type(slow) is qwen1.QWenTokenizer
    assert pipeline("text-generation", str(folder_of_2023), **trust)("a", max_new_tokens=1)


@pytest.mark.parametrize("form", ["list", "other repository", "without config.json"])
def test_every_form_of_the_published_names(folder_of_2023, form):
    path = folder_of_2023 / "tokenizer_config.json"
    values = json.loads(path.read_text())
    if form == "list":
        values["auto_map"] = ["tokenization_qwen.QWenTokenizer", None]
    elif form == "other repository":
        values["auto_map"] = {"AutoTokenizer": ["Qwen/Qwen-7B-Chat--tokenization_qwen.QWenTokenizer", None]}
    else:
        (folder_of_2023 / "config.json").unlink()
    path.write_text(json.dumps(values))
    assert isinstance(
        AutoTokenizer.from_pretrained(folder_of_2023, **REMOTE), qwen1.QWenTokenizer | qwen1.QWenTokenizerFast
    )


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
)
def test_pointers_of_git_lfs_are_named(checkpoint_folder, name):
    """What a clone without Git LFS has in the place of a file, and transformers calls damaged."""
    (checkpoint_folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    loaders = [AutoModelForCausalLM, qwen1.QWenLMHeadModel]
    if name != "model.safetensors":
        loaders += [AutoTokenizer, AutoConfig]
    for loader in loaders:
        with pytest.raises(OSError, match=rf"{name}' is a pointer of Git LFS.*`git lfs pull` in "):
            loader.from_pretrained(checkpoint_folder)


def test_other_models_are_left_alone(tmp_path):
    """What isn't of type "qwen" goes where it went."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "visual": {"width": 8}}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    assert AutoConfig.from_pretrained(tmp_path, **REMOTE).model_type == "llama"
    with pytest.raises(OSError, match="nowhere"):
        AutoConfig.from_pretrained(tmp_path / "nowhere", **REMOTE)
