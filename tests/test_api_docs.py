"""docs/API.md is what make_api_docs.py makes of this tree."""

from __future__ import annotations

from pathlib import Path

import make_api_docs

import wggw


def test_it_is_not_stale(tmp_path: Path) -> None:
    with make_api_docs.documented_gateway(tmp_path) as client:
        made = make_api_docs.render(client)
    stale = "docs/API.md is stale: run python3 tests/make_api_docs.py"
    assert make_api_docs.TARGET.read_text("utf-8") == made, stale


def test_every_row_has_an_example_and_no_other() -> None:
    assert set(make_api_docs.EXAMPLES) == {(r.method, r.template) for r in wggw.ROUTES}
