"""The docs site: pages made of the repository's own documents, and links that leave docs/."""

from __future__ import annotations

import os.path
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File

MADE_OF = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site, by the document at the repository's root that each shows."""

LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    root = os.path.dirname(config.config_file_path)
    for page, document in MADE_OF.items():
        with open(os.path.join(root, document), encoding="utf-8") as file:
            files.append(File.generated(config, page, content=file.read()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository: to the site's page where there is one, else to the
    published repository, else (its address is not known) plain text."""
    uri = page.file.src_uri
    folder = "" if uri in MADE_OF else posixpath.join("docs", posixpath.dirname(uri))
    pages = {document: made for made, document in MADE_OF.items()}

    def resolve(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = pages.get(path) or (path[5:] if path.startswith("docs/") else None)
        if inside is not None:
            return f"{text}({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}{anchor})"
        if config.repo_url:
            return f"{text}({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text.lstrip("!")[1:-1]

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)  # code stays as it is
    parts[::2] = [LINK.sub(resolve, part) for part in parts[::2]]
    return "".join(parts)
