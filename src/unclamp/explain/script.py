"""The functions of a script that trained, `python train.py`, without training again.

A replay needs the script's `build` and `step`, and a script trains when it is run. So it is not
run: of its top level only those statements are executed that the two functions need, in order:

- every import;
- the functions, classes and values that they use, and what those use in turn, where the top level
  sets them by `def`, `class` or an assignment, or by an `if` or `try` of such;
- what changes one of these values in place: an assignment to a part of it, or a call such as
  `parser.add_argument(...)` or `config.update(...)`;
- settings: seeds, calls of `torch.set_...` and `torch.use_...`, what is assigned to an attribute
  of torch or to os.environ, and changes of sys.path.

What stands under `if __name__ == "__main__":`, in loops and in `with` is never executed, so it
does not matter whether the script has such a guard. A name that nothing of this sets is an error
that says so.
"""

import ast
import builtins
import dis
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from unclamp.errors import ReplayError, did_you_mean

_READS = frozenset({"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"})
_BINDS = frozenset({"STORE_NAME", "STORE_GLOBAL"})
_CHANGES = frozenset(
    {
        *("add", "append", "extend", "insert", "remove", "setdefault", "update"),
        *("add_argument", "add_argument_group", "add_mutually_exclusive_group", "set_defaults"),
    }
)
"""Methods whose call is part of making a value, and never trains."""
_LOADED: dict[tuple[Path, str, tuple[str, ...], str, tuple[str, ...]], ModuleType] = {}
_MODE = re.compile(r"[rwaxbt+]{1,4}")
_WRITES = frozenset({"write_text", "write_bytes", "unlink", "rmtree"})


def script_of(function: Callable[..., Any]) -> Path | None:
    """Return the file of the program that defines a function; None for a module's, or a cell's."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if not isinstance(function, FunctionType) or function.__module__ != "__main__" or file is None:
        return None
    path = Path(file).resolve()
    is_of_it = Path(function.__code__.co_filename).resolve() == path
    return path if is_of_it and path.is_file() else None


def is_lost(*functions: Callable[..., Any] | None) -> bool:
    """Whether functions end with this process: from `python -c` or standard input.

    Those of a notebook or a shell do not count: whoever typed them can type them again.
    """
    is_interactive = hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__")
    return not is_interactive and any(
        isinstance(each, FunctionType) and each.__module__ == "__main__" and script_of(each) is None
        for each in functions
    )


def script_facts(path: Path) -> dict[str, Any]:
    """Return what tells whether a script changed, and how it was run, as JSON data."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return {
        "path": str(path),
        "digest": _digest(path.read_bytes()),
        "package": getattr(spec, "parent", None) or "",
        "argv": list(sys.argv[1:]),
    }


def changes_of(facts: Mapping[str, Any]) -> list[str]:
    """Return in a sentence that the script of a snapshot is another one now; nothing if not."""
    script = facts.get("script")
    if script is None or not Path(script["path"]).is_file():
        return []
    if _digest(Path(script["path"]).read_bytes()) == script["digest"]:
        return []
    return [
        f"{script['path']} has changed since the run; its build and step functions have not, "
        "unless this was asked for anyway."
    ]


def load_from_script(
    path: Path, names: tuple[str, ...], *, facts: Mapping[str, Any] | None = None
) -> ModuleType:
    """Return a module with what these names of a script's top level need, and nothing else.

    Args:
        path: The script.
        names: Functions of its top level.
        facts: `script_facts` of the run, for its command line and package.

    Raises:
        ReplayError: There is no such file or name, it is not Python, or something that the names
            need is set where it cannot be had without training.
    """
    facts = facts or {}
    try:
        text = path.read_bytes()
        tree = ast.parse(text, filename=str(path))
    except (OSError, SyntaxError) as error:
        raise ReplayError(
            f"cannot read the script {path} ({error}): put it back where the run had it, or name "
            "its functions with --build FILE.py:FUNCTION and --step FILE.py:FUNCTION"
        ) from error
    argv = tuple(map(str, facts.get("argv", ())))
    key = (path, _digest(text), names, facts.get("package") or "", argv)
    if key not in _LOADED:
        pieces = [_Piece.of(statement, path) for statement in tree.body]
        needed = _needed(pieces, names, path)
        _refuse_writing(needed, path)
        _LOADED[key] = _execute(needed, path, facts)
    return _LOADED[key]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A statement of the top level, and the names that it reads and binds, if it is executed."""

    statement: ast.stmt
    reads: frozenset[str]
    binds: frozenset[str]
    is_import: bool
    defines: bool

    @classmethod
    def of(cls, statement: ast.stmt, path: Path) -> "_Piece":
        code = _compiled([statement], path)
        return cls(
            statement=statement,
            reads=frozenset(_names(code, _READS)),
            binds=frozenset(_names(code, _BINDS)),
            is_import=isinstance(statement, ast.Import | ast.ImportFrom),
            defines=_defines(statement),
        )

    @property
    def changes(self) -> str | None:
        """The name whose value a statement changes in place, such as `parser` or `config`."""
        statement = self.statement
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            called = statement.value.func
            is_change = isinstance(called, ast.Attribute) and called.attr in _CHANGES
            return _root(called) if is_change else None
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            roots = [_root(each) for each in targets if not isinstance(each, ast.Name)]
            return next(iter(roots), None)
        return None


def _needed(pieces: list[_Piece], names: tuple[str, ...], path: Path) -> list[_Piece]:
    """Return the pieces to execute, in order.

    Raises:
        ReplayError: A name is missing, or is set where it cannot be had.
    """
    imported = {name for piece in pieces if piece.is_import for name in piece.binds}
    wanted = [piece for piece in pieces if piece.is_import or _is_setting(piece.statement)]
    todo = [*names, *(name for piece in wanted for name in piece.reads)]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        setting = [p for p in pieces if p.defines and name in p.binds]
        if not setting and name not in imported and not hasattr(builtins, name):
            _refuse(name, pieces, names, path)
        changing = [p for p in pieces if p.changes == name and name not in imported]
        for piece in [*setting, *changing]:
            if piece not in wanted:
                wanted.append(piece)
                todo += piece.reads
    return [piece for piece in pieces if piece in wanted]


def _refuse(name: str, pieces: list[_Piece], names: tuple[str, ...], path: Path) -> None:
    """Raise for a name that the script sets where it cannot be had, or that is asked for.

    Of other names Python is the judge: those of a class's body, or of `from module import *`.
    """
    place = next((p.statement.lineno for p in pieces if name in p.binds), None)
    if place is not None:
        raise ReplayError(
            f"{' and '.join(names)} of {path} need {name!r}, which line {place} sets where the "
            'script trains (in a loop, a `with`, or under `if __name__ == "__main__":`), and '
            "explain does not train again: set it by an assignment at the top level, give it to "
            "build with Snapshots(arguments=...), or pass --build and --step of a module"
        )
    if name in names:
        known = {each for piece in pieces for each in piece.binds}
        raise ReplayError(f"{path} has no {name!r} at its top level{did_you_mean(name, known)}")


def _refuse_writing(pieces: list[_Piece], path: Path) -> None:
    """Raise where the top level opens a file to write: executed again, it would lose the run's."""
    for piece in pieces:
        for call in _calls(piece.statement):
            if _is_writing(call):
                raise ReplayError(
                    f"build and step need line {call.lineno} of {path}, which writes a file "
                    f"({ast.unparse(call)}) and would overwrite what the run wrote: move it below "
                    '`if __name__ == "__main__":` or into a function'
                )


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that a statement makes when it is executed, not those in functions of it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


