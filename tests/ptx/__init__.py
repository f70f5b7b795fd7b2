"""Run PTX code of nvcc and Triton on the CPU. It is parsed here and executed by machine.cpp and the other C++ files here."""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC"]
WINDOW = 1024  # kWindow of machine.h

BYTES = {
    "pred": 1, "u8": 1, "b8": 2, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8,
    "s64": 8, "f64": 8,
}  # fmt: skip
SPECIALS = [
    "%tid.x",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%ntid.x",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
]
TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"[^\"]*\"|[{};]|[^\s{};\"/]+|/", re.DOTALL)
OPERAND = re.compile(r"[\[\]{},|]|[^\s\[\]{},|]+")


@cache
def machine() -> ctypes.CDLL:
    """The C++ library, compiled once and kept in build/ until its sources change."""
    sources = sorted(HERE.glob("*.cpp"))
    content = b"".join(path.read_bytes() for path in [*sources, HERE / "machine.h"])
    library = HERE.parents[1] / "build" / "ptx" / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects = [Path(folder, path.stem + ".o") for path in sources]
            jobs = [
                subprocess.Popen(["g++", *FLAGS, "-c", str(path), "-o", str(to)])
                for path, to in zip(sources, objects, strict=True)
            ]
            assert not any([job.wait() for job in jobs]), "the machine does not compile"
            linked = Path(folder, library.name)
            subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(linked)], check=True)
            linked.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_load.restype = ctypes.c_void_p
    loaded.ptx_failure.restype = ctypes.c_char_p
    loaded.ptx_run.restype = ctypes.c_int64
    return loaded


class Failure(AssertionError):
    """An error of the PTX program, or an instruction that is not implemented here."""


def entries(text: str) -> dict[str, str]:
    """Return the text of every kernel in a PTX file, by name."""
    found = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        depth = 0
        for brace in re.compile(r"[{}]").finditer(text, text.index("\n{", match.end())):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                found[match[1]] = text[match.start() : brace.end()]
                break
    return found


def constant(token: str) -> int:
    """Return the bits of a literal."""
    if token[:2] in ("0f", "0F", "0d", "0D"):
        return int(token[2:], 16)
    value = int(token.rstrip("U"), 0)
    return value & (1 << 64) - 1


