"""`python -m tests.banned_words [FOLDER]`: count words that our texts avoid, per folder of a checkout.

The counts cover comments, docstrings, other strings and identifiers of Python files, and the text of Markdown files.
"""

from __future__ import annotations

import argparse
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

WORDS = {  # shown name -> pattern
    "told": r"told",
    "said": r"said|says|unsaid",
    "stands": r"stands?|stood",
    "hangs on": r"hangs on",
    "by itself": r"by (?:it|them)sel(?:f|ves)",
    "all the same": r"all the same",
    "mend": r"mend(?:ed|s)?",
    "nobody": r"nobody",
    "begun": r"begun",
    "place": r"places?",
    "found": r"found",
    "Wish": r"wish(?:es)?",
    "Leave": r"leaves?",
    "anew": r"anew",
    "run it on": r"run it on|goes? on|gone on",
    "Give another": r"give (?:another|one|it)",
    "Say": r"say [\w-]+=",
    "Take others": r"take others?",
    "a push": r"a push|pushes",
    "survives": r"survives?",
    "turned up": r"turn(?:s|ed)? (?:up|off)",
    "whoever": r"whoever|somebody",
}
NONE_IN_PAGES = (
    "told", "stands", "hangs on", "by itself", "all the same", "mend", "nobody", "begun", "anew", "run it on", "a push",
    "survives", "turned up", "whoever",
)  # fmt: skip
"""Words that hand-written pages do not have at all; the others have plain uses, too."""
FOLDERS = ("steerkit", "training", "analysis", "figures", "tests", "benchmarks", "docs")
LEFT_OUT = {"banned_words.py"}


def words_of(path: Path) -> str:
    """Return the text of a file whose words count: of Python, its comments, strings and identifiers in parts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    kinds = (tokenize.COMMENT, tokenize.STRING, tokenize.NAME)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string.replace("_", " ") for token in tokens if token.type in kinds)


def counts(root: Path) -> dict[str, Counter[str]]:
    """Return folder -> word -> how often it occurs, in the Python and Markdown files of a checkout."""
    table = {}
    for folder in FOLDERS:
        paths = [path for path in (root / folder).rglob("*") if path.suffix in (".py", ".md")]
        texts = [words_of(path) for path in sorted(paths) if path.name not in LEFT_OUT]
        table[folder] = Counter(
            {
                word: sum(len(re.findall(rf"\b(?:{pattern})\b", text, re.IGNORECASE)) for text in texts)
                for word, pattern in WORDS.items()
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="the checkout (default: this folder)")
    table = counts(parser.parse_args().root)
    print(f"{'':14}" + "".join(f"{folder:>12}" for folder in table))
    for word in WORDS:
        print(f"{word:14}" + "".join(f"{row[word]:12}" for row in table.values()))
    print(f"{'sum':14}" + "".join(f"{row.total():12}" for row in table.values()))


if __name__ == "__main__":
    main()
