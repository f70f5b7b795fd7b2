"""make docs in a folder of its own: every page and every public name is there, and a link to nothing fails."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

import negmine
from build_tools import make_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("README.md", "mkdocs.yml", "negmine", "kernels", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_and_every_name_is_built(checkout):
    make_docs.main()
    made = {page.stem for page in (checkout / "out/docs").glob("*.html")}
    assert made == {"404", "index", "reference"} | {page.stem for page in (ROOT / "docs").glob("*.md")}
    pictures = {
        path.name
        for path in (ROOT / "benchmarks/results").glob("*.png")
        if path.name in (ROOT / "README.md").read_text()
    }
    assert pictures and all((checkout / "out/docs" / name).exists() for name in pictures)
    text = (checkout / "out/docs/reference.html").read_text()
    public = [n for n in negmine.__all__ if not n.startswith("_") and n not in ("mining", "recipes")]
    for package in ("losses", "selection", "queues", "mining", "report", "recipes"):
        public += [f"{package}.{n}" for n in getattr(negmine, package).__all__ if n not in negmine.__all__]
    for name in public:
        assert f'id="negmine.{name}"' in text, name


@pytest.mark.filterwarnings("ignore")
def test_a_link_to_nothing_fails(checkout):
    page = checkout / "docs/sharded.md"
    page.write_text(page.read_text() + "\nSee [a page](nowhere.md).\n")
    with pytest.raises(make_docs.mkdocs.exceptions.Abort, match="strict mode"):
        make_docs.main()


def test_links_of_the_readme_become_links_between_pages(checkout):
    (checkout / "README.md").unlink()
    (checkout / "README.md").write_text(
        "[a](docs/sharded.md), [b](docs/sharded.md#x), [c](tests/cases.py), [d](https://e.org)"
    )
    assert make_docs.index() == "[a](sharded.md), [b](sharded.md#x), `c`, [d](https://e.org)"
