"""README and docs: links lead somewhere, every page is in the site, the README stays short.

Needs neither the network nor mkdocs. A heading that GitHub and the site name differently, or that
is there twice, has no anchor here: a link to it would work in one of the two only.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
OWN = re.search(r"^repo_url: (\S+)$", SITE, re.MULTILINE)[1] + "/blob/main/"  # type: ignore[index]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
PAGES += [ROOT / "launch/README.md", *sorted(DOCS.rglob("*.md"))]
MAX_WORDS = 1000
LINK = re.compile(r"""\]\(\s*<?([^)\s>]+)>?(?:\s+["'][^)]*)?\)|^\[[^]]+\]:\s*(\S+)""", re.MULTILINE)


def prose(text: str) -> str:
    """Without fenced code."""
    return re.sub(r"^ *(```+|~~~+).*?(^ *\1|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of links and pictures, but for those within code."""
    return [a or b for a, b in LINK.findall(re.sub(r"`[^`\n]+`", "", prose(text)))]


def anchors(text: str) -> set[str]:
    """What a heading is linked by, on GitHub and in the site alike."""
    titles = re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE)
    plain = [re.sub(r"`|\*|\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    on_github = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in plain]
    in_site = [re.sub(r"[- ]+", "-", re.sub(r"[^\w -]", "", title)) for title in plain]
    times = Counter(in_site)
    both = {a for a, b in zip(on_github, in_site, strict=True) if a == b and times[b] == 1}
    return {name for name in both if name.isascii()}


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there, anchors that no heading has, ways out of the site."""
    broken = []
    for link in links(text):
        own = link.startswith(OWN)
        path, _, anchor = unquote(link.removeprefix(OWN)).partition("#")
        if re.match(r"[a-z][a-z+.-]*:", path):  # elsewhere: https, mailto
            continue
        target = ((ROOT if own else page.parent) / path).resolve() if path else page
        leaves = page.is_relative_to(DOCS) and not own and not target.is_relative_to(DOCS)
        lacks = anchor and target.suffix == ".md" and target.is_file()
        if leaves or not target.exists() or (lacks and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def named_pages(site: str) -> list[str]:
    """The pages of mkdocs.yml's nav."""
    return re.findall(r"^ +- (?:.*: )?(\S+\.md)$", site.partition("\nnav:")[2], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_site_once():
    pages = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert sorted(named_pages(SITE)) == pages


def test_the_reference_has_the_whole_face():
    face = (ROOT / "reptune_jax/__init__.py").read_text(encoding="utf-8")
    names = re.findall(r'"([a-zA-Z]\w+)"', re.search(r"^__all__ = \[(.*?)\]", face, re.M | re.S)[1])
    labels = re.findall(r"toc_label: rt\.(\w+)", (DOCS / "api.md").read_text(encoding="utf-8"))
    assert names and sorted(labels) == sorted(names)


def test_the_readme_is_two_screens():
    words = prose((ROOT / "README.md").read_text(encoding="utf-8")).split()
    assert len(words) < MAX_WORDS, f"README.md: {len(words)} words outside code: move some to docs/"


# The rules themselves, on made-up text: a rule that sees nothing would pass everything above.


@pytest.mark.parametrize(
    "link",
    [
        "gone.md", "concepts.md#no-such", "#nor-this", "../README.md", 'gone.md "with a title"',
        "assets/gone.png", f"{OWN}gone.md", f"{OWN}docs/concepts.md#no-such", "index.md/a.md",
    ],
)  # fmt: skip
def test_a_broken_link_is_found(link):
    text = f"# A page\nSee [it]({link}), or ![it]({link}).\n\n[it]: {link}\n"
    assert broken_links(DOCS / "index.md", text) == [link.split(" ")[0]] * 3


def test_what_is_no_broken_link():
    text = """
[a](concepts.md#glossary "a title") [b](https://x.org/gone.md) [c](mailto:a@b.c) [d](assets)
`[e](gone.md)` [f](<index.md>)

```python
[g](gone.md)
```
"""
    assert not broken_links(DOCS / "index.md", text + f"[h]({OWN}launch/README.md#gpus)")
    assert not broken_links(ROOT / "launch/README.md", "[i](../docs/concepts.md#glossary)")


def test_names_of_headings():
    code = "```\n# no heading\n```\n"
    text = f"# A `b_c`, *d*: e (f)\n## [G](h.md) i\n## k & l\n{code}## j\n### j\n## Δ k\n"
    assert anchors(text) == {"a-b_c-d-e-f", "g-i"}


def test_pages_of_a_nav():
    assert named_pages("x: y.md\nnav:\n  - Home: index.md\n  - More:\n      - a/b.md\n") == [
        "index.md",
        "a/b.md",
    ]


def test_the_readmes_table_is_that_of_the_kept_studies():
    spec = importlib.util.spec_from_file_location("results", DOCS / "assets" / "results.py")
    assert spec and spec.loader
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.with_table(page, ROOT / "results") == page, "run docs/assets/results.py"
    kept = {path.name for path in (ROOT / "results").iterdir() if path.is_dir()}
    assert kept.issuperset(results.LEFT_OUT)
    every = (DOCS / "results.md").read_text(encoding="utf-8")
    for name in kept:
        link = f"results/{name})" if name in results.LEFT_OUT else f"](results/{name}/README.md)"
        assert link in (every if name in results.LEFT_OUT else page)
