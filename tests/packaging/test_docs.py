"""What pages say is there, is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_classes_that_are_named_exist(page: Path):
    folders = [ROOT / name for name in ("frontend", "enginecore", "workers", "ipc")]
    code = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    known = set(re.findall(r"^(?:class )?(\w+)(?:\(| =|:)", code, re.MULTILINE))
    named = set(re.findall(r"`([A-Z][a-z]\w*[A-Z]\w*)`", page.read_text()))
    assert named <= known


def test_nothing_is_left_of_a_merge(page: Path):
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: |$)", page.read_text(), re.MULTILINE)
