"""The page as one HTML file: style, script, plotting library and figures are all inside it; nothing is fetched."""

from __future__ import annotations

import base64
import gzip
import importlib.resources
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lightning_llm import __version__
from lightning_llm.report import sections
from lightning_llm.report.record import Run


def write_page(runs: Sequence[Run], output: Path) -> None:
    """Write the page about `runs`; it replaces an older one only when it is complete."""
    unfinished = output.with_name(f".{output.name}.part")
    unfinished.write_text(render_page(runs), encoding="utf-8")
    unfinished.replace(output)


def render_page(runs: Sequence[Run]) -> str:
    """The whole HTML of the page about `runs`."""
    parts = [part for part in (write(runs) for write in sections.SECTIONS) if part is not None]
    navigation = "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in parts)
    body = "".join(f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>{part.html}</section>' for part in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="lightning-llm {__version__}">
<link rel="icon" href="data:,">
<title>{escape(sections.title(runs))}</title>
<style>{_own("page.css")}</style>
</head>
<body>
<main>
{sections.header(runs)}
<nav>{navigation}</nav>
{sections.notices(runs)}
{body}
<footer>Made by lightning-llm {__version__} from {escape(", ".join(run.folder_name for run in runs))}.</footer>
</main>
<script type="text/plain" id="plotly">{_packed_plotly()}</script>
<script>{_own("page.js")}</script>
</body>
</html>
"""


def _packed_plotly() -> str:
    """plotly.js, compressed: the page is 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), mtime=0)).decode("ascii")


def _own(name: str) -> str:
    return importlib.resources.files("lightning_llm.report").joinpath(name).read_text(encoding="utf-8")
