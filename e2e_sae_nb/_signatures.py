"""Signatures on the site, as the modules write them.

nbdev shows a signature anew from the running object: generics lose their arguments (`tuple`, `Literal`), keyword-only marks and the comments of
dataclass fields are gone, and classes look like functions. Here the header comes from the source instead. nbdev's own stands where there is none.
"""

import ast
import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from textwrap import dedent, indent
from typing import Any

from e2e_sae_nb import _modidx

WIDTH = 95  # characters that a page's column shows
CODE = re.compile(r"^```python\n.*?^```$", re.S | re.M)


def from_source(
    text: str,  # A piece of documentation as nbdev writes it
    module: str = "",  # That the page is about: of several things with one name, nbdev may have found another module's
) -> str:
    "The same with the signature of the module's source, and the link to it."
    found = re.search(r"/e2e_sae_nb/(\w+)\.py#L.*?^#+ ([\w.]+)$", text, re.S | re.M)
    if not found:
        return text
    name = found[2]
    module = module if f"e2e_sae_nb.{module}.{name}" in _modidx.d["syms"].get(f"e2e_sae_nb.{module}", {}) else found[1]
    about = _object(module, name)
    header = _header(about)
    if not header:
        return text
    if module != found[1]:
        text = re.sub(r"/e2e_sae_nb/\w+\.py#L\w+", f"/e2e_sae_nb/{module}.py#L{inspect.getsourcelines(about)[1]}", text, count=1)
    header = _broken(header) if "\n" not in header and len(header) > WIDTH else header
    return CODE.sub(lambda _: f"```python\n{header}\n```", text, count=1)


def _object(module: str, name: str) -> Any:
    about: Any = importlib.import_module(f"e2e_sae_nb.{module}")
    for part in name.split("."):
        about = getattr(about, part, None)
    return inspect.unwrap(getattr(about, "fget", None) or getattr(about, "__func__", about))  # of a property, of a class method


def _header(about: Any) -> str | None:
    return _class(about) if isinstance(about, type) else _head(about) if inspect.isfunction(about) else None


def _head(about: Any) -> str:
    "From `def` or `class` to the colon."
    source = dedent(inspect.getsource(about))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    lines, first = source.splitlines()[node.lineno - 1:], node.body[0]
    head = lines[:first.lineno - node.lineno] or [lines[0][:first.col_offset]]
    return "\n".join(head).rstrip()


def _broken(header: str) -> str:
    "A long line, an argument per line."
    source = re.sub("^class", "def", header) + "\n    ..."
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)

    def text(part: ast.AST) -> str:
        return ast.get_source_segment(source, part) or ""

    def told(args: list[ast.arg], defaults: list[Any]) -> list[str]:
        return [text(arg) + (f" = {text(value)}" if value else "") for arg, value in zip(args, defaults, strict=True)]

    a = node.args
    plain = [*a.posonlyargs, *a.args]
    lines = told(plain, [*[None] * (len(plain) - len(a.defaults)), *a.defaults])
    lines += [f"*{text(a.vararg)}"] if a.vararg else ["*"] if a.kwonlyargs else []
    lines += told(a.kwonlyargs, a.kw_defaults)
    lines += [f"**{text(a.kwarg)}"] if a.kwarg else []
    end = f") -> {text(node.returns)}:" if node.returns else "):"
    return f"{header[:header.index('(')]}(\n" + "".join(f"    {line},\n" for line in lines) + end + "".join(re.findall(r"  #.*$", header))


def _class(cls: type) -> str:
    "What it takes to make one, the fields or the arguments of `__init__`; where it has none of its own, what it is made from."
    told = {name: line for base in reversed(cls.__mro__) if base.__module__.startswith("e2e_sae_nb") for name, line in _fields(base).items()}
    if is_dataclass(cls):
        asked = [f for f in fields(cls) if f.init]
        lines = [told[f.name] for f in asked if not f.kw_only]
        lines += ["*,", *(told[f.name] for f in asked if f.kw_only)] if any(f.kw_only for f in asked) else []
    elif hasattr(cls, "_fields"):  # a named tuple
        lines = [told[name] for name in cls._fields]
    elif "__init__" in vars(cls):
        header = re.sub(r"\(\s*self(?:,\s*|(?=\)))", "(", _head(cls.__init__).replace("def __init__", f"class {cls.__name__}", 1))
        header = header if "#" in header else re.sub(r",?\s*\n\s*(?=\))", "", re.sub(r",\s*\n\s*(?!\))", ", ", header))  # on one line
        return re.sub(r"\) -> None:", "):", header)
    else:
        return _head(cls)
    return f"class {cls.__name__}(\n" + indent("\n".join(lines), "    ") + "\n):"


def _fields(cls: type) -> dict[str, str]:
    "Name -> the field as an argument, with its comment."
    source = dedent(inspect.getsource(cls))
    node, lines, found = ast.parse(source).body[0], source.splitlines(), {}
    assert isinstance(node, ast.ClassDef)
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = f" = {_default(field.value, source)}" if field.value else ""
            comment = lines[(field.end_lineno or field.lineno) - 1].encode()[field.end_col_offset:].decode().strip()
            found[field.target.id] = f"{field.target.id}: {ast.get_source_segment(source, field.annotation)}{default},{'  ' + comment if comment else ''}"
    return found


def _default(value: ast.expr, source: str) -> str:
    "A default as written; of `field(...)`, what it makes."
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        said = {keyword.arg: ast.get_source_segment(source, keyword.value) for keyword in value.keywords}
        factory = said.get("default_factory")
        return said.get("default") or (f"{factory}()" if factory and factory.isidentifier() else "...")
    return ast.get_source_segment(source, value) or "..."
