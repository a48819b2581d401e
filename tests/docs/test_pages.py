"""README and guides: links that lead somewhere, figures that were measured."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [match.groups() for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    for target, anchor in links:
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} names {target}, which doesn't exist"
        assert not anchor or anchor in anchors(path), f"{page.name} names {target}#{anchor}"


def test_every_guide_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_the_table_of_speed_is_what_was_measured(warm):
    done = subprocess.run(
        [*warm, str(ROOT / "benchmarks" / "speed.py"), "table"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "command", "page"),
    [
        ("memory.py", "table", "memory.md"),
        ("memory.py", "models", "memory.md"),
        ("long_context.py", "table", "long-context.md"),
    ],
)
def test_tables_of_other_pages_are_those_of_their_scripts(script, command, page, warm):
    done = subprocess.run([*warm, str(ROOT / "benchmarks" / script), command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_calculated_memory_is_within_a_tenth_of_what_was_measured():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").partition("## Measured")[2]
    ratios = [float(ratio) for ratio in re.findall(r"\| \*\*([0-9.]+)\*\* \|", page)]
    assert len(ratios) > 10
    assert [ratio for ratio in ratios if not 0.9 <= ratio <= 1.1] == []


def test_figures_of_the_readme_are_those_of_the_table():
    measured = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([0-9.]+) \|$", readme.split("## Speed")[1].split("\n## ")[0], re.MULTILINE)
    ratios = sorted(f"{row['ratio']:.2f}" for row in measured.values())
    assert len(rows) > 5
    assert [name for name, ratio in rows if ratio not in ratios] == []


def test_the_readme_is_a_model_card():
    """As the Hub shows it: what it filters and labels repositories by."""
    card = ModelCard.load(ROOT / "README.md")
    data = card.data.to_dict()
    assert data == {
        "language": ["en", "zh"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["qwen", "conversational", "custom_code"],
    }
    assert card.text.lstrip().startswith("# QWen-1 on transformers 5")
    shipped = ModelCard.load(ROOT / "qwen-tiny-chat" / "README.md").data.to_dict()
    assert {**shipped, "tags": []} == {**data, "tags": []}


def test_the_packages_that_remote_code_needs_are_said(pyproject):
    """In README and guide alike; tests/repository/test_remote_code.py runs with no others."""
    (command,) = set(re.findall(r'`(pip install "transformers.+?)`', (ROOT / "README.md").read_text(encoding="utf-8")))
    assert f"`{command}`" in (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    (bound,) = (line for line in pyproject["project"]["dependencies"] if line.startswith("transformers"))
    assert command == f'pip install "{bound}" torch tiktoken accelerate'
