"""A hook of MkDocs: links from a page to files outside docs/ work on GitHub, but there is no such file on the site.

A line that is a link to an operator's README becomes its text, without the links in it. The others lead to the
repository where mkdocs.yml has a `repo_url`; where it has none only their text stays, names as code.
"""

import posixpath
import re
from pathlib import Path

README = re.compile(r"^\[[^][]+\]\(\.\./(svit/ops/\w+/README\.md)\)$", re.MULTILINE)
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

    def text_of(link: re.Match) -> str:
        text = (Path(config.config_file_path).parent / link[1]).read_text()
        return re.sub(r"\[([^][]+)\]\(\w+\.py\)", r"`\1`", text).replace("# ", "### ", 1)

    return LINK.sub(replace, README.sub(text_of, markdown))
