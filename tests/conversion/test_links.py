"""Links: none leads out of a checkpoint, but those of the Hub's cache work."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from qwen1.conversion import commands
from qwen1.conversion.command_line.upgrade import upgrade_in_place
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.links import check_links, resolved, stray_links
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

SECRET = "nobody else may read this"


@pytest.fixture
def secret(tmp_path):
    """A file and a folder outside of the checkpoint."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text(SECRET)
    return tmp_path / "outside" / "secret"


@pytest.fixture
def folder(checkpoint_folder):
    (checkpoint_folder / "LICENSE").write_text("Of the model")
    return checkpoint_folder


LINKS = {
    "absolute": lambda folder, secret: (folder / "README.md").symlink_to(secret),
    "relative": lambda folder, secret: (folder / "README.md").symlink_to("../outside/secret"),
    "up and down": lambda folder, secret: (folder / "README.md").symlink_to("../checkpoint/../outside/secret"),
    "chained": lambda folder, secret: (
        (folder / "README.md").symlink_to("inner"),
        (folder / "inner").symlink_to(secret),
    ),
    "in a folder": lambda folder, secret: (
        (folder / "assets").mkdir(),
        (folder / "assets" / "README.md").symlink_to("../../outside/secret"),
    ),
    "to a folder": lambda folder, secret: (folder / "README.md").symlink_to(secret.parent),
    "a folder": lambda folder, secret: (folder / "assets").symlink_to(secret.parent),
    "through a folder": lambda folder, secret: (
        (folder / "assets").symlink_to(secret.parent),
        (folder / "README.md").symlink_to("assets/secret"),
    ),
    "a beginning of the same name": lambda folder, secret: (
        folder.with_name("checkpoint-private").mkdir(),
        secret.rename(folder.with_name("checkpoint-private") / "secret"),
        (folder / "README.md").symlink_to("../checkpoint-private/secret"),
    ),
    "licence": lambda folder, secret: ((folder / "LICENSE").unlink(), (folder / "LICENSE").symlink_to(secret)),
    "settings": lambda folder, secret: (
        secret.write_text(json.dumps({"secret": SECRET})),
        (folder / "generation_config.json").unlink(),
        (folder / "generation_config.json").symlink_to(secret),
    ),
    "configuration": lambda folder, secret: (
        shutil.move(folder / "config.json", secret),
        (folder / "config.json").symlink_to(secret),
    ),
    "attributes": lambda folder, secret: (folder / ".gitattributes").symlink_to(secret),
    "code": lambda folder, secret: (
        (folder / "modeling_qwen.py").unlink(),
        (folder / "modeling_qwen.py").symlink_to(secret),
    ),
    "dangling outside": lambda folder, secret: (folder / "README.md").symlink_to("/no/such/secret"),
}


def run(*arguments):
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize(
    "command",
    ["upgrade {0} {1}", "upgrade {0} --in-place", "convert {0} {1} --to qwen2", "push {0} me/model --dry-run"],
)
@pytest.mark.no_cover
def test_a_link_out_of_the_folder_is_refused(folder, secret, tmp_path, make, command):
    make(folder, secret)
    code, text = run(*command.format(folder, tmp_path / "new").split())
    assert code == 1 and "is a link to" in text and "outside of the checkpoint" in text
    assert ("secret" in text or "outside" in text) and "remove the link" in text
    assert SECRET not in text and not (tmp_path / "new").exists()


def test_the_error_names_link_and_target(folder, secret, tmp_path):
    (folder / "README.md").symlink_to("../outside/secret")
    text = run("upgrade", folder, tmp_path / "new")[1]
    assert str(folder / "README.md") in text and str(secret) in text


def test_an_adapter_is_no_way_out(folder, secret, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    (adapter / "chat_template.jinja").symlink_to(secret)
    code, text = run("merge-lora", folder, adapter, tmp_path / "new")
    assert code == 1 and "chat_template.jinja is a link to" in text and SECRET not in text


def test_a_base_is_no_way_out(folder, secret, tmp_path):
    (folder / "README.md").symlink_to(secret)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    code, text = run("merge-lora", folder, adapter, tmp_path / "new")
    assert code == 1 and "README.md is a link to" in text


@pytest.mark.parametrize(("name", "is_lawful"), [("model.safetensors", True), ("README.md", False)])
def test_weights_alone_may_be_links_into_a_cache_of_the_hub(folder, tmp_path, name, is_lawful):
    (folder / "README.md").write_text("about")
    blob = tmp_path / "hub" / "models--Qwen--Qwen-7B" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    shutil.move(folder / name, blob)
    snapshot = blob.parent.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / name).symlink_to("../../blobs/0123")
    for target in (blob, snapshot / name):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        assert (list(stray_links(folder)) == []) == is_lawful


