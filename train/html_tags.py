"""HTML as text, escaped where it is made: elements, tables, numbers that carry their exact value, inline pictures."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NewType

# Text that is HTML already; everything else is escaped.
Html = NewType("Html", str)

NOTHING = Html("")


def text(value: Any) -> Html:
    """Anything as text."""
    return Html(html.escape(str(value), quote=True))


def joined(parts: Iterable[Html]) -> Html:
    """One after the other."""
    return Html("".join(parts))


def tag(name: str, *children: Html, **attributes: str) -> Html:
    """An element. Children are HTML (plain text comes through `text`, and the type checker asks for it)."""
    pairs = ((key.rstrip("_").replace("_", "-"), html.escape(value, quote=True)) for key, value in attributes.items())
    told = "".join(f' {key}="{value}"' for key, value in pairs)
    return Html(f"<{name}{told}>{''.join(children)}</{name}>")


def number(value: float | None, *, digits: int = 3, signed: bool = False) -> Html:
    """A number rounded for people; the exact one stands in its `value`."""
    if value is None or not math.isfinite(value):
        return Html("–")
    shown = f"{value:{'+' if signed else ''}.{digits}f}"
    return tag("data", text(shown), value=repr(float(value)))


def with_interval(value: float | None, interval: Sequence[float | None] | None, *, signed: bool = False) -> Html:
    """`0.812 [0.701, 0.903]`."""
    if interval is None or value is None:
        return number(value, signed=signed)
    low, high = interval
    bounds = Html(f" [{number(low, signed=signed)}, {number(high, signed=signed)}]")
    return Html(number(value, signed=signed) + bounds)


def table(header: Sequence[Html], rows: Iterable[Sequence[Html]], *, caption: Html = NOTHING) -> Html:
    """The first cell of a row is its heading."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    told = tag("caption", caption) if caption else NOTHING
    return tag("div", tag("table", told, tag("thead", head), tag("tbody", *body)), class_="wide")


def facts(rows: Iterable[tuple[str, Html]]) -> Html:
    """Names and values, those without a value left out."""
    return tag("dl", *(Html(tag("dt", text(name)) + tag("dd", value)) for name, value in rows if value))


def picture(svg: str, *, says: str, caption: Html) -> Html:
    """An inline picture: nothing is fetched, and its text can be read aloud."""
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(says, quote=True)}">'
    return tag("figure", Html(image), tag("figcaption", caption))


def folded(summary: str, content: Html) -> Html:
    """What is shown when it is asked for; needs no script."""
    return tag("details", tag("summary", text(summary)), content)


def page(title: str, *content: Html) -> str:
    """A whole document that fetches nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in content if part)
        + "\n</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6b7b; --line: #dde3ea; --tint: #f4f7fa; --blue: #0063a3; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; }
.lead { color: var(--soft); margin-top: 0; }
.verdict { background: var(--tint); border-left: .3rem solid var(--blue); padding: .8rem 1.1rem; margin: 1.2rem 0; }
.verdict p { margin: .35rem 0; }
.bad { border-left-color: #b3261e; background: #fdf2f1; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody th { font-weight: 400; }
figure { margin: 1rem 0 1.6rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.pair figure { flex: 1 1 22rem; max-width: 30rem; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--blue); }
pre { background: var(--tint); padding: .9rem; overflow-x: auto; font-size: .86rem; line-height: 1.45; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media print { main { max-width: none; } details { display: block; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
""".strip()
