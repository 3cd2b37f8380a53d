"""Markdown on the page in a browser: what is rendered, what must not act, and how answers grow."""

from __future__ import annotations

import pytest
from browser import NEEDS_BROWSER, Chat, Page

pytestmark = NEEDS_BROWSER

DOCUMENT = """# Title

A *soft* and **strong** `code` line
with a break, a [link](https://example.org/a?b=1&c=2 "Hint"), ~~gone~~ and H<sub>2</sub>O.

Setext
------

- one
- two
  1. inner
  2. more

     deep paragraph
- [x] done
- [ ] open

> quoted
> > twice
>
> ```js
> let quoted = 1;
> ```

| name | count |
| :--- | ----: |
| a | 1 |
| **b** | 22 |

```python
def f(x):
    # comment
    return "string" + str(x) * 3
```

~~~
no language <b>
~~~

See [the reference][ref] and <https://example.org/auto>.

***

![a picture](https://example.org/p.png)

[ref]: https://example.org/ref

Last line"""


def rendered(page: Page, text: str) -> str:
    """The markup of a complete text."""
    return str(page.module("markdown", "m.render(a[0]).map(node => node.outerHTML).join('')", text))


@pytest.fixture
def page(chat: Chat) -> Page:
    return chat()


def test_markdown_becomes_elements(chat: Chat) -> None:
    page = chat(DOCUMENT)
    page.say("Show everything.")
    page.look("light-markdown")

    def found(selector: str) -> list[str]:
        return page.shown(f".answer {selector}")

    assert (found("h3"), found("h4")) == (["Title"], ["Setext"])
    assert (found("em"), found("strong"), found("del"), found("sub")) == (["soft"], ["strong", "b"], ["gone"], ["2"])
    assert found("td") == ["a", "1", "b", "22"]
    assert page.find(".answer th:last-child").value_of_css_property("text-align") == "right"
    assert found("ul > li > ol > li") == ["inner", "more\ndeep paragraph"]
    assert [item for item in found("li") if "one" in item or "done" in item] == ["one", "☑ done"]
    assert found("blockquote .block code") == ["let quoted = 1;"]
    links = [(link.text, link.get_attribute("href"), link.get_attribute("rel")) for link in page.all(".answer a")]
    rel = "noopener noreferrer nofollow"
    assert links == [
        ("link", "https://example.org/a?b=1&c=2", rel),
        ("the reference", "https://example.org/ref", rel),
        ("https://example.org/auto", "https://example.org/auto", rel),
        ("Image: a picture", "https://example.org/p.png", rel),
    ]
    assert found(".block > div > span") == ["js", "python", "code"]
    assert found(".block:last-of-type code")[-1] == "no language <b>"
    assert {"hljs-keyword", "hljs-comment", "hljs-string"} <= set(
        page.run("return [...document.querySelectorAll('.answer .block span')].map(e => e.className)")
    )
    page.allow_clipboard()
    page.button("Copy code", within=".answer blockquote").click()
    page.until(lambda: "Copied" in page.shown(".answer blockquote .small"))
    assert page.copied() == "let quoted = 1;"


