"""Retired words stay out of the code and the documents; beside each stands the word to use."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Names of the code, as regular expressions. Deprecated aliases may stay, which `renamed` makes or RENAMED lists.
NAMES = {
    r"untouched": "runs_stock_forward",
    r"drops_nothing": "dropout_inactive",
    r"add_to": "forward_residual",
    r"one_kernel": "can_fuse",
    r"(?<=\.)fuses": "can_fuse",
    r"WHOLES": "COMPOSITE_OPS",
    r"BY_NAME": "OPT_IN",
    r"must=": "strict=",
    r"in_compute_dtype": "autocast_dtype",
    r"told|came(?= [=:]|\.append)": "metadata, stored, received, ...",
    r"lr_batch": "lr_base_size",
    r"shall": "a verb in the present tense",
}
# Of sentences, in the documents, docstrings and comments.
PHRASES = {
    r"(the )?wholes": "composite ops",
    r"half a block": "half-block",
    r"in one (piece|kernel for half)": "fused, as one kernel",
    r"(?<!conditional )position(al)? encoding": "CPE, conditional positional encoding",
    r"[Ss]preading": "upsampling",
    r"anew": "again",
    r"written down": "an active verb",
    r"for (lack|want) of": "without",
    r"(is|are|be) put right": "corrected",
    r"It is used": "say by whom and for what",
    r"plain:(?=\w)": "upstream:",
}
CODE = [*(ROOT / "svit").glob("*.py")]
for part in ("ops", "layers", "models", "adapters", "training", "cli"):
    CODE += (ROOT / "svit" / part).rglob("*.py")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "svit").rglob("*.md")]
PAGES += [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "benchmarks"]  # those are of their day


def found(text: str, words: dict[str, str]) -> list[str]:
    text = re.sub(
        r"renamed\(\"\w+\", \"\w+\"\)|^ *\w+(, \w+)* = (?=renamed)|^RENAMED = .*", "", text, flags=re.MULTILINE
    )
    return [
        f"{match[0]!r}, say: {say}"
        for word, say in words.items()
        for match in re.finditer(rf"(?<!\w)(?:{word})(?!\w)", text)
    ]


@pytest.mark.parametrize("kind", ["code", "pages"])
def test_retired_words(kind):
    files = CODE if kind == "code" else PAGES
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        sentences = re.sub(r"\s*\n[\s#>]*", " ", text)  # a phrase may go on in the next line
        words = found(text, NAMES) + found(sentences, PHRASES)
        assert not words, f"{file.relative_to(ROOT)}: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("if untouched(conv):", 1),
        ("x, told = read(file)", 1),
        ('fuses, add_to = renamed("fuses", "can_fuse"), renamed("add_to", "forward_residual")', 0),
        ("The kernel fuses both. Images are whole or not at all.", 0),
    ],
)
def test_names(text, words):
    assert len(found(text, NAMES)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upsampling, then the conditional positional encoding", 0),
        ("a position encoding, then spreading", 2),
        ("computed anew", 1),
    ],
)
def test_phrases(text, words):
    assert len(found(text, PHRASES)) == words
