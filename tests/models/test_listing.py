"""README's table is what `cableway models --markdown` prints; an unknown architecture is told what is near."""

from pathlib import Path

import pytest

from cableway.ipc.modelfiles import ModelError
from cableway.workers import listing, models

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("models --markdown` -->\n")[2].partition("<!-- end of models -->")[0]
    assert table == listing.markdown() + "\n"


def test_an_unknown_architecture_is_told_what_is_near_and_how_to_add_it() -> None:
    with pytest.raises(ModelError, match=r"near it: .*Qwen3ForCausalLM.*docs/adding-a-model\.md"):
        models.find({"architectures": ["Qwen33ForCausalLM"]})
    assert (ROOT / "docs" / "adding-a-model.md").exists()