ATTACKS = [
    "<script>act()</script>",
    "<img src=x onerror=act()>",
    "<svg onload=act()><script>act()</script></svg>",
    "<svg><a xlink:href='javascript:act()'><text>click</text></a></svg>",
    "<iframe src='javascript:act()'></iframe>",
    "<iframe srcdoc='<script>parent.act()</script>'></iframe>",
    "<object data='javascript:act()'></object><embed src='javascript:act()'>",
    "<form action='https://evil.example/'><input name=x autofocus onfocus=act()><button>go</button></form>",
    "<details open ontoggle=act()><summary>x</summary></details>",
    "<body onload=act()>",
    "<style>* { display: none }</style>",
    "<p style='position:fixed;inset:0;background:url(https://evil.example/)'>cover</p>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<base href=https://evil.example/>",
    "<video src=x onerror=act()></video><audio src=x onerror=act()></audio>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=act()&gt;'>",
    "<noscript><p title='</noscript><img src=x onerror=act()>'></noscript>",
    "<template><script>act()</script></template>",
    "<a href='javascript:act()'>x</a>",
    "<b onclick=act() style=color:red id=log class=failed>bold</b>",
    "<input type=image src=x onerror=act()>",
    "<x onfocus=act() tabindex=0 autofocus>",
    "<!--><img src=x onerror=act()>-->",
    "<![CDATA[<img src=x onerror=act()>]]>",
    "<div><p>text <img src=x onerror=act()>\n\nmore</div>",
    "[x](javascript:act())",
    "[x](JaVaScRiPt:act())",
    "[x](java\tscript:act())",
    "[x](&#106;avascript:act())",
    "[x](javascript&colon;act())",
    "[x](\x01javascript:act())",
    "[x](data:text/html,<script>act()</script>)",
    "[x](vbscript:act())",
    "[x](file:///etc/passwd)",
    "[x](//evil.example/)",
    "[x](/v1/models)",
    "[x][r]\n\n[r]: javascript:act()",
    "<javascript:act()>",
    "![x](https://evil.example/x.png)",
    "![x](javascript:act())",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWN0KCk+)",
    '![a" onerror="act()](https://evil.example/x.png)',
    '[a](https://example.org/"onmouseover="act())',
    "[a](https://example.org '\" onmouseover=\"act()')",
    "`<img src=x onerror=act()>`",
    "```\n</code></pre><script>act()</script>\n```",
    '```" onclick="act()\ncode\n```',
    "```html\n<img src=x onerror=act()>\n```",
    "~~~\"><img/src=x/onerror=act()>\nx\n~~~",
    "| <img src=x onerror=act()> |\n| --- |\n| <script>act()</script> |",
    "# <img src=x onerror=act()>",
    "- <svg/onload=act()>\n- [ ] <script>act()</script>",
    "> <iframe src=javascript:act()>",
    "**<img src=x onerror=act()>**",
    "<br onclick=act()>",
    "<sub onclick=act()>2</sub>",
    "\\<img src=x onerror=act()>",
    "&lt;img src=x onerror=act()&gt;",
    "<a id=log name=log href=x>clobber</a><form id=form name=body></form>",
    "<img src=x onerror\x00=act()>",
    "<scr<script>ipt>act()</scr</script>ipt>",
    "<span class='hljs-string failed' data-setting=system aria-label=Send>x</span>",
    "http://evil.example/<script>act()</script>",
    "www.evil.example\"onclick=act()",
]  # fmt: skip

CHECK = """
const root = arguments[0], faults = [];
const tags = new Set(['a','article','b','blockquote','br','button','code','del','details','div','em','h2','h3','h4',
  'h5','h6','hr','i','kbd','li','mark','ol','p','pre','s','small','span','strong','sub','sup','summary','table','tbody','td',
  'th','thead','tr','u','ul','svg','use']);
const names = new Set(['align','class','href','rel','start','target','title','tabindex','role','aria-label','type',
  'aria-busy', 'viewBox', 'aria-hidden', 'disabled']);
for (const element of root.querySelectorAll('*')) {
  if (!tags.has(element.localName)) faults.push(element.outerHTML);
  for (const { name, value } of element.attributes) {
    if (!names.has(name)) faults.push(`${name} of ${element.outerHTML}`);
    if (name === 'href' && !/^(https?:\\/\\/|mailto:|#icon-)/.test(value)) faults.push(element.outerHTML);
    if (name === 'class' && element.closest('.answer') && /failed|turn/.test(value)) faults.push(element.outerHTML);
  }
}
return faults;
"""


def watch(page: Page) -> None:
    """Counts actions of attacks and breaches of the page's policy from now on."""
    page.run(
        "window.acted = 0; window.act = () => { acted += 1; }; window.breaches = [];"
        "document.addEventListener('securitypolicyviolation', e => breaches.push(e.violatedDirective))"
    )


def test_no_attack_acts_in_a_message(chat: Chat) -> None:
    answers = ["\n\n".join(ATTACKS), *ATTACKS[::4]]
    page = chat(*answers)
    watch(page)
    for answer in answers:
        page.say(answer.replace("\n", " ").replace("\t", " ").replace("\x00", "").replace("\x01", "")[:300])
    assert page.run(CHECK, page.find("#log")) == []
    assert page.run("return [acted, breaches, location.href]") == [0, [], f"{page.url}/"]
    assert "<img src=x onerror=act()>" in page.find(".answer").text, "raw HTML is shown as text"
    requested = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith(page.url) for name in requested)


GROWN = """(() => {
  const box = document.createElement('div'), [text, step] = a;
  box.className = 'answer';
  document.body.append(box);
  const writer = new m.Markdown(box);
  for (let end = step; end < text.length; end += step) writer.update(text.slice(0, end));
  writer.update(text, true);
  for (const element of box.querySelectorAll(':not(button)')) {
    for (const kind of ['focus', 'mouseover', 'click', 'toggle']) element.dispatchEvent(new Event(kind));
  }
  const faults = (function() { CHECK })(box);
  box.remove();
  return faults;
})()""".replace("CHECK", CHECK)


