"""Builds docs/index.html: the README, then the sources of the reading path, comments on the left and code on the right.

    python -m docs.page [FILE]      writes docs/index.html, or FILE

A source becomes sections. A function or class begins one, with its docstring as the comment; so does a comment on lines
of its own. Comments at the end of a line (shapes) stay in the code. One page, without scripts and without requests to
anywhere: formulas are MathML, pictures are the ones beside it. Needs `pip install -e '.[docs]'`.
"""

import ast
import io
import os
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape, unescape
from itertools import groupby
from pathlib import Path
from textwrap import dedent

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import lexers, token
from pygments.util import ClassNotFound

import config
from config import UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = ["mini.py", "pyramid.py", "schedule.py", "model.py", "train.py", "sample.py", "fid.py",
         *sorted(f"baselines/{path.name}" for path in ROOT.glob("baselines/*.py"))]
CLASSES = {token.Comment: "c", token.String: "s", token.Keyword: "k", token.Operator.Word: "k",
           token.Name.Decorator: "f", token.Name.Function: "f", token.Name.Class: "f"}    # all else has no colour
STYLES = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK", "fraktur": "FRAKTUR", "bold": "BOLD",
          "bold-italic": "BOLD ITALIC"}                     # of MathML and of Unicode
RULER = re.compile(r"^[-=]{9,}$", re.M)
MATHS = re.compile(r"\$\$(.+?)\$\$|\$`(.+?)`\$|\$(?![\s$])((?:\\.|[^$\\])+?)(?<!\s)\$(?!\w)", re.S)

# ---------------------------------------------------------------------------------------------------------------------
# sources


@dataclass
class Section:
    """A comment and the code beside it; name is set where a function or class begins."""

    name: str = ""
    comments: list[str] = field(default_factory=list)
    code: list[int] = field(default_factory=list)           # numbers of lines


