"""The page on refinement runs, and what it promises to print is printed."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "refinement.md"


def test_the_page_runs_and_prints_what_it_says(capsys):
    blocks = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict = {}
    printed, compared = "", 0
    for language, body in blocks:
        if language == "python":
            exec(compile(body, "docs/refinement.md", "exec"), namespace)
            printed = capsys.readouterr().out
        else:
            assert printed.strip() == body.strip()
            compared += 1
    assert compared == 1
    assert len(namespace["found"].rounds) >= 1