def test_each_attack_alone_and_in_pieces_leaves_nothing_that_acts(page: Page) -> None:
    watch(page)
    for attack in ATTACKS:
        for step in (1, len(attack)):
            faults = page.module("markdown", GROWN, attack, step)
            assert faults == [], attack
    assert page.run("return [acted, breaches]") == [0, []]


TRIED = """(async () => {
  const tried = {};
  const attempt = async (name, work) => {
    try { await work(); tried[name] = 'done'; } catch (error) { tried[name] = error.name; }
  };
  await attempt('markup', () => { document.createElement('div').innerHTML = '<b>x</b>'; });
  await attempt('script', () => { document.createElement('script').text = 'act()'; });
  await attempt('eval', () => (0, eval)('act()'));
  await attempt('handler', () => document.body.setAttribute('onclick', 'act()'));
  await attempt('fetch', () => fetch('http://evil.example/'));
  await attempt('image', () => new Promise((done, fail) => {
    const image = new Image();
    image.onload = done;
    image.onerror = () => fail(new Error());
    image.src = 'http://evil.example/x.png';
  }));
  await attempt('frame', () => {
    const frame = document.createElement('iframe');
    frame.src = 'http://evil.example/';
    document.body.append(frame);
    frame.remove();
  });
  document.body.click();
  return tried;
})()"""


def test_the_policy_stops_what_would_pass_the_sanitizer(page: Page) -> None:
    watch(page)
    outcome = page.module("dom", TRIED)
    assert outcome["markup"] == outcome["script"] == "TypeError"
    assert outcome["eval"] in ("EvalError", "TypeError")
    assert (outcome["fetch"], outcome["image"]) == ("TypeError", "Error")
    assert page.run("return acted") == 0
    breaches = set(page.run("return breaches"))
    assert {"require-trusted-types-for", "connect-src", "img-src"} <= breaches
    page.complaints()  # The browser reports each breach.


@pytest.mark.parametrize("step", [1, 7, 64])
def test_an_answer_in_pieces_looks_like_the_whole(page: Page, step: int) -> None:
    code = "\n".join(f"line {i} = '`' * {i}" for i in range(190 if step > 1 else 20))
    documents = [
        DOCUMENT,
        "- a\n\n- b\n\n      code\n\n  text\n\n1. x\n1. y\n\npara\n===\n\n<div>\n\nx\n\n</div>\n",
        f"Long code:\n\n````python\n{code}\n```\nstill code\n````js\nand more\n    ````\n````\n\nafter",
        f"Open:\n\n```\nopen {code}",
        f"1. list\n\n   ```\n   {code[:200]}\n   ```\n\n2. more\n\n~~~~ js\n{code}\n~~~\n~~~~~\nend",
        "a\n\n\n\nb\n\t\n| a |\n|-|\n| b |\n\nc  \nd\\\ne\n\n    indented\n\n    more\n\n[x]: /y\n\n[x] [z]\n\n[z]: https://z.org",
        "> a\nlazy\n\n> b\n\n\n***\n- - -\n+ x\n* y\n\n<!-- comment\n\nstill -->\n\nend",
        "𝒳 emoji 👩‍👩‍👧 \n\n" * 5,
    ]
    for text in documents:
        whole, pieces = page.module(
            "markdown",
            "(() => { const box = document.createElement('div'), writer = new m.Markdown(box);"
            "  const points = [...a[0]];"
            "  for (let end = a[1]; end < points.length; end += a[1]) writer.update(points.slice(0, end).join(''));"
            "  writer.update(a[0], true);"
            "  return [m.render(a[0]).map(n => n.outerHTML).join(''), box.innerHTML]; })()",
            text, step,
        )  # fmt: skip
        assert pieces == whole, text


COUNT = """(() => {
  const lex = globalThis.marked.Lexer.lex;
  let read = 0;
  globalThis.marked.Lexer.lex = (text, ...rest) => { read += text.length; return lex(text, ...rest); };
  const writer = new m.Markdown(document.createElement('div'));
  for (let end = 50; end < a[0].length; end += 50) writer.update(a[0].slice(0, end));
  writer.update(a[0], true);
  globalThis.marked.Lexer.lex = lex;
  return read;
})()"""


@pytest.mark.parametrize("kind", ["paragraphs", "code", "mixed"])
def test_the_work_for_a_long_answer_grows_with_its_length(page: Page, kind: str) -> None:
    code = "".join(f"line {i} of the code\n" for i in range(3000))
    text = {
        "paragraphs": "\n\n".join(f"Paragraph {i} has **some** words and a `piece`." for i in range(2000)),
        "code": f"Code:\n\n```python\n{code}```\n",
        "mixed": "\n\n".join(f"- item {i}\n- next\n\n```js\nlet x = {i};\n```" for i in range(1500)),
    }[kind]
    read = page.module("markdown", COUNT, text)
    assert len(text) > 50_000
    # Reading everything again for each piece would take more than 500 times the length.
    assert read < 20 * len(text)


