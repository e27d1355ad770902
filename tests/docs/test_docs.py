"""The documents' Python runs, and what they promise to print is printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_the_tutorial_runs_and_prints_what_it_says(capsys):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    namespace: dict = {}
    printed = ""
    for language, body in blocks:
        if language == "python":
            exec(compile(body, "docs/tutorial.md", "exec"), namespace)
            printed = capsys.readouterr().out
        elif printed and not body.startswith(("#", "jaxrmils ")):
            assert printed.strip() == body.strip()
            printed = ""
    assert "report" in namespace


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
