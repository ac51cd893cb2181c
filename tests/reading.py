"""How much there is to read: lines of scripts and loop, tokens of train(), length of sentences.

python tests/reading.py
"""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Lines of the script, lines of train(), tokens of train(); at most.
BUDGETS = {
    "ct.py": (280, 45, 450),
    "nofrost.py": (350, 45, 450),
    "fixup_penalty.py": (300, 45, 450),
    "bn_ablation.py": (400, 45, 450),
}
LOOP = ("common/run/loop.py", 200)  # its lines, at most
WORDS = 25  # of a sentence in docstrings and comments, at most
SKIPPED = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)


def source_of_train(text):
    """The source of a script's train()."""
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    return next(ast.get_source_segment(text, n) for n in functions if n.name == "train")


def lines(name):
    """The number of lines of a file."""
    return len((ROOT / name).read_text().splitlines())


def measure(name):
    """(lines of the script, lines of train(), tokens of train() without its docstring)."""
    text = (ROOT / name).read_text()
    train = source_of_train(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(train).readline))
    words = [t for t in tokens if t.type not in SKIPPED and not t.string.startswith('"""')]
    return lines(name), len(train.splitlines()), len(words)


def paragraphs(source):
    """(line number, text) of the docstrings' paragraphs, and of comments that follow one another.

    Indented blocks are examples, formulas and tables. They and doctests are left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            for text in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if not text.startswith("    ") and ">>>" not in text:
                    yield node.body[0].lineno, text
    block = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start != (block[-1].start[0] + 1, block[-1].start[1]):
                yield block[0].start[0], " ".join(t.string.lstrip("# ") for t in block)
                block = []
            block.append(token)
    if block:
        yield block[0].start[0], " ".join(t.string.lstrip("# ") for t in block)


def sentences(text):
    """The sentences of a paragraph. The points of a list and the rows of a table begin anew."""
    point = r"\n(?=\s*(?:\d+\.|\*|-|[\w, ./*<>-]{1,30}:)\s)"
    row = r"\n(?=\S+(?: \S+)?  +\S)|\n(?=    )"
    for part in re.split(f"{point}|{row}", text):
        yield from re.split(r"(?<=[.!?;:])\s+", " ".join(part.split()))


def long_sentences(folders=("", "common", "eval")):
    """["file:line: sentence"] of more than WORDS words."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).glob("**/*.py" if folder else "*.py")):
            for line, text in paragraphs(path.read_text()):
                for sentence in sentences(text):
                    if len(sentence.split()) > WORDS:
                        found.append(f"{path.relative_to(ROOT)}:{line}: {sentence}")
    return found


if __name__ == "__main__":
    for script, most in BUDGETS.items():
        shown = [f"{n} of {m}" for n, m in zip(measure(script), most, strict=True)]
        print(f"{script:17} lines {shown[0]}, train() lines {shown[1]}, tokens {shown[2]}")
    print(f"{LOOP[0]} lines {lines(LOOP[0])} of {LOOP[1]}")
    print("\n".join(long_sentences()) or f"no sentence has more than {WORDS} words")
