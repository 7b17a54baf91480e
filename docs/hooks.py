"""What MkDocs does beside itself: links out of docs/ lead to copies in the site, and drawings stand in their page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?:src|tests|bench|examples|datasets)/[^)#\s]+)\)")
_DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*images/ideas/(\w+\.svg)"[^>]*/?>')
_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Every file outside docs/ that a page links to becomes part of the site, as text: pages can be read without the
    repository, and no address of one is needed."""
    for page in list(files.documentation_pages()):
        for _, path in _OUTSIDE.findall(page.content_string):
            uri = _copy(path)
            if files.get_file_from_path(uri) is None:
                source = Path(config.config_file_path).parent / path
                files.append(File.generated(config, uri, content=source.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ -> links to those copies."""
    to_root = "../" * page.file.src_uri.count("/")
    return _OUTSIDE.sub(lambda link: f"]({to_root}{_copy(link[2])})", markdown)


def on_page_content(html: str, config: Any, **_: Any) -> str:
    """Drawings -> inline SVG, whose lines then have the colour of the text, in either theme."""

    def inline(image: re.Match[str]) -> str:
        drawing = (Path(config.docs_dir) / "images/ideas" / image[2]).read_text(encoding="utf-8")
        return _STYLE.sub("", drawing).replace("<svg ", f'<svg role="img" aria-label="{image[1]}" ', 1)

    return _DRAWING.sub(inline, html)


def _copy(path: str) -> str:
    return f"source/{path}.txt"
