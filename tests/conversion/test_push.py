"""Publishing on the Hub."""

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants, snapshot_download
from safetensors.torch import load_file, save_file

from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.publishing.card import model_card
from qwen1.conversion.publishing.upload import PushFile, files_to_push, push

REPO = "tester/tiny"

PUBLISH = """
import sys
from pathlib import Path
from qwen1.conversion.publishing.upload import push

print(push(Path(sys.argv[1]), sys.argv[2]))
"""

FOLLOW_THE_CARD = """
import re, sys, torch
from pathlib import Path
from huggingface_hub import snapshot_download

folder = snapshot_download(sys.argv[1], local_dir=sys.argv[2])
card = Path(folder, "README.md").read_text(encoding="utf-8")
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert "qwen1" not in sys.modules
kernels = sys.modules[type(model).__module__].wait()
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits, sys.argv[3])
print("by torch" if kernels is None else "by kernels")
"""


BY_THE_PACKAGE = """
import sys, torch
from qwen1 import QWenLMHeadModel, native_qwen

model = QWenLMHeadModel.from_pretrained(sys.argv[1])
kernels = native_qwen.wait()
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits, sys.argv[2])
print("by torch" if kernels is None else "by kernels")
"""


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """Direct this process to the Hub on this machine, logged in, with nothing cached and no waiting between retries."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield hub
    close_session()


@pytest.fixture
def offline(monkeypatch):
    """Let no connection be made."""

    def refuse(*arguments):
        raise AssertionError("nothing may be asked of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def run(hub, tmp_path, warm_with):
    """Run a script in a process of its own, directed to the Hub on this machine by the environment alone."""

    def run_script(script: str, *arguments) -> str:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_"))},
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [*warm_with(environment, "torch"), "-c", script, *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run_script


@pytest.fixture
def small_folder(tmp_path):
    """Make a folder that holds just what is looked at before a push: (model type, **configuration)."""

    def make(model_type: str = "qwen2", **changes) -> Path:
        folder = tmp_path / model_type
        folder.mkdir()
        values = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = {"model_type": model_type, **values, "max_position_embeddings": 4096, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {"model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.bfloat16)}
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Spread the tensors of a folder over files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    placed = {tensor: names[number % count] for number, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if placed[tensor] == name}, folder / name)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts(card: str) -> dict:
    """The table of a card."""
    return dict(re.findall(r"^\| (\w[^|]*) \| ([^|]*) \|$", card, re.MULTILINE))


# --- upload ---


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_pushed_checkpoint_comes_back_as_it_was(checkpoint_folder, hub, run, tmp_path):
    before = contents(checkpoint_folder)
    assert "README.md" not in before
    url = run(PUBLISH, checkpoint_folder, REPO).strip()
    assert url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].sha('main')}"
    assert contents(checkpoint_folder) == before
    assert len(hub.repositories[REPO].commits) == 2, "the first one comes with the repository"

    way = run(FOLLOW_THE_CARD, REPO, tmp_path / "back", tmp_path / "logits.pt")
    card = hub.repositories[REPO].files()["README.md"]
    after = {path: text for path, text in contents(tmp_path / "back").items() if not path.startswith(".")}
    assert after == {**before, "README.md": card}
    # In a process of its own too: bit for bit alike are only those that compute in the same way.
    assert run(BY_THE_PACKAGE, checkpoint_folder, tmp_path / "expected.pt").splitlines()[-1:] == way.splitlines()[-1:]
    ours, expected = torch.load(tmp_path / "logits.pt"), torch.load(tmp_path / "expected.pt")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cut", ["reset", "error"])
def test_an_interrupted_push_goes_on_with_what_is_missing(small_folder, online, cut):
    folder = small_folder("llama")
    tensors = {str(number): torch.full((4,), float(number)) for number in range(3)}
    save_file(tensors, folder / "model.safetensors")
    shard(folder)
    online.accepted, online.cut = 1, cut
    with pytest.raises(CheckpointError, match="run it again to resume.*model-00002-of-00003"):
        push(folder, REPO)
    assert len(online.sent) == 1
    assert sum(path.endswith("/batch") for path in online.paths) == 2, "the third file waits for the second"
    assert list(online.repositories[REPO].files()) == [".gitattributes"]

    online.accepted = None
    push(folder, REPO)
    assert len(online.sent) == len(set(online.sent)) == 3
    assert online.repositories[REPO].files()["README.md"] == model_card(folder, REPO).encode()
    back = Path(snapshot_download(REPO, cache_dir=folder.parent / "cache"))
    assert {path: contents(back)[path] for path in contents(folder)} == contents(folder)


def test_a_commit_that_fails_is_made_by_the_next_push(small_folder, online):
    folder = small_folder()
    online.failing = {"/commit/": 500}
    with pytest.raises(CheckpointError, match="run it again to resume.*500"):
        push(folder, REPO)
    online.failing = {}
    assert push(folder, REPO).endswith(online.repositories[REPO].sha("main"))
    assert len(online.sent) == 1


def test_a_push_without_changes_makes_no_commit(small_folder, online):
    folder = small_folder()
    first = push(folder, REPO)
    assert push(folder, REPO) == first
    (folder / "LICENSE").write_text("Terms")
    assert push(folder, REPO) != first
    assert len(online.sent) == 1


@pytest.mark.filterwarnings("error::UserWarning")  # with which huggingface_hub tells of a file that is named twice
def test_what_is_listed_is_what_arrives(small_folder, online):
    folder = small_folder()
    for name in ("README.md", "notes.txt", "config.json.bak", "assets/picture.png", "assets/.hidden.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    push(folder, REPO)
    arrived = {path: len(text) for path, text in online.repositories[REPO].files().items() if path != ".gitattributes"}
    listed = files_to_push(folder, REPO)
    assert listed == [PushFile(path, size) for path, size in sorted(arrived.items())]
    assert {"notes.txt", "assets/picture.png", "README.md"} <= set(arrived)


def test_the_commit_has_a_message(small_folder, online):
    folder = small_folder()
    push(folder, REPO)
    (folder / "notes.txt").write_text("new")
    push(folder, REPO, message="Add notes")
    assert online.messages == ["Upload model, tokenizer, code and card", "Add notes"]


def test_a_name_without_owner_is_completed(small_folder, online):
    folder = small_folder()
    assert f"/{REPO}/commit/" in push(folder, "tiny")
    assert b'from_pretrained("tester/tiny"' in online.repositories[REPO].files()["README.md"]


def test_a_revision_is_a_branch_that_is_made_if_missing(small_folder, online):
    folder = small_folder()
    push(folder, REPO)
    main = online.repositories[REPO].sha("main")
    online.paths.clear()
    for text in ("first", "second"):
        (folder / "notes.txt").write_text(text)
        push(folder, REPO, revision="trial/1")
        assert online.repositories[REPO].files("trial/1")["notes.txt"] == text.encode()
    assert online.repositories[REPO].sha("main") == main
    assert not any("/main" in path for path in online.paths)


def test_private_is_private(small_folder, online):
    folder = small_folder()
    push(folder, REPO, private=True)
    assert online.repositories[REPO].private
    push(folder, REPO)
    assert online.repositories[REPO].private

    online.add("tester/open")
    with pytest.raises(CheckpointError, match="tester/open exists and is public: make it private"):
        push(folder, "tester/open", private=True)
    assert list(online.repositories["tester/open"].files()) == [".gitattributes"]


def test_a_whole_file_on_the_hub_would_hide_shards(small_folder, online):
    folder = small_folder()
    push(folder, REPO)
    shard(folder, 1)
    commits = len(online.repositories[REPO].commits)
    with pytest.raises(CheckpointError, match="holds model.safetensors, which would be loaded.*`hf repos delete-files"):
        push(folder, REPO)
    with pytest.raises(CheckpointError, match="`hf repos delete-files tester/tiny model.safetensors --revision trial`"):
        push(folder, REPO, revision="trial")
    assert len(online.repositories[REPO].commits) == commits
    del online.repositories[REPO].files()["model.safetensors"]
    push(folder, REPO)
    assert "model-00001-of-00001.safetensors" in online.repositories[REPO].files()


# --- refusals of the Hub ---


def test_without_a_token_nothing_is_asked(small_folder, online, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="tester/tiny needs a token: log in with `hf auth login`"):
        push(small_folder(), REPO)
    assert not online.paths


def test_a_token_that_is_passed_goes_before_the_stored_one(small_folder, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    folder = small_folder()
    with pytest.raises(CheckpointError, match="doesn't know this token, or hides tester/tiny.*`hf auth login`"):
        push(folder, REPO)
    push(folder, REPO, token=online.token)
    assert REPO in online.repositories


@pytest.mark.parametrize("exists", [False, True])
def test_a_repository_of_somebody_else(small_folder, online, exists):
    if exists:
        online.add("somebody/else")
    with pytest.raises(CheckpointError, match="may not write to somebody/else.*`hf auth login`"):
        push(small_folder(), "somebody/else")
    assert not online.sent


def test_a_card_that_the_hub_refuses(small_folder, online):
    folder = small_folder()
    (folder / "README.md").write_text("---\nlicense: no such licence\n---\n")
    with pytest.raises(CheckpointError, match='refuses the upload to tester/tiny.*README.md.*"license" must be one of'):
        push(folder, REPO)


@pytest.mark.parametrize(
    "part, answer, message",
    [
        ("/preupload/", 404, r"refuses.*\b404\b"),
        ("/commit/", 413, r"refuses.*\b413\b"),
        ("/commit/", 409, r"run it again to resume.*\b409\b"),
        ("/branch/", 400, "refuses.*Bad request"),
        ("/verify", 403, r"run it again to resume.*\b403\b"),  # as an address that was signed for a while answers
        ("/batch", 503, r"run it again to resume.*\b503\b"),
        ("/validate-yaml", b"<html>Try later</html>", "run it again to resume"),
    ],
)
def test_requests_that_fail(small_folder, online, part, answer, message):
    online.failing = {part: answer}
    with pytest.raises(CheckpointError, match=message):
        push(small_folder(), REPO, revision="trial")
    assert len(online.repositories[REPO].commits) == 1


def test_no_network(small_folder, online, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(CheckpointError, match="The upload to tester/tiny stopped; run it again to resume.*refused"):
        push(small_folder(), REPO)


# --- files ---


def test_files_that_belong_to_a_repository(checkpoint_folder, offline):
    code = [path.name for path in checkpoint_folder.glob("*.py")]
    assert "modeling_qwen.py" in code
    others = ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"]
    more = [
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "merges.txt",
        "tokenizer.model",
        "assets/deep/a.PNG",
        ".gitattributes",
    ]
    for name in more:
        (checkpoint_folder / name).parent.mkdir(exist_ok=True, parents=True)
        (checkpoint_folder / name).write_text(name)
    files = files_to_push(checkpoint_folder)
    assert [file.path for file in files] == sorted([*code, *others, *more, "chat_template.jinja"])
    assert PushFile("LICENSE", 7) in files
    assert PushFile("model.safetensors", (checkpoint_folder / "model.safetensors").stat().st_size) in files


@pytest.mark.parametrize(
    "name",
    [
        ".git/config.json",
        ".cache/huggingface/x.json",
        ".hidden.json",
        "__pycache__/modeling_qwen.py",
        "config.json.bak",
        "config.bak.json",
        "LICENSE.bak2",
        "README.md~",
        "LICENSE~",
        "model.safetensors.tmp",
        "LICENSE.tmp",
        "other.partial/config.json",
        "NOTICE.partial",
        "old.bak/pytorch_model.bin",
        ".cache/pytorch_model.bin",
        "events.out.tfevents.1",
        "LICENSE.orig",
    ],
)
def test_files_that_stay_here(small_folder, name, offline):
    folder = small_folder()
    before = files_to_push(folder)
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("{}")
    assert files_to_push(folder) == before


def test_weights_may_be_links_into_the_hubs_cache(small_folder, online, tmp_path):
    folder = small_folder()
    blob = tmp_path / "models--tester--tiny" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert PushFile("model.safetensors", blob.stat().st_size) in files_to_push(folder)
    push(folder, REPO)
    assert online.repositories[REPO].files()["model.safetensors"] == blob.read_bytes()
    (folder / "vocab.json").symlink_to(folder / "nowhere")
    with pytest.raises(CheckpointError, match="vocab.json leads to no file: mend the link"):
        files_to_push(folder)


def test_a_card_to_be_written_is_listed(small_folder, offline):
    folder = small_folder()
    assert "README.md" not in [file.path for file in files_to_push(folder)]
    card = PushFile("README.md", len(model_card(folder, REPO).encode()))
    assert files_to_push(folder, REPO)[0] == card


# --- card ---


def test_card_of_a_qwen(checkpoint_folder, offline):
    card = model_card(checkpoint_folder, REPO)
    assert ModelCard(card).data.to_dict() == {
        "language": ["zh", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen", "custom_code"],
    }
    tensors = load_file(checkpoint_folder / "model.safetensors").values()
    assert facts(card) == {
        "Architecture": "QWenLMHeadModel",
        "Parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "Dtype": "float32",
        "Trained context length": "32 tokens",
        "Layers": "2",
        "Width": "64",
        "Attention heads": "4",
    }
    assert card.count('"tester/tiny", trust_remote_code=True') == 1
    assert 'device_map="auto", trust_remote_code=True' in card
    assert "model.chat(tokenizer" in card and "tiktoken" in card
    assert "The weights keep the licence of their origin." in card
    assert "\n# tiny\n" in card


def test_card_of_a_base_model_does_not_chat(checkpoint_folder, offline):
    edit_json(checkpoint_folder / "generation_config.json", chat_format="raw")
    card = model_card(checkpoint_folder, REPO)
    assert "model.chat" not in card and "model.generate" in card
    (checkpoint_folder / "generation_config.json").unlink()
    assert "model.chat" in model_card(checkpoint_folder, REPO), "as `chat` itself decides"


@pytest.mark.parametrize(
    "model_type, expected",
    [("qwen2", {"language": ["zh", "en"], "tags": ["qwen"]}), ("llama", {"tags": ["llama"]})],
)
def test_card_of_a_model_that_transformers_knows(small_folder, offline, model_type, expected):
    folder = small_folder(model_type, architectures=["SomeForCausalLM"])
    card = model_card(folder, REPO)
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **expected,
    }
    assert facts(card) == {
        "Architecture": "SomeForCausalLM",
        "Parameters": "80",
        "Dtype": "bfloat16",
        "Trained context length": "4,096 tokens",
        "Layers": "3",
        "Width": "8",
        "Attention heads": "2",
    }
    assert "trust_remote_code" not in card and "tiktoken" not in card and "model.chat(" not in card
    assert "apply_chat_template" not in card
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "apply_chat_template" in model_card(folder, REPO)


def test_context_length_is_the_one_before_yarn(small_folder, offline):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    folder = small_folder(max_position_embeddings=8192, rope_scaling=scaling)
    assert facts(model_card(folder, REPO))["Trained context length"] == "2,048 tokens"


def test_packed_weights_are_not_counted(small_folder, offline):
    folder = small_folder(quantization_config={"quant_method": "gptq", "bits": 4})
    found = facts(model_card(folder, REPO))
    assert found["Quantised with"] == "gptq"
    assert not {"Parameters", "Dtype"} & found.keys()


@pytest.mark.parametrize(
    ("method", "packages"), [("gptq", "gptqmodel optimum"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")]
)
def test_what_reads_weights_in_few_bits_is_installed(small_folder, offline, method, packages):
    card = model_card(small_folder(quantization_config={"quant_method": method, "bits": 4}), REPO)
    assert f"pip install transformers accelerate {packages}\n" in card


@pytest.mark.parametrize(
    "name, text, licence",
    [
        ("LICENSE", b"\n   Some LICENCE Agreement, 1.0\nmore", "some-licence-agreement-1-0"),
        ("LICENCE.md", "许可协议".encode("gbk"), "see-file"),
    ],
)
def test_card_with_a_licence(small_folder, offline, name, text, licence):
    folder = small_folder()
    (folder / "licences").mkdir()
    (folder / "licences" / "a.txt").write_text("Other terms")
    assert ModelCard(model_card(folder, REPO)).data.license is None
    (folder / "LICENCE-OF-PARTS").write_text("Other terms")
    (folder / name).write_bytes(text)
    card = model_card(folder, REPO)
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", licence, name)
    assert f"[{name}]({name})" in card and "of their origin" not in card


def test_a_card_with_front_matter_stays(small_folder, offline):
    folder = small_folder()
    text = "---\r\nlicense: mit\r\n---\r\n# 我的\r\n"
    (folder / "README.md").write_bytes(text.encode())
    assert model_card(folder, REPO) == text
    assert PushFile("README.md", len(text.encode())) in files_to_push(folder, REPO)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_card_without_front_matter_gets_one(small_folder, offline, encoding):
    folder = small_folder()
    text = "# Mine\n\n---\n\nwith a line\n"
    (folder / "README.md").write_text(text, encoding=encoding)
    card = model_card(folder, REPO)
    assert card.endswith("---\n\n" + text)
    assert ModelCard(card).data.library_name == "transformers"
    assert (folder / "README.md").read_text(encoding=encoding) == text


# --- refusals of a folder ---


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text="{}"):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def set_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def lose_a_shard(folder):
    shard(folder)[1].unlink()


def keep_a_stale_file(folder):
    stale = shard(folder)[0]
    stale.with_name("model-00004-of-00004.safetensors").write_bytes(stale.read_bytes())


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("config.json"), "has no config.json.*convert"),
        (write("config.json", "{"), "config.json is truncated or damaged"),
        (set_config(model_type="bert"), "model_type='bert'"),
        (remove("model.safetensors"), "No weights in "),
        (write("model.safetensors", "short"), "model.safetensors is truncated"),
        (lose_a_shard, r"model-00002-of-00003.safetensors doesn't exist.*index"),
        (keep_a_stale_file, "model-00004-of-00004.safetensors isn't part of the weights.*remove what is stale"),
        (pickle_weights, "pytorch_model.bin is a pickle.*`upgrade`"),
        (write("optimizer.pt"), "optimizer.pt is a pickle.*move"),
        (write("original/consolidated.00.pth"), "consolidated.00.pth is a pickle"),
        (write("pytorch_model.bin.index.json"), "pytorch_model.bin.index.json is a pickle, or an index"),
        (remove("modeling_qwen.py"), "modeling_qwen.py doesn't exist, but auto_map names it: run `upgrade`"),
        (remove("cache_qwen.py"), r"cache_qwen.py doesn't exist, but \w+_qwen.py names it: run `upgrade`"),
        (remove("tokenization_qwen.py"), "tokenization_qwen.py doesn't exist, but auto_map names it"),
        (set_config(auto_map=None), "no auto_map with AutoModelForCausalLM.*run `upgrade`"),
        (set_config(auto_map={"AutoModelForCausalLM": "a/b--modeling_qwen.X"}), "a/b--modeling_qwen.py doesn't exist"),
        (remove("qwen.tiktoken"), "neither qwen.tiktoken nor tokenizer.json: put one"),
        (write("README.md", "---\na: [\n---\n"), "README.md begins with no valid YAML.*mend it"),
        (write("README.md", "---\n- a\n---\n"), "README.md begins with no valid YAML.*mend it"),
        (write("README.md", b"\xff"), "README.md .*isn't UTF-8"),
        (set_config(n_embd=63), "config.json can't be used"),
    ],
)
def test_folders_that_are_refused(checkpoint_folder, offline, change, message):
    change(checkpoint_folder)
    for ask in (push, model_card):
        with pytest.raises(CheckpointError, match=message):
            ask(checkpoint_folder, REPO)
    if "can't be used" not in message:
        with pytest.raises(CheckpointError, match=message):
            files_to_push(checkpoint_folder)


def test_no_folder(tmp_path, offline):
    with pytest.raises(CheckpointError, match="nowhere doesn't exist: name the folder"):
        files_to_push(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file: name the folder"):
        push(tmp_path / "file", REPO)


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "", "späß", "x.git"])
def test_names_that_no_repository_can_have(small_folder, offline, name):
    folder = small_folder()
    for ask in (push, model_card, files_to_push):
        with pytest.raises(CheckpointError, match=f"{re.escape(repr(name))} can't be a repository: write"):
            ask(folder, name)


def test_a_tokenizer_json_is_vocabulary_enough(checkpoint_folder, offline):
    (checkpoint_folder / "qwen.tiktoken").rename(checkpoint_folder / "tokenizer.json")
    assert files_to_push(checkpoint_folder)


def test_the_card_of_a_model_from_llama_promises_neither_languages_nor_chat(checkpoint_folder):
    (checkpoint_folder / "qwen.tiktoken").unlink()
    (checkpoint_folder / "tokenizer.json").write_text('{"added_tokens": [{"content": "</s>", "id": 2}]}')
    card = model_card(checkpoint_folder, "somebody/tiny")
    assert "language:" not in card and "model.chat(" not in card and "model.generate(" in card
    assert "custom_code" in card
