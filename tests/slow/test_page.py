"""docs/page.py: a page that stands alone and loses nothing of the README and of the sources."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from config import UserError
from conftest import ROOT
from docs import page as builder

pytestmark = pytest.mark.slow

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What the tests look at: (tag, attributes) of all, text by kind, lines of code by anchor."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.unclosed = [], [], []
        self.css, self.words, self.prose, self.lines, self.file = "", "", Counter(), Counter(), ""
        self.feed(html)
        self.close()
        self.unclosed += [tag for tag, _ in self.open]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "header":
            self.file = attributes["id"]
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open[-1][0] != tag:
            self.unclosed.append(self.open.pop()[0])
        self.open.pop() if self.open else self.unclosed.append(f"/{tag}")

    def handle_data(self, data):
        tags = {tag for tag, _ in self.open}
        if "style" in tags:
            self.css += data
        elif not tags & {"pre", "code", "math"}:
            self.words += data
        for _, attributes in self.open:
            if attributes.get("class") == "prose":
                self.prose[self.file] = (self.prose[self.file] or "") + data
            elif "data-n" in attributes:
                self.lines[attributes["id"]] = (self.lines[attributes["id"]] or "") + data


def check(html: str) -> Page:
    """What holds of every page."""
    read = Page(html)
    assert not read.unclosed
    ids = Counter(attributes["id"] for _, attributes in read.tags if "id" in attributes)
    assert max(ids.values()) == 1
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "srcset"):
            if name in attributes:
                assert (ROOT / "docs" / attributes[name]).is_file(), attributes[name]
        target = attributes.get("href", "https:")
        if target.startswith("#"):
            assert target[1:] in ids, target
        elif not re.match(r"https?:|mailto:", target):
            assert (ROOT / "docs" / target.split("#")[0]).exists(), target
    assert not re.search(r"http|url\(|@import", read.css)
    assert not re.search(r"\$\$|\$`|\$[^\s$][^$]*\$", read.words)              # no formula is left as TeX
    return read


def test_the_page_of_this_repository(program, tmp_path):
    program("docs.page", tmp_path / "index.html")
    html = (tmp_path / "index.html").read_text()
    read = check(html)
    assert len(html) < 600_000
    for file in builder.FILES:
        prose = re.sub(r"\W", "", read.prose[file])
        for n, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if f"{file}-{n}" in read.lines:
                assert read.lines[f"{file}-{n}"] == line
            else:                                           # a comment or docstring, or blank
                assert re.sub(r"\W", "", line) in prose, (file, n, line)
        for name in re.findall(r"^(?:def|class) ([a-z]\w*)", (ROOT / file).read_text(), flags=re.M | re.I):
            assert f'href="#{file}:{name}"' in html


def test_what_a_readme_can_hold():
    html = builder.page(r"""# Name

Inline $x_t = \alpha\,x_1$, $`a_{1}`$, \$5 and `$HOME`; $\mathcal N(0, I)$, $\mathcal L$, $\boldsymbol\theta$, $\sim$.

$$
x = \sum_{i=0}^{K-1} \frac{1}{2}
- y
=
0
$$

```math
\begin{bmatrix} a & b \\ c & d \end{bmatrix} \text{of } \begin{aligned} a &= b \\ c &= d \end{aligned}
```

| $K$ | 0.1 ± 0.2 |
|---|---|
| $1$ | [model.py](model.py) [line](model.py#L2) [line](model.py#L32) [all](baselines/) [log](LOG.md) [here](#a-b-c) |

<p align="center"><picture><source media="(prefers-color-scheme: dark)" srcset="docs/study.png">
<img src="docs/study.png" alt="x" width="400"></picture></p>

![a badge](https://example.org/badge.svg) ![previews](docs/previews.png)

## A, `b` c
""")
    read = check(html)
    assert sum(tag == "math" for tag, _ in read.tags) == 10 and "𝒩" in html and "ℒ" in html and "𝜽" in html
    assert "badge.svg" not in html and "a badge" in read.words and "$5" in read.words
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a" and "href" in attributes]
    assert {"#model.py", "#model.py-32", "#baselines/__init__.py", "../LOG.md", "#a-b-c"} <= set(links)


def test_a_formula_that_cannot_be_shown_is_named():
    for tex in (r"\unknown x", "a & b"):
        with pytest.raises(UserError, match="README.md: .* in the formula"):
            builder.page(f"# Name\n\n${tex}$\n")


def test_sections():
    source = '''"""Module."""

import a  # kept

# A comment
# of two lines.
x = [
    # inside brackets: code
    1,
]

class A:
    """Class."""

    @b
    def f(self):
        """Method."""
        # why
        return 1

    def g(self): return """no docstring of its own lines"""


# ---------
# part

def h():
    def inner():
        """Inner."""
    return inner
'''
    parts = [(s.name, s.comments, s.code) for s in builder.sections(source)]
    assert parts == [("", ["Module."], [3]), ("", ["A comment\nof two lines."], [7, 8, 9, 10]), ("A", ["Class."], [12]),
                     ("A.f", ["Method."], [15, 16]), ("", ["why"], [19]), ("A.g", [], [21]),
                     ("", ["---------\npart"], []), ("h", [], [27]), ("h.inner", ["Inner."], [28]), ("", [], [30])]


def test_comments_as_prose():
    assert builder.prose("a `b` < c  # not in paper: d") == (
        "<p>a <code>b</code> &lt; c  <mark>not in paper</mark>: d</p>")
    assert builder.prose("--------------\nthe method") == "<hr><h4>the method</h4>"
    assert builder.prose("* a\n  b\n* c") == "<ul><li>a\n  b</li><li>c</li></ul>"
    assert builder.prose("    x = y    y = z") == '<pre class="line">x = y    y = z</pre>'
    assert builder.prose("    python a.py --b      does it\n    python c.py") == (
        '<table class="long"><tr><td>python a.py --b</td><td>does it</td></tr><tr><td>python c.py</td></tr></table>')
    assert builder.prose("One:\n\n    x = 1\n      + 2") == "<p>One:</p>\n<pre>x = 1\n  + 2</pre>"
    rows = "<tr><td>name</td><td>what it is, on two lines</td></tr><tr><td>a_longer_one</td><td>also</td></tr>"
    assert builder.prose("f(x, and, more) -> y\nname       what it is,\n           on two lines\na_longer_one  also"
                      ) == f"<p>f(x, and, more) -&gt; y</p>\n<table>{rows}</table>"
