"""A hook of MkDocs: links from a page to files outside docs/ work on GitHub, but there is no such file on the site.

They lead to the repository where mkdocs.yml has a `repo_url`; where it has none only their text stays, names as code.
"""

import posixpath
import re

LINK = re.compile(r"(?<!!)\[([^][]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return text if " " in text or "`" in text else f"`{text}`"

    return LINK.sub(replace, markdown)
