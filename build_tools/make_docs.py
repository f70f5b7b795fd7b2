"""Build the documentation: python -m build_tools.make_docs

README.md is the first page. docs/*.md and a few pages of other folders follow in the order of NAV, then a reference made from
the docstrings. The pages are collected in build/docs, and the site is built in out/docs. It is an error if a link is broken, a
page is not listed in NAV, or a public name has no docstring.
"""

import importlib
import os
import re
import shutil
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import mkdocs.commands.build
import mkdocs.config

import negmine

PAGES = Path("build/docs")
# The sections and their pages in reading order. A page is docs/<name>.md unless ELSEWHERE or REFERENCE has the name.
NAV = {
    "Getting started": ["getting_started", "alternatives"],
    "Tutorials": [
        "tutorial_moco",
        "tutorial_sentence_transformers",
        "tutorial_clip",
        "tutorial_beir",
        "tutorial_many_machines",
    ],
    "How-to": ["methods", "triplets", "mining", "cli", "report", "adapters", "torch", "sharded", "examples"],
    "Concepts": ["concepts", "semantics", "memory", "backends", "gpu"],
    "Reference": [
        "reference_options",
        "reference_losses",
        "reference_selection",
        "reference_queues",
        "reference_recipes",
        "reference_mining",
        "reference_adapters",
    ],
    "Performance": ["benchmarks", "planning"],
    "Evidence": ["evidence", "comparison", "versions"],
    "Contributing": ["contributing", "building", "kernels", "security", "changelog"],
}
ELSEWHERE = {
    "index": "README.md",
    "benchmarks": "benchmarks/README.md",
    "contributing": "CONTRIBUTING.md",
    "kernels": "kernels/README.md",
    "security": "SECURITY.md",
    "changelog": "CHANGELOG.md",
}
# The title of each page, and the packages whose public names it describes. "options" means the classes that negmine exports
# and no package lists.
REFERENCE = {
    "reference_options": ("Options", ("options",)),
    "reference_losses": ("Losses", ("losses",)),
    "reference_selection": ("Selection", ("selection",)),
    "reference_queues": ("Queues", ("queues",)),
    "reference_recipes": ("Recipes", ("recipes",)),
    "reference_mining": ("Mining and reports", ("mining", "report")),
    "reference_adapters": (
        "Adapters",
        tuple(
            f"adapters.{name}" for name in ("lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers")
        ),
    ),
}


def public_names(package: str) -> list[str]:
    """The public names of a package, as they are imported: without the package's name if negmine itself exports them.

    If a package has no __all__, its public names are those that it defines. Of the names that negmine exports and no package
    lists, classes are "options" and functions belong to "losses".
    """
    if package == "options":
        return [name for name in _unlisted() if isinstance(attrgetter(name)(negmine), type)]
    module = importlib.import_module(f"negmine.{package}")
    own = [
        n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__ and n[0] != "_"
    ]
    names = getattr(module, "__all__", own)
    names = [name if getattr(negmine, name, 0) is getattr(module, name) else f"{package}.{name}" for name in names]
    if package == "losses":
        names = [name for name in _unlisted() if not isinstance(attrgetter(name)(negmine), type)] + names
    return names


def _unlisted() -> list[str]:
    """The names that negmine exports and none of its packages lists."""
    packages = [name for _, several in REFERENCE.values() for name in several if name not in ("options", "recipes")]
    listed = {
        name for package in packages for name in getattr(importlib.import_module(f"negmine.{package}"), "__all__", ())
    }
    modules = [name for name in negmine.__all__ if isinstance(getattr(negmine, name), ModuleType)]
    return [name for name in negmine.__all__ if name[0] != "_" and name not in listed and name not in modules]


def entries(packages: tuple[str, ...]) -> list[str]:
    """The entries of the reference for some packages. A name without a docstring is an error."""
    names = [name for package in packages for name in public_names(package)]
    undocumented = [name for name in names if not attrgetter(name)(negmine).__doc__]
    if undocumented:
        raise SystemExit(f"make docs: without a docstring: {', '.join(undocumented)}")
    # The methods of option objects are for the losses, not for users.
    setting = "    options:\n      members: false\n" if packages == ("options",) else ""
    return [f"::: negmine.{name}\n{setting}" for name in names]


def sources() -> dict[str, Path]:
    """The pages that are files of the repository, by their names on the site."""
    made = {page.stem: page for page in sorted(Path("docs").glob("*.md"))}
    return made | {name: Path(path) for name, path in ELSEWHERE.items()}


def page(source: Path, names: dict[Path, str]) -> str:
    """The text of a page. Links to pages are changed to those of the site, pictures are copied, and links to other files become
    their paths."""
    text = source.read_text()

    def link(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        if re.match(r"https?://|#|mailto:", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = Path(os.path.normpath(source.parent / path))
        if mark:
            shutil.copy(path, PAGES)
            return f"![{label}]({path.name})"
        if path in names:
            return f"[{label}]({names[path]}.md{'#' + anchor if anchor else ''})"
        if path.suffix == ".md" and not path.exists():
            return found[0]  # a broken link, which mkdocs reports
        return label if label.startswith("`") else f"{label} (`{path}`)"

    return re.sub(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)", link, text)


def gather() -> list[dict]:
    """Write all pages to PAGES, and return the navigation."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    files = sources()
    listed = {"index", *(name for pages in NAV.values() for name in pages)}
    if lost := set(files) - listed:
        raise SystemExit(f"make docs: NAV does not list {', '.join(sorted(lost))}")
    titles = {}
    names = {path: name for name, path in files.items()}
    for name, path in files.items():
        text = page(path, names)
        titles[name] = text.split("\n", 1)[0].removeprefix("# ")
        (PAGES / f"{name}.md").write_text(text)
    for name, (title, packages) in REFERENCE.items():
        titles[name] = title
        (PAGES / f"{name}.md").write_text("\n".join([f"# {title}\n", *entries(packages)]))
    shutil.copy("docs/style.css", PAGES)
    sections = [{section: [{titles[name]: f"{name}.md"} for name in pages]} for section, pages in NAV.items()]
    return [{"negmine": "index.md"}, *sections]


def main() -> None:
    config = mkdocs.config.load_config("mkdocs.yml", nav=gather())
    mkdocs.commands.build.build(config)
    print(f"{config['site_dir']}/index.html: {len(list(Path(config['site_dir']).glob('*.html')))} pages")


if __name__ == "__main__":
    try:
        main()
    except mkdocs.exceptions.Abort as error:
        sys.exit(f"make docs: {error}")
