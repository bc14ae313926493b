"""Loops that neither torch nor numpy runs quickly, compiled by numba. Importing this imports numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pickle import UnpicklingError
from typing import Any

import numba


def compiled(*, fastmath: bool | set[str], parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compiled once a machine where there is a folder to keep it in, else once a process. `fastmath` says which of the rules
    of floating point may be broken, as numba.njit has it."""

    def compile_one(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(fastmath=fastmath, parallel=parallel, cache=True)(function)
        except RuntimeError:
            return numba.njit(fastmath=fastmath, parallel=parallel)(function)

    return compile_one


def call(function: Any, *arguments: object) -> Any:
    """Calls what `compiled` gave. A full disk, or a file there that is cut short, costs the time to compile in this process alone; what
    the function calls in turn must not be compiled by itself."""
    try:
        return function(*arguments)
    except (OSError, EOFError, UnpicklingError):  # while compiling: a loop opens no file
        return _kept_nowhere(function)(*arguments)


@cache
def _kept_nowhere(function: Any) -> Any:
    options = function.targetoptions
    return numba.njit(fastmath=options["fastmath"], parallel=options["parallel"])(function.py_func)
