"""Reads a pickle without running anything that it names.

A pickle is a program for a small stack machine. Python's own machine imports the names in it, calls
them, and sets attributes on what they return. A `pickle.Unpickler` with an allow-list narrows that,
but attributes can still be set on whatever is on the list, and a few bytes can ask for gigabytes of
memo. The machine here has no instruction that imports, calls or sets: a name stays a name
(`Inert`), and calling it gives another `Inert`, except for the few names for which the caller
supplies a function.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A checkpoint has about 40 instructions a tensor, so the largest released model has 40 thousand.
MAX_STEPS = 2**21
MAX_NAME = 250  # characters of a class name

# Instructions whose argument is the value.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True, eq=False, slots=True)
class Inert:
    """Stands for a class or function, or, with "()" after the name, for what it would make."""

    name: str


def read_pickle(
    data: bytes,
    calls: Mapping[str, Callable[..., object]],
    load_persistent: Callable[[object], object],
) -> object:
    """Returns the object that a pickle describes, of plain containers, scalars and `Inert`s.

    Sets become lists and keys that are not scalars become `Inert`s, since hashing a hostile value
    can take for ever. Containers may be shared or contain themselves.

    Args:
        data: The pickle, of any protocol.
        calls: Function to use for a global name such as "collections.OrderedDict".
        load_persistent: Function from a persistent id to the object.

    Returns:
        The object.

    Raises:
        ValueError: The pickle is damaged, or asks for too much.
    """
    try:
        return _run(data, calls, load_persistent)
    except ValueError as error:
        reason = str(error)
    except (IndexError, KeyError, TypeError, DeprecationWarning) as error:
        # No such item, memo or number of arguments; an odd escape, where warnings are errors.
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"has a damaged data.pkl: {ascii(reason[:200])[1:-1]}")


def _run(
    data: bytes,
    calls: Mapping[str, Callable[..., object]],
    load_persistent: Callable[[object], object],
) -> object:
    stack: list[Any] = []  # the items since the last mark
    marked: list[list[Any]] = []  # the stacks below it
    memo: dict[int, object] = {}

    def pop_to_mark() -> list[Any]:  # a statement of its own: it changes what `stack` is
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    def pop(count: int) -> tuple[Any, ...]:
        if len(stack) < count:
            raise IndexError("the stack is empty")
        items = tuple(stack[-count:])
        del stack[-count:]
        return items

    def call(function: object, args: object) -> object:
        if not isinstance(function, Inert) or not isinstance(args, tuple):
            raise ValueError(f"a {type(function).__name__} is called")
        if function.name in calls:
            return calls[function.name](*args)
        return Inert(function.name.removesuffix("()") + "()")

    program: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(data)
    for step, (opcode, arg, position) in enumerate(program):
        if step >= MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} instructions")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case name if name in _LITERALS:
                stack.append(arg)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "MARK":
                marked.append(stack)
                stack = []
            case "TUPLE":
                items = pop_to_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(pop(int(opcode.name[-1])))
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(*pop(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(call(*pop(2)))
            case "BINPERSID":
                stack.append(load_persistent(*pop(1)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "SETITEM":
                items = list(pop(2))
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = pop_to_mark()
                _set_items(stack[-1], items)
            case "APPEND":
                items = list(pop(1))
                _extend(stack[-1], items)
            case "APPENDS" | "ADDITEMS":
                items = pop_to_mark()
                _extend(stack[-1], items)
            case "BUILD":
                target, _ = pop(2)  # attributes are dropped, such as a state dict's `_metadata`
                stack.append(target)
            case "DICT":
                made: dict[object, object] = {}
                _set_items(made, pop_to_mark())
                stack.append(made)
            case "LIST":
                items = pop_to_mark()
                stack.append(items)
            case "FROZENSET":
                items = pop_to_mark()
                stack.append(tuple(items))
            case "NEWOBJ_EX":
                function, args, _ = pop(3)
                stack.append(call(function, args))
            case "INST":
                args = tuple(pop_to_mark())
                stack.append(call(_global(*arg.split(" ", 1)), args))
            case "OBJ":
                function, *rest = pop_to_mark()
                stack.append(call(function, tuple(rest)))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Inert(f"extension {arg}"))
            case "PERSID":
                stack.append(load_persistent(arg))
            case "POP":
                if stack:
                    stack.pop()
                else:
                    pop_to_mark()
            case "POP_MARK":
                pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if position != len(data) - 1 or len(stack) != 1 or marked:
                    raise ValueError("something is left over")
                return stack[0]
            case name:
                raise ValueError(f"instruction {name}")
    raise ValueError("it has no end")


def _global(module: object, name: object) -> Inert:
    """Returns the stand-in for a global name."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a global name is not text")
    if len(module) + len(name) > MAX_NAME:
        raise ValueError(f"a global name of {len(module) + len(name)} characters")
    return Inert(f"{module}.{name}")


def _set_items(target: object, items: list[Any]) -> None:
    """Puts keys and values, in turn, into a dict; an Inert, once a dict subclass, drops them."""
    if isinstance(target, Inert):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError(f"{len(items)} keys and values for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if _is_plain(key) else Inert(f"{type(key).__name__} as a key")] = value


def _is_plain(key: object) -> bool:
    """Says whether a value hashes at once: a deep tuple or a huge int does not."""
    if isinstance(key, int):
        return -(2**63) <= key < 2**64
    return key is None or isinstance(key, str | bytes | float)


def _extend(target: object, items: list[Any]) -> None:
    """Appends to a list; an Inert, once a list or set subclass, drops the items."""
    if isinstance(target, Inert):
        return
    if not isinstance(target, list):
        raise ValueError(f"items for a {type(target).__name__}")
    target.extend(items)