def definitions(node: ast.AST, outer: str = "", inside: bool = False) -> Iterator[tuple]:
    """(qualified name, node) of every function and class; of those inside functions, the ones with a docstring."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not function and not isinstance(child, ast.ClassDef):
            yield from definitions(child, outer, inside)
            continue
        if not inside or ast.get_docstring(child):
            yield outer + child.name, child
        yield from definitions(child, f"{outer}{child.name}.", inside or function)


def docstring(node: ast.AST, lines: list[str]) -> tuple[range, str] | None:
    """Lines and text of a docstring that has its lines for itself."""
    if not ast.get_docstring(node):
        return None
    at = node.body[0]
    around = lines[at.lineno - 1].encode()[: at.col_offset] + lines[at.end_lineno - 1].encode()[at.end_col_offset :]
    return None if around.strip() else (range(at.lineno, at.end_lineno + 1), ast.get_docstring(node))


def comments(source: str) -> Iterator[list]:
    """(lines, text) of every block of comments on lines of their own, outside brackets."""
    depth, block = 0, []
    for kind, text, (row, column), _, line in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (text in "([{") - (text in ")]}") if kind == tokenize.OP else 0
        if kind == tokenize.COMMENT and not depth and not line[:column].strip() and not text.startswith("#!"):
            if block and row != block[-1][0] + 1:
                yield block
                block = []
            block.append((row, text[1:]))
    yield from [block] if block else []


def sections(source: str) -> list[Section]:
    """A Python source as sections, in the order of its lines; every line is in one of them, or blank."""
    lines, tree = source.splitlines(), ast.parse(source)
    begins, texts = {}, {}                                  # line -> name, or ""; first line -> (lines, text)
    for name, node in [("", tree), *definitions(tree)]:
        if name:
            begins[min([node.lineno, *(mark.lineno for mark in node.decorator_list)])] = name
            begins.setdefault(node.end_lineno + 1, "")
        if comment := docstring(node, lines):
            texts[comment[0].start] = comment
    for block in comments(source):
        begins.setdefault(block[0][0], "")
        texts[block[0][0]] = range(block[0][0], block[-1][0] + 1), dedent("\n".join(text for _, text in block))
    out, n = [Section()], 1
    while n <= len(lines):
        if n in begins:
            if any(lines[i - 1].strip() for i in out[-1].code) or any(map(RULER.search, out[-1].comments)):
                out.append(Section())
            out[-1].name = begins[n]
        if n in texts:
            taken, text = texts[n]
            out[-1].comments.append(text)
            n = taken.stop
        else:
            out[-1].code.append(n)
            n += 1
    for section in out:                                     # without blank lines at both ends
        full = [n for n in section.code if lines[n - 1].strip()]
        section.code = [n for n in section.code if full and full[0] <= n <= full[-1]]
    return [section for section in out if section.code or section.comments]


def highlight(code: str, language: str) -> list[str]:
    """HTML of every line."""
    try:
        tokens = lexers.get_lexer_by_name(language, stripnl=False).get_tokens(code.rstrip("\n") + "\n")
    except ClassNotFound:
        tokens = [(token.Text, code)]
    out = [""]
    for name, group in groupby(tokens, key=lambda pair: next((CLASSES[of] for of in CLASSES if pair[0] in of), "")):
        for i, part in enumerate("".join(text for _, text in group).split("\n")):
            out += [""] if i else []
            part = escape(part, quote=False)
            out[-1] += f'<span class="{name}">{part}</span>' if name and part.strip() else part
    return out[:-1] if not out[-1] else out


def columns(lines: list[str]) -> list[list[str]] | None:
    """Plain text that is laid out in columns, as rows of cells; None if it is not. A line that begins under the second
    column continues the row before it."""
    gaps = [re.search(r"^ +|(?<=\S) {2,}(?=\S)", line) for line in lines]
    ends = Counter(gap.end() for gap in gaps if gap)
    column, count = ends.most_common(1)[0] if ends else (0, 0)
    if 2 * count < len(lines) or count == 1:
        return None
    rows = []
    for line, gap in zip(lines, gaps, strict=True):
        at = column if not line[column - 1 : column].strip() else gap.end() if gap else 0
        left, right = line[:at].strip(), line[at:].strip()
        if not at or not (left or rows):
            return None
        if left:
            rows.append([left, right])
        else:
            rows[-1][1] += " " + right
    further = columns([line[column:] for line in lines]) if len(rows) == len(lines) else None
    return [[row[0], *rest] for row, rest in zip(rows, further, strict=True)] if further else rows


def inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"(?<!\S)# (not in paper)\b", r"<mark>\1</mark>", text)


def prose(text: str) -> str:
    """HTML of a comment or docstring: paragraphs, lists with * or -, columns, and what is indented as it stands."""
    if RULER.search(text):                                  # a heading
        return f"<hr><h4>{inline(RULER.sub('', text).strip())}</h4>"
    out = []
    for block in re.split(r"\n(?:[ ]*\n)+", text):
        plain, lines = not block.startswith(" "), dedent(block).splitlines()
        if re.match(r"[*-] ", lines[0]):
            items = re.split(r"\n[*-] ", "\n".join(lines)[2:])
            out.append("<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>")
            continue
        commands = all(re.match(r"(python|torchrun|pip) ", line) for line in lines)
        rows = None if re.search(r"[─-╿]|---", block) else columns(lines)       # a drawing
        if commands:
            rows = [re.split(r" {2,}", line, maxsplit=1) for line in lines]
        elif not rows and plain and len(lines) > 2 and (rows := columns(lines[1:])):
            out.append(f"<p>{inline(lines[0])}</p>")
        if rows:
            long = ' class="long"' if commands or max(len(row[0]) for row in rows) > 24 else ""
            cells = ("".join(f"<td>{inline(cell)}</td>" for cell in row) for row in rows)
            out.append(f"<table{long}>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        elif plain:
            out.append(f"<p>{inline(block)}</p>")
        else:
            out.append(('<pre class="line">' if len(lines) == 1 else "<pre>") + inline(dedent(block)) + "</pre>")
    return "\n".join(out)


def listing(file: str) -> str:
    """A source as HTML, with an anchor for the file, for each name and for each line of code."""
    source, rows, names = (ROOT / file).read_text(), [], []
    lines = highlight(source, "python")
    for section in sections(source):
        left = "\n".join(map(prose, section.comments))
        if section.name and section.name not in names:
            names.append(section.name)
            at = f"{file}:{section.name}"
            left = f'<h3 id="{at}"><a href="#{at}">{section.name}</a></h3>\n{left}'
        code = "\n".join(f'<span id="{file}-{n}" data-n="{n}">{lines[n - 1]}</span>' for n in section.code)
        rows.append(f'<div class="prose"><div>{left}</div></div>\n<pre class="code">{code}</pre>')
    public = [name for name in names if not re.search(r"(^|\.)_", name)]
    index = " ".join(f'<a href="#{file}:{name}">{name}</a>' for name in public)
    return (f'<section class="file">\n<header id="{file}"><h2><a href="#{file}">{file}</a></h2> '
            f'<a href="../{file}">source, {len(lines)} lines</a>\n<p>{index}</p></header>\n'
            f'<div class="listing">\n{chr(10).join(rows)}\n</div>\n</section>')


# ---------------------------------------------------------------------------------------------------------------------
# README


def letter(match: re.Match) -> str:
    """A letter in a style, as a character of its own: browsers know no other way."""
    name = re.sub(r"(LATIN|GREEK) | LETTER", "", f"{STYLES[match[2]]} {unicodedata.name(unescape(match[3]))}")
    for full in (f"MATHEMATICAL {name}", name):             # the second for a few that are older
        try:
            return f"<{match[1]}>{unicodedata.lookup(full)}</{match[1]}>"
        except KeyError:
            pass
    return f"<{match[1]}>{match[3]}</{match[1]}>"


def formula(tex: str, display: str = "inline") -> str:
    """MathML of TeX, with amends where the converter or browsers fall short."""
    tex = re.sub(r"(\\(?:begin|end)\{)aligned\}", r"\1split}", tex.strip())
    tex = re.sub(r"\\(?:mathrm|operatorname)\{([A-Za-z]+)\}", r"\\text{\1}", tex)
    tex = re.sub(r"\\[lr]([vV])ert\b", lambda m: "|" if m[1] == "v" else r"\|", tex)
    try:
        html = convert(tex, display=display)
    except Exception as problem:                            # of many kinds
        raise UserError(f"README.md: the formula {tex} cannot be converted: {problem!r}") from None
    if unknown := re.search(r">(\\\w+|&)<", html):
        raise UserError(f"README.md: {unknown[1]} in the formula {tex} is not known to latex2mathml")
    html = re.sub(rf'<(m[in]) mathvariant="({"|".join(STYLES)})">(&#x\w+;|\w)</m[in]>', letter, html)
    html = html.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")         # \sim
    return html.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")


def inline_maths(state, silent: bool) -> bool:
    """$...$, $`...`$ and $$...$$ in a line of Markdown, by GitHub's rules."""
    match = MATHS.match(state.src, state.pos)
    if not match or state.src[state.pos - 1 : state.pos].isalnum():
        return False
    if not silent:
        tex = match[1] or match[2] or match[3]
        state.push("maths", "", 0).content = formula(tex, "block" if match[1] else "inline")
    state.pos = match.end()
    return True


