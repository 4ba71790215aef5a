"""python -m pardist_lib.site [FOLDER]: the course as a static site, from the committed notebooks; nothing is executed.

A page for each lesson, a map, a search that needs no server, light and dark, for a phone too; widgets are there as
their stills, each picture with its words; the timeline and the plans (notebooks/saved) are alive. Needs `pip install
'pardist[site]'` (Sphinx, MyST-NB, the book theme) and the repository; no network. FOLDER: by default `site`.
"""

import argparse
import base64
import hashlib
import html
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
STYLE = ".cell_output caption { color: inherit }"  # the theme's is grey on grey where it is dark
SETTINGS = {
    "extensions": ["myst_nb"],
    "html_theme": "sphinx_book_theme",
    "project": "pardist",
    "html_title": "pardist",
    "html_show_copyright": False,
    "nb_execution_mode": "off",
    "myst_enable_extensions": ["dollarmath"],
    "html_theme_options": {"show_toc_level": 2, "use_download_button": False},
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"],
}


def build(folder, root=ROOT):
    """Build the site into `folder`, which is made anew; returns the list of its pages.

    Raises ImportError where Sphinx and its extensions are missing, ValueError where there are no notebooks, and
    RuntimeError for a link that leads nowhere or a picture without alt text.
    """
    from sphinx.application import Sphinx

    folder, notebooks = Path(folder), sorted((Path(root) / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise ValueError(f"there are no notebooks in {root}")
    repository = tomllib.loads((Path(root) / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    with tempfile.TemporaryDirectory() as work:
        source, alts = Path(work) / "source", {}
        (source / "notebooks").mkdir(parents=True)
        for path in notebooks:
            alts |= _to_read(path, source / "notebooks" / path.name)
        for picture in (Path(root) / "notebooks").glob("*.[gp][in][fg]"):
            shutil.copy(picture, source / "notebooks")
        (source / "index.md").write_text(
            _front((Path(root) / "README.md").read_text(encoding="utf-8"), notebooks, repository)
        )
        shutil.rmtree(folder, ignore_errors=True)
        Sphinx(source, None, folder, Path(work) / "trees", "html", SETTINGS, status=None, warningiserror=False).build()
    for page in (Path(root) / "notebooks" / "saved").glob("*.html"):
        shutil.copy(page, folder / "notebooks")
    pages = sorted(p for p in folder.rglob("*.html") if "_static" not in p.parts)
    for page in pages:
        page.write_text(_with_words(page, alts), encoding="utf-8")
    if wrong := [w for page in pages for w in problems(page, folder)]:
        raise RuntimeError("\n".join(wrong))
    return pages


def _to_read(path, target):
    """Copy a notebook without what only lives with a kernel; {hash of a picture: its alt text}."""
    notebook, alts = nbformat.read(path, 4), {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data and (alt := output.metadata.get("image/png", {}).get("alt")):
                alts[hashlib.sha256(base64.b64decode(data["image/png"])).hexdigest()] = alt
            if 'class="pardist-run"' in data.get("text/html", ""):  # "run this cell …"; the words stay
                words = re.findall(r"<details.*?</details>", data["text/html"], flags=re.S)
                data["text/html"], data["text/plain"] = "".join(words), ""
            if link := re.match(r"<a href='([^'/]+)' target='_blank'>", data.get("text/html", "")):
                data["text/html"] = _alive(link[1]) if (path.parent / "saved" / link[1]).exists() else ""
        if "outputs" in cell:
            cell.outputs = [
                o for o in cell.outputs if WIDGET not in (d := o.get("data", {})) and d.get("text/html") != ""
            ]
    nbformat.write(notebook, target)
    return alts


def _alive(page):
    """A page that a lesson saved, within the page of the lesson."""
    return (
        f'<iframe src="{page}" title="{page}, as the lesson saved it" loading="lazy" '
        f'style="width:100%;height:560px;border:1px solid #8888"></iframe><br>'
        f'<a href="{page}" target="_blank">{page}</a>'
    )


def _front(readme, notebooks, repository):
    """The first page: README down to its commands, its map of lessons, and the order of the pages."""
    top, _, rest = readme.partition("## Two commands")
    lessons = "## The lessons" + rest.partition("## The lessons")[2].partition("\n## ")[0]
    lessons = lessons.replace("](tests/", f"]({repository}/blob/main/tests/")
    order = "\n".join(f"notebooks/{path.stem}" for path in notebooks)
    return f"{top}\n{lessons}\n\n```{{toctree}}\n:hidden:\n\n{order}\n```\n"


def _with_words(page, alts):
    """The page's text with our style, its pictures with their alt text and loaded when they come into sight."""

    def better(found):
        tag = found[0]
        source = re.search(r'src="([^"]*)"', tag)[1]
        file = page.parent / unquote(urlsplit(source).path)
        known = alts.get(hashlib.sha256(file.read_bytes()).hexdigest()) if file.is_file() else None
        if known:
            tag = re.sub(r' alt="[^"]*"', "", tag).replace("<img", f'<img alt="{html.escape(known)}" loading="lazy"')
        return tag

    text = page.read_text(encoding="utf-8").replace("</head>", f"<style>{STYLE}</style></head>")
    return re.sub(r"<img\b[^>]*>", better, text)


def problems(page, folder):
    """Sentences on a page's links that lead nowhere and its pictures without alt text."""
    text, found = page.read_text(encoding="utf-8"), []
    name = page.relative_to(folder)
    for tag in re.findall(r"<img\b[^>]*>", text):
        alt = re.search(r'alt="([^"]*)"', tag)
        if not alt or not alt[1] or re.fullmatch(r"[\w./-]+\.(png|svg)", alt[1]):
            found.append(f"{name}: a picture without alt text: {tag[:100]}")
    for link in re.findall(r'(?:href|src)=["\']([^"\'#][^"\']*)["\']', text):
        parts = urlsplit(html.unescape(link))
        if not parts.scheme and not parts.netloc and parts.path and not (page.parent / unquote(parts.path)).exists():
            found.append(f"{name}: a link that leads nowhere: {link}")
    return found


def main():
    written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m pardist_lib.site", description=__doc__, formatter_class=written)
    parser.add_argument("folder", nargs="?", default="site")
    folder = parser.parse_args().folder
    print(f"{len(build(folder))} pages: open {folder}/index.html")


if __name__ == "__main__":
    main()
