"""What is published on a package index: the source distribution, and the wheel that is built from it."""

import email
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def tracked(repository: Path) -> list[str]:
    """Names of all files of the repository, those that are new too."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repository, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (repository / name).is_file()]


@pytest.fixture(scope="module")
def built(repository, tmp_path_factory):
    """Both distributions, made without a network: (folder of the unpacked source distribution, opened wheel)."""
    installed = importlib.metadata.version("setuptools")
    if int(installed.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {installed} is older than what pyproject.toml needs")
    folder = tmp_path_factory.mktemp("built")
    for name in tracked(repository):
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, folder / "clone" / name)

    def build(kind, source):
        done = subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", folder], cwd=source, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    build("sdist", folder / "clone")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    build("wheel", source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        yield source, opened


@pytest.fixture(scope="module")
def setup_script(repository):
    return runpy.run_path(str(repository / "setup.py"))


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(built, repository):
    source, _ = built
    assert [name for name in tracked(repository) if not (source / name).is_file()] == []


def test_the_wheel_holds_every_module_and_what_they_read(built, repository):
    _, wheel = built
    elsewhere = ("benchmarks/", "docs/", "examples/", "tests/", "setup.py")
    modules = {name for name in tracked(repository) if name.endswith(".py") and not name.startswith(elsewhere)}
    read = {
        "config.json", "chat_template.jinja", "py.typed", "training/options.json", "training/tiny/names.json",
        "qwen-tiny-chat/qwen.tiktoken",
    }  # fmt: skip
    expected = {name if name.startswith("qwen1_commands/") else f"qwen1/{name}" for name in modules | read}
    expected.add("qwen1_commands/py.typed")
    assert expected - set(wheel.namelist()) == set()


def test_the_wheel_holds_nothing_else_to_import(built):
    _, wheel = built
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"qwen1", "qwen1_commands"}
    assert "qwen1/setup.py" not in wheel.namelist()
    assert not [name for name in wheel.namelist() if "/tests/" in name or "/benchmarks/" in name]


def test_the_page_of_the_index_has_no_link_to_a_path(built):
    _, wheel = built
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown" and "## Quick start" in page
    assert re.findall(r"\]\((?!https://)[^)]*\)", page) == []
    assert page.lstrip().startswith("# QWen-1 on transformers 5"), "the front matter is for the Hub"


def test_links_lead_into_the_repository_where_it_has_an_address(setup_script):
    text = "See [use](docs/use.md#a), [b](https://b.example) and [the card](x/README.md)."
    address = setup_script["source_address"]('[project.urls]\nSource = "https://host.example/a/qwen1/"\n')
    assert setup_script["readme"](text, address) == (
        "See [use](https://host.example/a/qwen1/blob/main/docs/use.md#a), [b](https://b.example) "
        "and [the card](https://host.example/a/qwen1/blob/main/x/README.md)."
    )
    assert setup_script["source_address"]("[project.urls]\n") is None
    assert setup_script["readme"](text, None) == "See use, [b](https://b.example) and the card."
