"""The site's hook for mkdocs: adds pages whose text is elsewhere, and makes links the site's own.

README, CONTRIBUTING and CHANGELOG become pages, notebooks are shown with their committed output,
the reference is made of docstrings, figures are those committed with the results. Pages link to
files of the repository, so that they can be browsed there, too. llms.txt lists all pages.
"""

from __future__ import annotations

import os.path
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[1]
FIGURES = Path("benchmarks") / "results"
#: page of the site -> file of the repository
MOVED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
#: a figure, and the paragraph in italics below it
CAPTIONED = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)\n\n\*([^*]+)\*\n")
LIBRARIES = "Your library"  #: the guide below which every library has a page of its own
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of every library below that of all of them."""
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    entry = next(entry for entry in guides if LIBRARIES in entry)
    folder = ROOT / "docs" / "guides" / "libraries"
    pages = [f"guides/libraries/{page.name}" for page in sorted(folder.glob("*.md"))]
    if pages:
        entry[LIBRARIES] = [{"Overview": entry[LIBRARIES]}, *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the figures that they show."""
    for page, source in MOVED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, (title, _) in reference.PAGES.items():
        names = "\n\n".join(f"::: {name}" for name in reference.documented(page))
        content = f"# {title}\n\n{names}\n"
        files.append(File.generated(config, f"reference/{page}.md", content=content))
    for place, content in _notebooks():
        files.append(File.generated(config, place, content=content))
    files.append(File.generated(config, "results/gallery.md", content=_gallery()))
    files.append(File.generated(config, "llms.txt", content=_llms(config)))
    for figure in _figures():
        files.append(File.generated(config, figure.as_posix(), abs_src_path=str(ROOT / figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to pages, or plain names without one."""
    here = PurePosixPath(page.file.src_uri)
    source = PurePosixPath(MOVED.get(str(here), f"docs/{here}"))

    def on_site(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        place = _site_path(os.path.normpath(source.parent / target))
        if place is None:
            return text
        return f"{image}[{text}]({os.path.relpath(place, here.parent)}{anchor or ''})"

    return LINK.sub(on_site, markdown)


def _site_path(path: str) -> str | None:
    """Where a file of the repository is on the site."""
    for page, source in MOVED.items():
        if path == source:
            return page
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    return path if path.endswith(".png") else None


def _notebooks() -> Iterator[tuple[str, str | bytes]]:
    """Place on the site and content of every notebook and of the pictures in its output."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, resources = MarkdownExporter().from_filename(str(path), resources=names)
        yield f"notebooks/{path.stem}.md", text
        for place, picture in resources["outputs"].items():
            yield f"notebooks/{place}", picture


def _llms(config: MkDocsConfig) -> str:
    """The site for language models: its name, what it is about, and a link to every page."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for entry in config.nav or []:
        for title, target in entry.items():
            if isinstance(target, list):
                lines += ["", f"## {title}", "", *_links(target)]
            else:
                lines += _links([entry])
    return "\n".join(lines) + "\n"


def _links(entries: list[Any], group: str = "") -> Iterator[str]:
    """One line for each page; those of a group within a section begin with its name."""
    for entry in entries:
        if isinstance(entry, str):
            entry = {_title(entry): entry}
        for title, target in entry.items():
            if isinstance(target, list):
                yield from _links(target, f"{title}: ")
                continue
            place = target.removesuffix("index.md").removesuffix(".md")
            yield f"- [{group}{title}]({place or '.'}/)"


def _title(page: str) -> str:
    """What a page in docs/ calls itself."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _figures() -> list[Path]:
    """The committed figures, from the root of the repository."""
    return sorted(figure.relative_to(ROOT) for figure in (ROOT / FIGURES).rglob("*.png"))


def _gallery() -> str:
    """All figures, each with the caption and the page of the results that show it."""
    captions = _captions()
    entries = ["# All figures", "", "Every figure that a committed experiment drew."]
    for figure in _figures():
        name = " / ".join(figure.relative_to(FIGURES).with_suffix("").parts).replace("_", " ")
        entries += ["", f"## {name}", "", f"![{name}](../../{figure.as_posix()})"]
        if figure.as_posix() in captions:
            page, caption = captions[figure.as_posix()]
            entries += ["", f"*{caption}* ([details]({page}))"]
    return "\n".join(entries)


def _captions() -> dict[str, tuple[str, str]]:
    """Figure -> the page in docs/results/ that shows it, and the caption below it there."""
    found = {}
    for page in sorted((ROOT / "docs" / "results").glob("*.md")):
        for figure, caption in CAPTIONED.findall(page.read_text(encoding="utf-8")):
            found[os.path.normpath(f"docs/results/{figure}")] = (
                page.name,
                " ".join(caption.split()),
            )
    return found
