"""Triton's interpreter, made fast enough for a test suite."""

from __future__ import annotations

from typing import Any

from hpo_fused.backend import kernels


def patch_once_a_launch() -> None:
    """Let the interpreter replace the functions of Triton's language once a launch and module.

    It does so in every call of a device function, thousands of times a launch and with the same functions: half of the
    time that kernels take in it. What kernels compute stays as it is.
    """
    if kernels is None or not kernels.interpreting():
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # whose global names have been looked through

    def patch_first(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return patch(fn)

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> None:
        done.clear()
        try:
            launch(self, *arguments, **options)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_first, launch_afresh
