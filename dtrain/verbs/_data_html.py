"""The preview as one file for a browser: nothing is fetched, and nothing in the data is taken for markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from dtrain.verbs._data_pieces import Piece, visible
from dtrain.verbs._data_preview import Shown, border

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; background: #fff;
       font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; }
.about, .text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
.about { background: #f6f6f6; padding: .7rem 1rem; font-size: 13px; }
.document { border: 1px solid #ccc; border-radius: 4px; margin: .6rem 0; }
.border { background: #eee; padding: .15rem .7rem; font-size: 13px; color: #555; }
.text { padding: .5rem .7rem; font-size: 13px; }
.trained, .context { box-shadow: inset -1px 0 rgba(0, 0, 0, .15); }
.trained { background: #bfe8c4; } .context { background: #f4f4f4; }
.padding { color: #888; background: #fff; border: 1px dashed #bbb; border-radius: 4px; padding: .15rem .7rem;
           font-size: 13px; }
sub { color: #777; font-size: 9px; margin-left: 1px; }
"""


def page(rows: Sequence[Shown], notes: Sequence[str], *, ids: bool) -> str:
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        "<title>dtrain data preview</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        "<h1>Rows as they are trained on</h1>",
        f'<div class="about">{escape(visible(chr(10).join(notes)))}</div>',
        '<p>Legend: <span class="trained">trained</span> <span class="context">context</span> '
        '<span class="padding">padding</span>; point at a token for its place and id.</p>',
        *(line for shown in rows for line in _row(shown, ids=ids)),
        "</body>", "</html>", "",
    ])  # fmt: skip


def _row(shown: Shown, *, ids: bool) -> Iterator[str]:
    yield f"<section><h2>{escape(shown.title)}</h2>"
    for k, document in enumerate(shown.documents, 1):
        tokens = "".join(_span(piece, ids=ids) for piece in document)
        yield (f'<div class="document"><div class="border">{border(k, document, len(shown.documents))}</div>'
               f'<div class="text">{tokens}</div></div>')  # fmt: skip
    yield f'<div class="padding">padding: {escape(shown.padding)}</div></section>'


def _span(piece: Piece, *, ids: bool) -> str:
    kind = "trained" if piece.trained else "context"
    said = " ".join(map(str, piece.ids))
    text = escape(visible(piece.text)).replace("\n", "⏎\n" if piece.trained else "\n")
    return (f'<span class="{kind}" title="place {piece.at}, id {said}, {kind}">{text}'
            f"{f'<sub>{said}</sub>' if ids else ''}</span>")  # fmt: skip
