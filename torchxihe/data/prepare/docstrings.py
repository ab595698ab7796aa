"""Python functions as conversations that ask for a docstring: demo chat data that every machine has."""

import ast
import textwrap
import warnings
from collections.abc import Iterator

from torchxihe.data.prepare.rows import Row

LONGEST_DOCSTRING = 1000
"""Characters of a function, and of its docstring, at most; longer ones are skipped."""


def docstring_rows(file: Row) -> Iterator[Row]:
    """A conversation for each documented function of a Python file: its code without the docstring, and the docstring.

    file: a row with the column "text". Yields rows with the column "messages".
    """
    if file.bad:
        yield file
        return
    text = file.columns["text"].replace("\r\n", "\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated syntax in the file
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        yield Row(file.where, {}, "not Python")
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
        if not docstring:
            continue
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
        place = node.body[0]
        code = "\n".join(lines[node.lineno - 1 : place.lineno - 1] + lines[place.end_lineno : node.end_lineno])
        if place.lineno > node.lineno and max(len(code), len(docstring)) <= LONGEST_DOCSTRING:
            request = f"Write a docstring for this function.\n\n{textwrap.dedent(code)}"
            answer = [{"role": "user", "content": request}, {"role": "assistant", "content": docstring}]
            yield Row(f"{file.where}, line {node.lineno}", {"messages": answer})
