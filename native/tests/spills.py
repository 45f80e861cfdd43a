"""Registers spilled in the hot loops of object files: ``python spills.py [--known NAME]... FILE...`` lists them.

The exit status is 1 if there are any but in the functions whose names hold one of the NAMEs.

A hot loop is one that holds no other. A spill is a 512-bit or 256-bit register stored at a fixed place of the stack
there: an accumulator that found no register. What is only read there, a table of constants, is no spill; nor is what is
saved around a call, which the tail of a range may make. One store in a hundred instructions is let through: a value
that passes from one turn of a long loop to the next.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_LINE = re.compile(r"^(\S+:\d+)(?: \(discriminator \d+\))?$")
_INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+) *([^#<]*)")
_LET_THROUGH = 1 / 100
_STORE = re.compile(r"%[yz]mm\d+,-?(?:0x[0-9a-f]+)?\(%(rsp|rbp)\)")


@dataclass
class Function:
    """One function's name and its instructions: address, operation, operands and source line."""

    name: str
    code: list[tuple[int, str, str, str]] = field(default_factory=list)


def functions(path: str) -> Iterator[Function]:
    """The functions of an object file."""
    text = subprocess.run(
        ["objdump", "-d", "-l", "-C", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    function, line = Function(""), "?"
    for row in text.splitlines():
        if found := _FUNCTION.match(row):
            yield function
            function, line = Function(found[1]), "?"
        elif found := _LINE.match(row):
            line = found[1]
        elif found := _INSTRUCTION.match(row):
            function.code.append((int(found[1], 16), found[2], found[3].strip(), line))
    yield function


def hot_loops(function: Function) -> list[set[int]]:
    """The innermost natural loops, each as indices of its instructions; without blocks that call."""
    code = function.code
    index = {address: i for i, (address, *_) in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]  # where each instruction can go on
    starts = {0}
    for i, (_, operation, operands, _) in enumerate(code):
        jumps = operation.startswith("j")
        if jumps and re.fullmatch("[0-9a-f]+", operands) and (target := index.get(int(operands, 16))) is not None:
            after[i].append(target)
            starts |= {target, i + 1}
        if not (operation.startswith(("jmp", "ret", "ud2")) or i + 1 == len(code)):
            after[i].append(i + 1)
        if jumps or operation.startswith("ret"):
            starts.add(i + 1)
    blocks = sorted(s for s in starts if s < len(code))
    end = dict(zip(blocks, [*blocks[1:], len(code)], strict=True))
    following = {b: [n for n in after[end[b] - 1] if n in end] for b in blocks}
    preceding: dict[int, list[int]] = {b: [] for b in blocks}
    for b, to in following.items():
        for n in to:
            preceding[n].append(b)
    dominators = _dominators(blocks, following, preceding)
    bodies: dict[int, set[int]] = {}  # of the loops, by their first block
    for b in dominators:
        for head in following[b]:
            if head in dominators[b]:
                body, pending = bodies.setdefault(head, {head}), [b]
                while pending:
                    if (n := pending.pop()) not in body:
                        body.add(n)
                        pending += [p for p in preceding[n] if p in dominators]
    innermost = [body for head, body in bodies.items() if not any(h in body for h in bodies if h != head)]
    calls = {b for b in blocks if any(code[i][1].startswith("call") for i in range(b, end[b]))}
    return [{i for b in body - calls for i in range(b, end[b])} for body in innermost]


def _dominators(
    blocks: list[int], following: dict[int, list[int]], preceding: dict[int, list[int]]
) -> dict[int, set[int]]:
    # Of the blocks that can be reached.
    reached, pending = set(), [0] if blocks else []
    while pending:
        if (b := pending.pop()) not in reached:
            reached.add(b)
            pending += following[b]
    order = [b for b in blocks if b in reached]
    found = {b: set(order) for b in order}
    if order:
        found[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b} | set.intersection(*(found[p] for p in preceding[b] if p in found))
            if new != found[b]:
                found[b], changed = new, True
    return found


def spills(function: Function) -> Iterator[tuple[str, str, int]]:
    """Every spill: source line, instruction, and the number of instructions of its loop."""
    if not any(_STORE.search(operands) for _, _, operands, _ in function.code):
        return
    # Without a frame, %rbp is a register like any other.
    framed = any((operation, operands) == ("mov", "%rsp,%rbp") for _, operation, operands, _ in function.code)
    stack = {"rsp", "rbp"} if framed else {"rsp"}
    for loop in hot_loops(function):
        found = [i for i in sorted(loop) if (s := _STORE.search(function.code[i][2])) is not None and s[1] in stack]
        if len(found) > len(loop) * _LET_THROUGH:
            for i in found:
                _, operation, operands, line = function.code[i]
                yield line, f"{operation} {operands}", len(loop)


def main(paths: list[str], known: dict[str, int]) -> int:
    """Print all spills; 1 if there are any but the known ones, or more or none of those.

    Args:
        paths: of object files.
        known: the most spills that functions with this in their name have, each.
    """
    count = accepted = 0
    unseen = set(known)
    for path in paths:
        for function in functions(path):
            found = list(spills(function))
            name = next((name for name in known if name in function.name), None)
            if name is not None and 0 < len(found) <= known[name]:
                accepted += len(found)
                unseen.discard(name)
                for length, some in itertools.groupby(length for *_, length in found):
                    print(f"known: {len(list(some))} spills in a loop of {length} instructions of {function.name}")
                continue
            count += len(found)
            for line, text, length in found:
                print(f"{line}: spill in a loop of {length} instructions of {function.name}: {text}")
    print(f"{count} spills in the hot loops of {len(paths)} object files, and {accepted} known ones")
    for name in sorted(unseen):
        print(f"no spills are left in {name}: it is no longer to be named")
    return int(count > 0 or bool(unseen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--known", action="append", default=[], metavar="NAME=MOST")
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    known = {name: int(most) for name, _, most in (text.rpartition("=") for text in arguments.known)}
    sys.exit(main(arguments.files, known))
