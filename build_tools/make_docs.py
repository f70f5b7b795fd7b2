"""Build the documentation: python -m build_tools.make_docs

The pages are README.md as the index, docs/*.md and a reference with one entry for each public name of negmine, whose docstrings
it shows. They are gathered in build/docs and built into out/docs; a broken link or an undocumented name fails.
"""

import re
import shutil
import sys
from operator import attrgetter
from pathlib import Path

import mkdocs.commands.build
import mkdocs.config

PAGES = Path("build/docs")
# In the order of a reader's questions; pages that are not named come after them, by name.
ORDER = [
    "examples",
    "methods",
    "triplets",
    "comparison",
    "mining",
    "report",
    "cli",
    "adapters",
    "torch",
    "sharded",
    "planning",
    "building",
]


def public_names() -> list[str]:
    """negmine's public names as its __all__ lists them, then those of its packages and the recipes."""
    import negmine

    packages = "losses", "selection", "queues", "mining", "report", "recipes"
    names = [f"negmine.{name}" for name in negmine.__all__ if not name.startswith("_") and name not in packages]
    for package in packages:
        listed = attrgetter(package)(negmine).__all__
        names += [f"negmine.{package}.{name}" for name in listed if name not in negmine.__all__]
    undocumented = [name for name in names if not attrgetter(name.removeprefix("negmine."))(negmine).__doc__]
    if undocumented:
        raise SystemExit(f"make docs: without a docstring: {', '.join(undocumented)}")
    return names


def read(page: Path) -> str:
    """The text of a page, with the pictures that it shows copied beside it."""
    text = page.read_text()
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", text):
        shutil.copy(page.parent / picture, PAGES)
        text = text.replace(f"]({picture})", f"]({Path(picture).name})")
    return text


def index() -> str:
    """README.md with its links into docs/ as links between pages, and links to files as plain names."""
    text = read(Path("README.md"))
    text = re.sub(r"\]\(docs/([\w-]+\.md)", r"](\1", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|#|(?!CONTRIBUTING)[\w-]+\.md)[^)]+\)", r"`\1`", text)


def gather() -> list[dict[str, str]]:
    """Write every page into PAGES; the navigation."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    (PAGES / "index.md").write_text(index())
    (PAGES / "reference.md").write_text("# Reference\n\n" + "\n".join(f"::: {name}\n" for name in public_names()))
    shutil.copy("docs/style.css", PAGES)
    place = {name: at for at, name in enumerate(ORDER)}
    found = sorted(Path("docs").glob("*.md"), key=lambda page: (place.get(page.stem, len(ORDER)), page.stem))
    for page in found:
        (PAGES / page.name).write_text(read(page).replace("](../README.md", "](index.md"))
    titles = [{page.read_text().split("\n", 1)[0].removeprefix("# "): page.name} for page in found]
    return [{"negmine": "index.md"}, *titles, {"Reference": "reference.md"}]


def main() -> None:
    config = mkdocs.config.load_config("mkdocs.yml", nav=gather())
    mkdocs.commands.build.build(config)
    print(f"{config['site_dir']}/index.html: {len(list(Path(config['site_dir']).glob('*.html')))} pages")


if __name__ == "__main__":
    try:
        main()
    except mkdocs.exceptions.Abort as refusal:
        sys.exit(f"make docs: {refusal}")
