"""Reads the docstrings below the fields of a dataclass, which become the help of its options.

tyro can read them too, but by tokenizing the source, which takes as long as the rest of ``mixer train --help``.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T", bound=type)


def help_from_docstrings(cls: T) -> T:
    """Class decorator, below ``@dataclass``: each field's docstring becomes the help of its option."""
    texts = field_docstrings(cls.__module__)[cls.__name__]
    for name, hint in cls.__annotations__.items():
        if name in texts or dataclasses.is_dataclass(hint):  # of a group, tyro shows the docstring of its class
            cls.__annotations__[name] = Annotated[hint, tyro.conf.arg(help=texts.get(name, ""))]
    return cls


@functools.cache
def field_docstrings(module: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of a module's classes: class → field → text."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found: dict[str, dict[str, str]] = {}
    for definition in tree.body:
        if isinstance(definition, ast.ClassDef):
            texts = found[definition.name] = {}
            for field, text in itertools.pairwise(definition.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                        texts[name] = docstring
    return found