class Program:
    """One kernel, parsed.

    parameters: name -> (offset, bytes, type) in the block of parameters, in order.
    """

    def __init__(self, text: str) -> None:
        head, body = text.split("\n{", 1)
        self.name = re.search(r"\.entry\s+([\w$]+)", head)[1]
        self.parameters: dict[str, tuple[int, int, str]] = {}
        self.bytes = 0
        for line in re.findall(r"\.param([^,)]*)", head):
            kind, name, count = re.search(rf"\.({'|'.join(BYTES)})\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", line).groups()
            size = 1 if kind == "b8" else BYTES[kind]
            # Of a struct; `.ptr .align` is the alignment of the memory that a pointer points to.
            own = re.match(r"\s*\.align\s+(\d+)", line)
            align = int(own[1]) if own else size
            self.bytes = -(-self.bytes // align) * align
            self.parameters[name] = (self.bytes, size * int(count or 1), kind)
            self.bytes += size * int(count or 1)
        self.text: list[str] = []  # one entry per instruction
        self.names: dict[str, int] = {}
        self.size = self.local = 0
        self.specials: dict[str, int] = {}
        self.code: list[list] = []
        self._parse(body)
        self._load()

    def _register(self, bytes_: int) -> tuple[int, int, int]:
        place = self.size
        self.size += 32 * max(bytes_, 2)
        return 0, place, bytes_

    def _parse(self, body: str) -> None:
        self.scopes: list[dict] = [{}]
        labels: list[tuple[list, str, list[dict]]] = []
        statement: list[str] = []
        depth = 0  # of braces within a statement
        skipped_line = None
        position = 0
        for match in TOKEN.finditer(body):
            token = match[0]
            if token.startswith(("//", "/*")):
                continue
            if skipped_line is not None:
                if "\n" not in body[position : match.start()]:
                    position = match.end()
                    continue
                skipped_line = None
            position = match.end()
            if not statement and token in (".loc", ".file", ".pragma", ".section"):
                skipped_line = token
            elif not statement and token == "{":
                self.scopes.append({})
            elif not statement and token == "}":
                if len(self.scopes) == 1:
                    break
                self.scopes.pop()
            elif not statement and token.endswith(":"):
                self._label(token[:-1])["at"] = len(self.code)
            elif token == ";" and depth == 0:
                if statement and statement != [".pragma"]:
                    self._statement(statement, labels)
                statement = []
            else:
                depth += (token == "{") - (token == "}")
                statement.append(token)
        for code, label, scopes in labels:
            found = next((s[label]["at"] for s in reversed(scopes) if "at" in s.get(label, {})), None)
            if found is None:
                raise Failure(f"{self.name}: there is no label {label}")
            code[3] = found

    def _label(self, name: str) -> dict:
        return self.scopes[-1].setdefault(name, {})

    def _statement(self, tokens: list[str], labels: list) -> None:
        if tokens[0] == ".reg":
            bytes_ = BYTES[tokens[1][1:]]
            for name in OPERAND.findall(" ".join(tokens[2:])):
                if name == ",":
                    continue
                if found := re.fullmatch(r"(.*)<(\d+)>", name):
                    for k in range(int(found[2])):
                        self.scopes[-1][f"{found[1]}{k}"] = self._register(bytes_)
                else:
                    self.scopes[-1][name] = self._register(bytes_)
            return
        if tokens[0] == ".local":
            name, count = re.search(r"([\w$]+)\[(\d+)\]", " ".join(tokens)).groups()
            self.scopes[-1][name] = 1, self.local, 0
            self.local += -(-int(count) // 16) * 16
            return
        code = [0, -1, 0, 0, 0]
        text = " ".join(tokens)
        if tokens[0].startswith("@"):
            negated = tokens[0].startswith("@!")
            code[1], code[2] = self._find(tokens[0][1 + negated :])[1], int(negated)
            tokens = tokens[1:]
        opcode = tokens[0]
        code[0] = self.names.setdefault(opcode, len(self.names))
        operands = OPERAND.findall(" ".join(tokens[1:]))
        if opcode.startswith("bra"):
            labels.append((code, operands[0], list(self.scopes)))
            operands = []
        found, addresses, inside = [], 0, 0
        k = 0
        while k < len(operands):
            token = operands[k]
            if token in "{},|":
                pass
            elif token == "[":
                inside = 1
            elif token == "]":
                inside, addresses = 0, addresses + 1
            elif inside and token == "+":
                code[3 if addresses else 4] += int(operands[k + 1], 0)
                k += 1
            elif inside and (shifted := re.fullmatch(r"(.+?)\+(-?\d+)", token)):
                found.append(self._find(shifted[1]))
                code[3 if addresses else 4] += int(shifted[2])
            else:
                found.append(self._find(token))
            k += 1
        self.code.append(code + [len(found)] + [x for operand in found for x in operand])
        if opcode.startswith("bra"):
            labels[-1] = (self.code[-1], *labels[-1][1:])
        self.text.append(text)

    def _find(self, token: str) -> tuple[int, int, int]:
        for scope in reversed(self.scopes):
            if token in scope:
                return scope[token]
        if token in SPECIALS:
            if token not in self.specials:
                self.specials[token] = self._register(4)[1]
            return 0, self.specials[token], 4
        if token == "_":
            return 0, 0, 0
        if token in self.parameters:
            return 1, self.parameters[token][0], 0
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fFdD][0-9a-fA-F]+", token):
            return 1, constant(token), 0
        if re.fullmatch(r"[\w$]+", token):  # the dynamic shared memory, the only external name in kernels
            return 1, WINDOW, 0
        raise Failure(f"{self.name}: {token} is not known")

    def _load(self) -> None:
        flat = [x for code in self.code for x in code]
        code = (ctypes.c_uint64 * len(flat))(*(x & (1 << 64) - 1 for x in flat))
        names = (ctypes.c_char_p * len(self.names))(*(name.encode() for name in self.names))
        pairs = [x for name, place in self.specials.items() for x in (SPECIALS.index(name), place)]
        specials = (ctypes.c_int64 * max(len(pairs), 1))(*pairs)
        size = -(-self.size // 64) * 64
        self.handle = ctypes.c_void_p(
            machine().ptx_load(names, code, ctypes.c_int64(len(self.code)), ctypes.c_int64(size),
                               ctypes.c_int64(self.local), specials,
                               ctypes.c_int64(len(self.specials)))
        )  # fmt: skip
        self._require_none(0)

    def __del__(self) -> None:
        if getattr(self, "handle", None) and machine is not None:
            machine().ptx_free(self.handle)

    def _require_none(self, at: int) -> None:
        failure = machine().ptx_failure(self.handle).decode()
        if failure:
            raise Failure(f"{self.name}: {failure}, at {at}: {self.text[at] if at < len(self.text) else ''}")

    def run(
        self,
        grid: tuple,
        threads: int,
        shared: int,
        parameters: bytes,
        ranges: list,
        seed: int = 0,
        backwards: bool = False,
    ) -> None:
        """Run one launch. ranges: (begin, end) addresses of the global memory that the kernel may access.

        seed: random order in which warps run; 0: each warp runs until it waits at a barrier. backwards: run the last block first.
        """
        if len(parameters) != self.bytes:
            raise Failure(f"{self.name} takes {self.bytes} bytes of parameters, not {len(parameters)}")
        blocks = (ctypes.c_int64 * 3)(*grid)
        flat = [x for pair in ranges for x in pair]
        allowed = (ctypes.c_uint64 * max(len(flat), 1))(*flat)
        at = machine().ptx_run(
            self.handle, blocks, ctypes.c_int64(threads), ctypes.c_int64(shared), parameters, allowed,
            ctypes.c_int64(len(ranges)), ctypes.c_int64(seed), backwards,
        )  # fmt: skip
        if at >= 0:
            self._require_none(at)