def _is_writing(call: ast.Call) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if name != "open":
        return is_method and name in _WRITES
    places = (
        [0, 1] if is_method else [1]
    )  # Path.open(mode), open(path, mode), gzip.open(path, mode)
    given = [call.args[place] for place in places if place < len(call.args)]
    given += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes = [each.value for each in given if isinstance(each, ast.Constant)]
    return any(isinstance(m, str) and _MODE.fullmatch(m) and set(m) & set("wax+") for m in modes)


def _execute(pieces: list[_Piece], path: Path, facts: Mapping[str, Any]) -> ModuleType:
    """Return a module of a name of its own, with these statements executed in it."""
    name = "unclamp_script_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    module = ModuleType(name, f"What a replay needs of {path}.")
    module.__file__ = str(path)
    module.__package__ = facts.get("package") or ""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python train.py` does
    if module.__package__:
        importlib.import_module(module.__package__)
    sys.modules[name] = module  # where dataclasses and pickle look for what it defines
    arguments, sys.argv = sys.argv, [str(path), *facts.get("argv", ())]
    try:
        exec(_compiled([piece.statement for piece in pieces], path), vars(module))
    except (Exception, SystemExit) as error:
        line = _line_of(error, path)
        raise ReplayError(
            f"what the build and step functions need of {path} fails{line}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.argv = arguments
    return module


def _line_of(error: BaseException, path: Path) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            place = f" in line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _compiled(statements: list[ast.stmt], path: Path) -> CodeType:
    module = ast.Module(body=statements, type_ignores=[])
    return compile(module, str(path), "exec", dont_inherit=True)


def _names(code: CodeType, operations: frozenset[str]) -> Iterator[str]:
    """Yield the names of the top level that code, and the functions in it, read or bind."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations and isinstance(instruction.argval, str):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = operations - {"STORE_NAME"}  # in a class's body, its own names
            yield from _names(constant, inner)


def _defines(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but set names."""
    if isinstance(statement, ast.If):
        if _is_guard(statement):
            return False
        return all(_defines(each) for each in [*statement.body, *statement.orelse])
    if isinstance(statement, ast.Try):
        handled = [each for handler in statement.handlers for each in handler.body]
        parts = [*statement.body, *handled, *statement.orelse, *statement.finalbody]
        return all(_defines(each) for each in parts)
    plain = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Pass
    return isinstance(statement, plain | ast.Assign | ast.AnnAssign | ast.AugAssign)


def _is_guard(statement: ast.If) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(statement.test))


def _is_setting(statement: ast.stmt) -> bool:
    """Whether a statement sets how torch computes, the environment, or where modules lie."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = ast.unparse(statement.value.func)
        of_torch = called.startswith("torch.") and called.split(".")[-1].startswith(
            ("set_", "use_", "enable_")
        )
        return (
            of_torch
            or _is_seed(called)
            or called in ("sys.path.insert", "sys.path.append", "sys.path.extend")
        )
    if not isinstance(statement, ast.Assign):
        return False
    targets = [ast.unparse(target) for target in statement.targets]
    return all(target.startswith(("torch.", "os.environ[")) for target in targets)


def _is_seed(called: str) -> bool:
    """Whether a call seeds random numbers, on which what the top level draws depends."""
    *owner, last = called.split(".")
    return last in ("manual_seed", "manual_seed_all", "seed_everything", "set_seed") or (
        bool(owner) and last == "seed"
    )


def _root(node: ast.expr) -> str | None:
    """Return the name that an attribute, an element or a call begins with, not a name alone."""
    is_part = False
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node, is_part = (node.func if isinstance(node, ast.Call) else node.value), True
    return node.id if is_part and isinstance(node, ast.Name) else None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
