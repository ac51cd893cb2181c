"""How much there is to read: lines of each script and of the loop, lines and tokens of train().

python tests/reading.py
"""

import ast
import io
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


if __name__ == "__main__":
    for script, most in BUDGETS.items():
        shown = [f"{n} of {m}" for n, m in zip(measure(script), most, strict=True)]
        print(f"{script:17} lines {shown[0]}, train() lines {shown[1]}, tokens {shown[2]}")
    print(f"{LOOP[0]} lines {lines(LOOP[0])} of {LOOP[1]}")
