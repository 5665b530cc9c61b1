"""The child of `sandbox.py`: a script that needs the standard library alone.

It reads ``[[source, function, arguments, wall_limit_s], ...]`` from stdin and writes ``[[repr, ...] or null, ...]``.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import resource
import signal
import sys

CPU_LIMIT_S = 0.3
MEMORY_LIMIT_BYTES = 256 << 20
SOURCE_LIMIT_CHARS = 2_000
REPLY_LIMIT_BYTES = 16_000  # below what a pipe holds, so writing never waits

ALLOWED_NODES: tuple[type[ast.AST], ...] = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.Expr, ast.Pass),
    *(ast.If, ast.For, ast.While, ast.Break, ast.Continue, ast.IfExp, ast.Lambda, ast.keyword),
    *(ast.Name, ast.Constant, ast.Attribute, ast.Call, ast.Subscript, ast.Slice, ast.Starred, ast.expr_context),
    *(ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    *(ast.comprehension, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
ALLOWED_METHODS = frozenset(
    {
        *("append", "copy", "count", "endswith", "extend", "find", "index", "insert", "isalpha", "isdigit", "islower"),
        *("isupper", "items", "join", "keys", "lower", "lstrip", "pop", "remove", "replace", "reverse", "rstrip"),
        *("sort", "split", "startswith", "strip", "swapcase", "title", "upper", "values"),
    }
)
ALLOWED_BUILTINS = {
    function.__name__: function
    for function in (
        *(abs, all, any, bool, dict, divmod, enumerate, filter, float, int, len, list, map, max, min, pow, range),
        *(reversed, round, set, sorted, str, sum, tuple, zip),
    )
}


class RefusedError(Exception):
    """The source holds something that is on none of the lists above."""


def check_source(source: str) -> ast.Module:
    """Parse, and refuse whatever is not on the lists above.

    Raises:
        RefusedError: Something is not allowed.
        SyntaxError: It is not Python.
    """
    if len(source) > SOURCE_LIMIT_CHARS:
        raise RefusedError("too long")
    module = ast.parse(source)
    if not all(isinstance(statement, ast.FunctionDef) for statement in module.body):
        raise RefusedError("only functions are allowed at the top")
    for node in ast.walk(module):
        if not isinstance(node, ALLOWED_NODES):
            raise RefusedError(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Attribute) and node.attr not in ALLOWED_METHODS:
            raise RefusedError(f"the method {node.attr} is not allowed")
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            raise RefusedError(f"the name {node.id} is not allowed")
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            raise RefusedError("decorators are not allowed")
    return module


def call(source: str, function: str, arguments: list[str]) -> bytes:
    """The results as a JSON list of their ``repr``."""
    namespace: dict[str, object] = {"__builtins__": ALLOWED_BUILTINS}
    exec(compile(check_source(source), "<answer>", "exec"), namespace)
    candidate = namespace[function]
    assert callable(candidate)
    return json.dumps([repr(candidate(ast.literal_eval(argument))) for argument in arguments]).encode()


def lock_down(wall_limit_s: float) -> None:
    """Limit this process for good; going over time ends it by a signal."""
    signal.setitimer(signal.ITIMER_REAL, wall_limit_s)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    limits = {"AS": MEMORY_LIMIT_BYTES, "CPU": 2, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, limit in limits.items():
        # macOS refuses some of these; the lists above and the timers hold there too.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def answer_in_fork(source: str, function: str, arguments: list[str], wall_limit_s: float) -> list[str] | None:
    """Do one call in a forked process; None if it did not end well."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            lock_down(wall_limit_s)
            reply = call(source, function, arguments)
            if len(reply) <= REPLY_LIMIT_BYTES:
                os.write(writer, reply)
                os._exit(0)
        finally:
            # Whatever went wrong is the answer's fault and its own loss: no traceback, no clean-up, just an end.
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        return None
    replies: list[str] = json.loads(received)
    return replies


def main() -> None:
    """Answer the request on stdin."""
    requests = json.load(sys.stdin)
    json.dump([answer_in_fork(*request) for request in requests], sys.stdout)


if __name__ == "__main__":
    main()
