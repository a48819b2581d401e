"""What happens on versions of transformers and torch that are too old: each way in names them and the remedy."""

import importlib.metadata
import os
import subprocess

import pytest

from qwen1 import versions_qwen

# As if these versions were installed, whatever the packages have by now.
PRETEND = """
import importlib.metadata, sys
import transformers

folder, version = sys.argv[1:]
installed = importlib.metadata.version
importlib.metadata.version = lambda name: version if name == "transformers" else installed(name)
transformers.__version__ = version
"""
WAYS_IN = {
    "config": "transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)",
    "tokenizer": "transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    "model": "from transformers.dynamic_module_utils import get_class_from_dynamic_module\n"
    "get_class_from_dynamic_module('modeling_qwen.QWenLMHeadModel', folder)",
    "package": "import qwen1",
    "command": "import qwen1.terminal.commands",
    "tokenizer of the package": "import qwen1.tokenization_qwen",
}


@pytest.fixture
def pretend(monkeypatch):
    """Let packages have other versions, or none: (name=version, …)."""

    def install(**versions):
        def version(name):
            if versions.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_IN)
def test_each_way_in_names_the_versions(way, repository, warm_with, tmp_path):
    done = subprocess.run(
        [*warm_with(os.environ, "torch"), "-c", PRETEND + WAYS_IN[way], repository / "qwen-tiny-chat", "4.57.6"],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: This "), done.stderr
    assert (
        "needs transformers 5.4 or later (4.57.6 is installed): run `pip install --upgrade 'transformers>=5.4'`" in last
    )


@pytest.mark.parametrize(
    ("versions", "needed"),
    [
        ({"transformers": "4.57.6", "torch": "2.13.0"}, "'transformers>=5.4'"),
        ({"transformers": "5.3.9", "torch": None}, "'transformers>=5.4'"),
        ({"transformers": "4.32.0", "torch": "2.0.1+cu118"}, "'transformers>=5.4' 'torch>=2.7'"),
        ({"transformers": "5.24.0", "torch": "2.6.0"}, "'torch>=2.7'"),
    ],
)
def test_what_is_too_old_is_named(pretend, versions, needed):
    pretend(**versions)
    with pytest.raises(ImportError, match=rf"run `pip install --upgrade {needed}`\.$") as error:
        versions_qwen.check_versions()
    assert all(f"{version} is installed" in str(error.value) for name, version in versions.items() if name in needed)


@pytest.mark.parametrize("version", ["5.4.0", "5.4.0.dev0", "5.24.0", "6.0", "10.0.0", None, "unknown"])
def test_what_is_new_enough_or_says_no_version_passes(pretend, version):
    pretend(transformers=version, torch="2.10.0")
    versions_qwen.check_versions()


def test_the_bounds_are_those_of_the_package(pyproject):
    bounds = {f"{name}>={'.'.join(map(str, needed))}" for name, needed in versions_qwen.NEEDED.items()}
    assert bounds <= set(pyproject["project"]["dependencies"])