def test_weights_are_no_way_out_either(folder, secret):
    shutil.move(folder / "model.safetensors", secret.with_name("weights"))
    (folder / "model.safetensors").symlink_to(secret.with_name("weights"))
    assert any("outside of the checkpoint" in text for text in stray_links(folder))


@pytest.fixture
def snapshot(folder, tmp_path):
    """The folder as the Hub's cache has it."""
    repository = tmp_path / "models--Qwen--Qwen-7B-Chat"
    (repository / "blobs").mkdir(parents=True)
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.svg").write_text("<svg/>")
    target = repository / "snapshots" / "0123abcd"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = target / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return target


def test_every_file_of_a_snapshot_may_be_a_link_to_a_blob(snapshot, folder, tmp_path):
    check_links(snapshot)
    source = open_source(snapshot)
    assert write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    assert (tmp_path / "new" / "assets" / "logo.svg").read_text() == "<svg/>"
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    assert run("push", snapshot, "me/model", "--dry-run")[0] == 0
    assert not any("link" in text for text in inspect(snapshot).remarks)


def test_a_snapshot_reached_through_a_link(snapshot, tmp_path):
    (tmp_path / "model").symlink_to(snapshot)
    check_links(tmp_path / "model")


@pytest.mark.parametrize("target", ["../../../outside/secret", "../../../models--other--model/blobs/0123"])
def test_a_snapshot_is_no_way_out(snapshot, secret, tmp_path, target):
    other = tmp_path / "models--other--model" / "blobs" / "0123"
    other.parent.mkdir(parents=True)
    other.write_text(SECRET)
    (snapshot / "README.md").symlink_to(target)
    assert run("upgrade", snapshot, tmp_path / "new")[0] == 1 and not (tmp_path / "new").exists()


def test_blobs_that_lead_out_are_no_way_out(snapshot, secret, tmp_path):
    (snapshot.parent.parent / "blobs" / "0123").symlink_to(secret)
    (snapshot / "README.md").symlink_to("../../blobs/0123")
    assert "outside of the checkpoint" in run("upgrade", snapshot, tmp_path / "new")[1]


def test_links_inside_are_followed(folder, tmp_path):
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "README.md").symlink_to(folder / "NOTICE")
    source = open_source(folder)
    write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    assert (tmp_path / "new" / "README.md").read_text() == "Of the model"


def test_a_link_to_a_folder_inside_is_told_not_lost_silently(folder):
    (folder / "assets").mkdir()
    (folder / "assets" / "a.txt").write_text("a")
    (folder / "more").symlink_to("assets")
    (folder / "loop").symlink_to(".")
    notes = " ".join(plan_upgrade(open_source(folder)).notes)
    assert "more" in notes and "loop" in notes and "link" in notes


def test_hidden_links_are_not_taken_along_and_so_may_lead_anywhere(folder, secret, tmp_path):
    (folder / ".cache").symlink_to(secret.parent)
    source = open_source(folder)
    write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    assert not (tmp_path / "new" / ".cache").exists()


@pytest.mark.parametrize("link", ["README.md", "assets"])
def test_a_link_to_itself_in_the_folder(folder, tmp_path, link):
    (folder / link).symlink_to(link)
    for command in (f"upgrade {folder} {tmp_path / 'new'}", f"push {folder} me/model --dry-run"):
        code, text = run(*command.split())
        assert code == 1 and f"{folder / link} is a link that leads back to itself" in text


def test_links_that_chase_one_another(folder, tmp_path):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    assert "leads back to itself" in run("upgrade", folder, tmp_path / "new")[1]


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        "upgrade {0} {1}",
        "convert {0} {1} --to qwen2",
        "merge-lora {0} {0} {1}",
        "upgrade {1} {0}",
        "upgrade {1} --in-place",
        "convert {1} {0} --to qwen2",
        "verify {1} {0}",
        "inspect {1}",
        "push {1} me/model",
        "merge-lora {1} {0} {0}",
        "merge-lora {0} {1} {0}",
    ],
)
def test_an_argument_that_is_a_link_to_itself(folder, tmp_path, parent, command):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (tmp_path / "self").symlink_to("self")
    path = tmp_path / "self" / "new" if parent else tmp_path / "self"
    code, text = run(*command.format(folder, path).split())
    assert code == 1 and "leads back to itself" in text, text


