"""HTML of one page that needs nothing beside it: tables, figures inside, a style."""
import base64
import html
import os
import shlex

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e5e5; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } caption { text-align: left; color: #555; font-size: .9rem; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; } code { font-size: .9em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; } img { width: 100%; height: auto; } figcaption { font-size: .85rem; color: #555; }
.status { color: #555; margin-top: 0; } .settings td { overflow-wrap: anywhere; font-size: .9rem; }
@media print { body { max-width: none; margin: 0; } figure, table { break-inside: avoid; } }
"""
MIME = {".svg": "image/svg+xml", ".png": "image/png"}


def text(value):
    """A value as HTML text; it may hold bytes that are no text."""
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def number(value, form):
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def table(head, rows, caption="", numbers_from=1):
    """A table; from the column `numbers_from` on the cells stand to the right."""
    def cells(row, tag):
        return "".join(
            f"<{tag}{' class=number' if i >= numbers_from else ''}>{text(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    return (
        "<table>" + (f"<caption>{text(caption)}</caption>" if caption else "") + (f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else "")
        + "<tbody>" + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</tbody></table>"
    )


def table_of(values):
    """A table of names and values, a dict."""
    rows = [(name, shlex.join(map(str, value)) if isinstance(value, list) else "–" if value is None else value) for name, value in values.items()]
    return f"<div class=settings>{table((), rows, numbers_from=2)}</div>"


def figure(path, words, wide=False):
    """A file's picture with words under it, which readers who do not see it get too."""
    with open(path, "rb") as file:
        content = base64.b64encode(file.read()).decode()
    mime, words = MIME[os.path.splitext(path)[1]], text(words)
    return f'<figure{" class=wide" * wide}><img alt="{words}" src="data:{mime};base64,{content}"><figcaption>{words}</figcaption></figure>'


def page(title, status, sections, reload=None):
    """The page as text: sections, HTML by their headings; reload: seconds after which it loads itself again."""
    refresh = f'<meta http-equiv="refresh" content="{reload}">\n' if reload else ""
    body = "\n".join(f"<h2>{text(heading)}</h2>\n{content}" for heading, content in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
<p class="status">{text(status)}</p>
{body}
</main>
</body>
</html>
"""
