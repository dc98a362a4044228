"""Hooks of mkdocs: links to files outside docs/ go to the repository, if mkdocs.yml names it."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown, *, config, **_):
    if config.repo_url:
        root = f"{config.repo_url.rstrip('/')}/blob/main"
        return OUTSIDE.sub(rf"[\1]({root}/\2)", markdown)
    return OUTSIDE.sub(r"`\2`", markdown)