def test_inspect_tells_what_the_others_refuse(folder, secret):
    (folder / "README.md").symlink_to(secret)
    report = inspect(folder)
    assert report.problems == []
    (text,) = [text for text in report.remarks if "README.md is a link" in text]
    assert "upgrade, convert, merge-lora and push refuse" in text


def test_a_model_whose_weights_are_elsewhere_can_be_verified(golden, tmp_path):
    """Nothing is taken along then."""
    source = shutil.copytree(golden / "model" / "aug_plain", tmp_path / "model")
    shutil.move(source / "model.safetensors", tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    assert run("verify", source, golden / "model" / "aug_plain", "--tokens", "4")[0] == 0


def test_what_lies_beside_a_single_file_is_no_way_out(golden, secret, tmp_path):
    source = tmp_path / "training"
    shutil.copytree(golden / "llama_meta" / "mp1", source)
    (source / "consolidated.00.pth").rename(source / "model.pth")
    (source / "unrelated").symlink_to(secret)
    assert run("convert", source / "model.pth", tmp_path / "new", "--to", "qwen")[0] == 0
    (source / "LICENSE").symlink_to(secret)
    code, text = run("convert", source / "model.pth", tmp_path / "other", "--to", "qwen")
    assert code == 1 and "LICENSE is a link to" in text


def test_the_tiny_model_links_to_this_packages_code(repository):
    check_links(repository / "qwen-tiny-chat")


@pytest.mark.parametrize(
    "names", [["../../outside/secret", None], ["README.md", "../stolen"], ["/etc/x", None], [1, 2]]
)
def test_a_list_of_moves_that_came_with_the_folder_moves_nothing_outside(folder, secret, names):
    work = folder / ".upgrade.partial"
    work.mkdir()
    (work / ".qwen1.lock").touch()
    (work / "moves.json").write_text(json.dumps([names]))
    code, text = run("upgrade", folder, "--in-place")
    assert code == 1 and "was not written by this program" in text and secret.read_text() == SECRET


@pytest.mark.parametrize("name", [".upgrade.partial", "../new.partial"])
def test_a_work_folder_is_no_link(folder, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    where = ["--in-place"] if name.startswith(".u") else [tmp_path / "new"]
    code, text = run("upgrade", folder, *where)
    assert code == 1 and "is in the way" in text and not any((tmp_path / "elsewhere").iterdir())


def test_resolved_gives_paths_that_are_not_there(tmp_path):
    assert resolved(tmp_path / "a" / ".." / "b") == tmp_path / "b"


def test_upgrade_in_place_of_a_snapshot(snapshot):
    upgrade_in_place(snapshot, "5GB", Progress())
    assert inspect(snapshot).problems == []


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_a_folder_that_may_not_be_listed_is_not_left_out(folder, tmp_path, monkeypatch):
    (folder / "assets").mkdir()
    real = os.scandir

    def refuse(path="."):
        if str(path).endswith("assets"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for command in (f"upgrade {folder} {tmp_path / 'new'}", f"push {folder} me/model"):
        code, text = run(*command.split())
        assert code == 1 and "assets may not be read" in text
    assert any("assets may not be read" in text for text in inspect(folder).problems)


@pytest.mark.parametrize("name", ["modeling_qwen.py", "new_qwen.py"])
def test_code_of_a_clone_of_another_version(folder, tmp_path, name):
    clone = tmp_path / "clone"
    (clone / "qwen1_commands").mkdir(parents=True)
    (clone / "qwen1_commands" / "__init__.py").touch()
    (clone / name).write_text("# of a newer version")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(clone / name)
    with pytest.raises(CheckpointError, match="of different versions. Install the clone again") as refused:
        check_links(folder)
    assert f"(pip install {clone})" in str(refused.value) and "put a copy" not in str(refused.value)
    (clone / "secret").write_text(SECRET)
    (folder / name).unlink()
    (folder / "README.md").symlink_to(clone / "secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint, so it isn't followed"):
        check_links(folder)