@pytest.mark.parametrize(
    "text",
    [
        "> " * 20_000 + "deep",
        "1. " * 20_000,
        "[" * 20_000,
        "*a **b " * 5_000,
        "`" * 20_001,
        "|" * 5_000 + "\n" + "|-" * 5_000,
        "<" * 20_000,
        "![" * 10_000,
        "\\" * 20_001,
        "&" * 20_000,
        "_a_" * 10_000,
        "~" * 20_001,
    ],
    ids=lambda text: str(text)[:6],
)
def test_hostile_markdown_is_shown_and_ends(page: Page, text: str) -> None:
    assert page.module("markdown", "m.render(a[0]).map(n => n.textContent).join('').length", text) > 0


def test_a_paragraph_without_end_is_shown_without_its_emphasis(page: Page) -> None:
    assert rendered(page, ("*a* " * 900).strip()) == "<p>" + " ".join(["<em>a</em>"] * 900) + "</p>"
    assert rendered(page, ("*a* " * 1100).strip()) == "<p>" + " ".join(["*a*"] * 1100) + "</p>"


def table(columns: int, rows: int, cells: int) -> str:
    """A table whose rows have this many cells each."""
    return "|a" * columns + "|\n" + "|-" * columns + "|\n" + ("|b" * cells + "|\n") * rows


@pytest.mark.parametrize(
    ("text", "is_table"),
    [
        (table(20, 500, 20), True),
        (table(10, 30, 1), True),
        (table(800, 800, 1), False),
        (table(100, 100, 2), False),
        (table(100, 201, 100), False),
    ],
    ids=["full", "small", "wide", "sparse", "large"],
)
def test_a_table_that_would_become_much_larger_is_shown_as_text(page: Page, text: str, is_table: bool) -> None:
    rows, shown = page.module(
        "markdown", "(e => [e.querySelectorAll('tr').length, e.textContent])(m.render(a[0])[0])", text
    )
    assert (rows > 0) == is_table
    assert shown.count("b") >= text.count("b"), "nothing is lost"
    if not is_table:
        assert page.module("markdown", GROWN_CELLS, text) == 0


GROWN_CELLS = """(() => {
  const e = document.createElement('div'), shown = new m.Markdown(e);
  for (let end = 0; end < a[0].length; end += 997) shown.update(a[0].slice(0, end));
  shown.update(a[0], true);
  return e.querySelectorAll('td').length;
})()"""


def test_long_lines_of_code_are_not_highlighted(page: Page) -> None:
    for length, is_highlighted in ((1000, True), (1001, False)):
        line = "if " + "x" * (length - 3)
        assert ("hljs-keyword" in rendered(page, f"```py\n{line}\n```")) == is_highlighted
    assert "hljs" not in rendered(page, "```xml\n" + "<" * 19_000 + "\n```")


def test_a_text_of_a_million_characters_is_shown_as_it_is(page: Page) -> None:
    text = "**a** b\n\n" * 120_000
    assert page.module("markdown", "m.render(a[0]).map(n => [n.className, n.textContent.length])", text) == [
        ["raw", len(text)]
    ]


def test_code_that_cannot_be_highlighted_is_shown_as_it_is(page: Page) -> None:
    long = "x = 1\n" * 20_000
    for language in ("nonsense", "__proto__", "constructor", "python"):
        assert (
            page.module("markdown", "m.render(a[0])[0].querySelector('code').textContent", f"```{language}\n{long}```")
            == long[:-1]
        )
    assert "hljs-keyword" in rendered(page, "```py\nimport x\n```")


def test_a_copy_of_an_answer_is_its_markdown(chat: Chat) -> None:
    page = chat("**bold** and `code`")
    page.say("Hi")
    page.allow_clipboard()
    page.button("Copy", within=".turn.assistant").click()
    page.until(lambda: "Copied" in page.shown(".turn.assistant .small"))
    assert page.copied() == "**bold** and `code`"
    assert page.find("#status").get_attribute("textContent") == "Copied"


def test_copying_works_on_an_address_without_a_clipboard(chat: Chat) -> None:
    page = chat("**bold**\nand more")
    page.say("Hi")
    page.allow_clipboard()
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    page.button("Copy", within=".turn.assistant").click()
    page.until(lambda: "Copied" in page.shown(".turn.assistant .small"))
    page.run("delete navigator.clipboard")
    assert page.copied() == "**bold**\nand more"
    assert page.all("body > textarea") == []
