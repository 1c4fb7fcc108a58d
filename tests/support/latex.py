"""What must hold of the reports' LaTeX: a structure that can be checked anywhere, and that it compiles where it can."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("pdflatex") or shutil.which("tectonic")
NUMBER = r"[+-]?\d+(\.\d+)?"
S_CELL = re.compile(rf"|(\\bfseries )?{NUMBER}|\{{.*\}}")  # empty, a number, or something that siunitx leaves alone
PAPER = r"""\documentclass[10pt,twocolumn,letterpaper]{article}
\usepackage{booktabs,siunitx}
\setlength{\textwidth}{496.85pt}\setlength{\textheight}{640pt}
\begin{document}
%s
\end{document}
"""  # the page of a two-column conference


def structure_errors(latex: str) -> list[str]:
    """Return what is wrong: braces, environments, number of columns, cells that an S column could not read."""
    body = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[{}\\]", "", body)
    wrong = [] if bare.count("{") == bare.count("}") else ["braces are not balanced"]
    stack: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([\w*]+)\}", body):
        if kind == "begin":
            stack.append(name)
        elif not stack or stack.pop() != name:
            wrong.append(f"{name} ends, but did not begin")
    wrong += [f"{name} does not end" for name in stack]
    for spec, rows in re.findall(r"\\begin\{tabular\}\{([^\n]*)\}\n(.*?)\\end\{tabular\}", body, re.DOTALL):
        kinds = re.findall(r"l|S\[[^]]*\]", spec.replace("@{}", ""))
        for line in re.findall(r"^(?!\\(?:top|mid|bottom|cmid)rule)(.*?) ?\\\\(?:\[[^]]*ex\])?$", rows, re.MULTILINE):
            cells = re.split(r" ?(?<!\\)& ?", line)
            width = sum(int((re.match(r"\\multicolumn\{(\d+)\}", cell) or "11")[1]) for cell in cells)
            wrong += [f"{width} cells of {len(kinds)}: {line}"] if width != len(kinds) else []
            if len(cells) == len(kinds) and r"\multicolumn" not in line:
                wrong += [
                    f"not for an S column: {cell}"
                    for cell, kind in zip(cells, kinds)
                    if kind[0] == "S" and not S_CELL.fullmatch(cell.strip())
                ]
    return wrong


def compile_errors(latex: str, folder: Path) -> list[str]:
    """Return the errors and the overfull boxes of a two-column paper that has these floats."""
    assert COMPILER is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "paper.tex").write_text(PAPER % latex)
    options = ["-interaction=nonstopmode"] if COMPILER.endswith("pdflatex") else []
    done = subprocess.run([COMPILER, *options, "paper.tex"], cwd=folder, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    found = re.findall(r"^! .*|.*Overfull.*|.*too large for page.*|.*Too many unprocessed floats.*", log, re.MULTILINE)
    return found + [log[-500:]] * (not (folder / "paper.pdf").is_file())