def block_maths(state, start: int, end: int, silent: bool) -> bool:
    """$$...$$ on lines of its own, so that no line of it is taken for a list."""
    first = state.bMarks[start] + state.tShift[start]
    match = re.compile(r"\$\$((?:(?!\n[ ]*\n).)+?)\$\$[ ]*(?=\n|$)", re.S).match(state.src, first)
    if not match:
        return False
    if not silent:
        state.push("maths", "", 0).content = f'<div class="scroll">{formula(match[1], "block")}</div>\n'
        state.line = start + match[0].count("\n") + 1
    return True


def fence(_, tokens, at, *__) -> str:
    language, text = tokens[at].info.strip(), tokens[at].content.rstrip("\n")
    if language == "math":
        return f'<div class="scroll">{formula(text, "block")}</div>\n'
    return "<pre>" + "\n".join(highlight(text, language)) + "</pre>\n"


def markdown(text: str) -> tuple[str, list[tuple[str, str]]]:
    """HTML of the README, and (anchor, title) of its chapters."""
    md = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    md.inline.ruler.before("escape", "maths", inline_maths)
    md.block.ruler.before("table", "maths", block_maths, {"alt": ["paragraph", "blockquote", "list"]})
    md.add_render_rule("maths", lambda _, tokens, at, *__: tokens[at].content)
    md.add_render_rule("fence", fence)
    md.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    md.add_render_rule("table_close", lambda *_: "</table></div>\n")
    text = re.sub(r"^<!-- .* -->\n", "", text, flags=re.M).replace(" ± ", "\u00a0±\u00a0")
    text = re.sub(r"^> \[!(\w+)\]$", lambda m: f"> **{m[1].capitalize()}**\\", text, flags=re.M)      # GitHub's alerts
    tokens, chapters, seen = md.parse(text), [], Counter()
    for opening, words in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            title = "".join(part.content for part in words.children if part.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")           # as on GitHub
            seen[anchor] += 1
            opening.attrs["id"] = anchor + (f"-{seen[anchor] - 1}" if seen[anchor] > 1 else "")
            chapters += [(opening.attrs["id"], title)] if opening.tag == "h2" else []
    return md.renderer.render(tokens, md.options, {}), chapters


def relink(html: str, anchors: set[str]) -> str:
    """Links and pictures of the README as seen from docs/: files of the page become anchors, pictures from elsewhere
    (a badge) their words."""
    def attribute(match):
        name, target = match.groups()
        path, _, part = target.partition("#")
        path = path.rstrip("/")
        if not path or re.match(r"\w+:|/", target):
            return match[0]
        for file in (path, f"{path}/__init__.py"):
            if name == "href" and file in FILES:
                line = re.sub(r"L(\d+).*", rf"{file}-\1", part)
                return f'href="#{line if line in anchors else file}"'
        return f'{name}="{os.path.relpath(path, "docs")}{"#" + part if part else ""}"'

    def tag(match):
        if re.search(r'\bsrc(set)?="(\w+:)?//', match[0]):
            alt = re.search(r'\balt="([^"]*)"', match[0])
            return alt[1] if alt else ""
        return re.sub(r'\b(href|src|srcset)="([^"]+)"', attribute, match[0])

    return re.sub(r"<[a-z][^<>]*>", tag, html)


def page(readme: str) -> str:
    """The whole page."""
    listings = "\n".join(map(listing, FILES))
    article, chapters = markdown(readme)
    article = relink(article, set(re.findall(r'\bid="([^"]+)"', listings)))
    title = re.search(r"<h1[^>]*>(.*?)</h1>", article, flags=re.S)
    title = re.sub(r"<[^>]+>", "", title[1]) if title else ROOT.name
    files = [f'<a href="#{file}">{file}</a>' for file in FILES]
    bar = " ".join(files).replace(">baselines/", ">")
    contents = "".join(f'<li><a href="#{at}">{escape(text)}</a></li>' for at, text in chapters)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{(ROOT / "docs" / "page.css").read_text()}</style>
</head>
<body id="top">
<nav class="bar"><a href="#top"><b>{title}</b></a> <a href="#contents">contents</a> {bar}</nav>
<main>
<article>
{article}</article>
<nav id="contents"><b>Contents</b>
<ul>{contents}</ul>
<ul>{"".join(f"<li>{file}</li>" for file in files)}</ul></nav>
</main>
{listings}
</body>
</html>
"""


def main() -> None:
    parser = config.parser(__doc__, "python -m docs.page [FILE]")
    parser.add_argument("file", nargs="?", default=ROOT / "docs" / "index.html", help="[docs/index.html]")
    out = Path(parser.parse_args().file)
    try:
        out.write_text(page((ROOT / "README.md").read_text()))
    except OSError as problem:
        raise UserError(f"the page cannot be built: {problem}") from None
    print(f"wrote {out}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    config.run(main)
