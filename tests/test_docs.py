"""make docs in a temporary folder builds every page and every public name, and fails for a broken link.

The code of the pages is run by tests/test_readme.py, and their shell commands by tests/test_cli.py.
"""

import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

import negmine
from build_tools import make_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("mkdocs.yml", "negmine", "kernels", "benchmarks", *map(str, make_docs.ELSEWHERE.values())):
        if "/" not in name:
            (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_and_every_name_is_built(checkout):
    make_docs.main()
    made = {page.stem for page in (checkout / "out/docs").glob("*.html")}
    assert made == {"404", *make_docs.sources(), *make_docs.REFERENCE}
    shown = re.findall(r"([\w-]+\.png)\)", (ROOT / "README.md").read_text())
    assert shown and all((checkout / "out/docs" / name).exists() for name in shown)
    text = "".join((checkout / f"out/docs/{name}.html").read_text() for name in make_docs.REFERENCE)
    for name in (
        name
        for _, packages in make_docs.REFERENCE.values()
        for package in packages
        for name in make_docs.public_names(package)
    ):
        assert f'id="negmine.{name}"' in text, name


def test_the_reference_has_every_public_name():
    listed = {
        name
        for _, packages in make_docs.REFERENCE.values()
        for package in packages
        for name in make_docs.public_names(package)
    }
    assert listed >= {
        name for name in negmine.__all__ if name[0] != "_" and not isinstance(getattr(negmine, name), ModuleType)
    }


@pytest.mark.filterwarnings("ignore")
def test_a_link_to_nothing_fails(checkout):
    page = checkout / "docs/sharded.md"
    page.write_text(page.read_text() + "\nSee [a page](nowhere.md).\n")
    with pytest.raises(make_docs.mkdocs.exceptions.Abort, match="strict mode"):
        make_docs.main()


def test_links_between_files_become_links_between_pages(checkout):
    (checkout / "README.md").unlink()
    (checkout / "README.md").write_text(
        "[a](docs/sharded.md), [b](docs/sharded.md#x), [c](tests/cases.py), [d](https://e.org), [e](CONTRIBUTING.md)"
    )
    names = {path: name for name, path in make_docs.sources().items()}
    wanted = "[a](sharded.md), [b](sharded.md#x), c (`tests/cases.py`), [d](https://e.org), [e](contributing.md)"
    assert make_docs.page(Path("README.md"), names) == wanted


@pytest.mark.filterwarnings("ignore")
def test_a_page_that_the_navigation_does_not_list_fails(checkout):
    (checkout / "docs/lost.md").write_text("# Lost\n")
    with pytest.raises(SystemExit, match="NAV does not list lost"):
        make_docs.gather()
