"""Launch scripts of bash, read without running anything: which words does the training program get?

Variables, arrays, sums, defaults (`${A:-1}`) and conditions on what the script itself sets are followed as the shell
would, functions are called with their arguments, here-documents kept. Where a condition asks what only the machine
knows (a file, the environment, an argument), its first branch is taken as if it held, for all that it sets together;
so is the first turn of a loop. What depends on that is in doubt, and told. Pure.
"""

import ast
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
DECLARED = re.compile(r"(?:export|local|readonly|declare|typeset)\s+(?:-\w+\s+)*")
ARRAY = re.compile(rf"({NAME})(\+?)=\((.*)\)", re.DOTALL)
SCALAR = re.compile(rf"({NAME})(\+?)=(.*)", re.DOTALL)
REFERENCE = re.compile(rf"\$(?:\{{({NAME}|\d+|[@*])(?:\[[@*]\])?(?::?[-=]([^}}]*))?\}}|({NAME}|[\d@*]))")
ALTERED = re.compile(rf"\$\{{({NAME})(?:\[(\d+)\]|(%%?|##?|,,|\^\^)([^}}]*)|(//?)([^}}/]*)(?:/([^}}]*))?)\}}")
SUM = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
KEYWORD = re.compile(r"(if|elif|then|else|fi|case|esac|do|done|for|while|until|\{|\}|!)(?=\s|$)\s*")
FUNCTION = re.compile(rf"(?:function\s+({NAME})\s*(?:\(\))?|({NAME})\s*\(\))\s*\{{(.*)\}}\s*", re.DOTALL)
BEGINS = re.compile(rf"\s*(?:function\s+{NAME}\s*(?:\(\))?|{NAME}\s*\(\))\s*(\{{|$)")
LOOP = re.compile(rf"for\s+({NAME})\s+in\s+(.*)", re.DOTALL)
TOLD = ("echo", "printf", "cat", "tee", "ls", "cp", "mkdir", "trap", "alias")      # commands that start nothing
ARM = re.compile(r"\(?([^()\s][^()]*?)\s*\)\s*(?!\))")
HERE = re.compile(r"<<-?\s*([\"']?)(\w+)[\"']?")
INTO = re.compile(r">\s*([^\s<>|;&]+)")
DEEPEST = 20                # functions that call each other
PROGRAM = re.compile(r"(?:.*/)?(?:pretrain|train|run_pretrain)\w*\.py")
LONGEST = 2**16             # letters of a variable or word: who doubles one often enough would fill the memory
LONG = 2**12                # of a value that a pattern is looked for in, at each of its places
OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: operator.floordiv, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne}
COMPARED: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt,
    "-ge": operator.ge}

Verdict = bool | None       # None: only the machine knows


@dataclass(frozen=True)
class Launch:
    """The words of the last command that starts a training program, and those of its launcher.

    doubts      variables that these words come from -> the conditions under which they have these values
    program     its name
    programs    how many commands start one
    files       what the script itself writes -> its text
    """

    words: list[str]
    launcher: list[str]
    doubts: dict[str, str]
    program: str
    programs: int
    files: Mapping[str, str] = field(default_factory=dict)


def launch_of(text: str, arguments: Sequence[str] = ()) -> Launch:
    """`arguments`: what the script is called with. Raises ValueError for a script that starts no training program."""
    return _Reader().read(text, arguments)


@dataclass
class _Branches:
    """An `if` or a `case` that is open. now: is this branch taken? before: was one of those before it?"""

    asked: str
    value: str | None = None            # of a case
    arm: bool = False                   # of a case: are we in one of its arms?
    now: Verdict = False
    before: bool = False
    doubtful: bool = False              # does what it asks hang on what is in doubt?

    def enter(self, holds: Verdict) -> None:
        """A branch begins. One that may be taken is: those behind it are not, then."""
        self.now = False if self.before else None if self.doubtful and holds else holds
        self.before, self.arm = self.before or holds is not False, True


@dataclass
class _Reader:
    variables: dict[str, list[str]] = field(default_factory=dict)
    doubts: dict[str, dict[str, str]] = field(default_factory=dict)    # variable -> doubtful ones that it comes from
    open: list[_Branches] = field(default_factory=list)
    status: Verdict = True              # of the last command
    asking: bool = False                # between `if` and `then`
    asked: str = ""                     # the last test
    doubted: bool = False               # did the last test hang on what is in doubt?
    equal: tuple[str, str] | None = None        # what the last test holds for: a variable that nobody set, a value
    found: list[Launch] = field(default_factory=list)
    functions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    depth: int = 0
    other: str = ""                     # a program of which nothing is known here

    def read(self, text: str, arguments: Sequence[str]) -> Launch:
        self.called(text, arguments)
        for body in [] if self.found else self.functions.values():      # called by what nobody reads here
            self.called(body, arguments)
        if not self.found:
            other = f"starts {self.other}, whose words are not Megatron-LM's, and no" if self.other else "starts no"
            raise ValueError(f"{other} program such as pretrain_gpt.py")
        return self.found[-1]

    def called(self, text: str, arguments: Sequence[str]) -> None:
        """What a script, or a function, does that is called with these arguments."""
        before = {name: self.variables.pop(name) for name in [*self.variables] if name.isdecimal() or name == "@"}
        self.variables |= {str(i): [word] for i, word in enumerate(arguments, 1)} | {"@": [*arguments]}
        open_, self.open, self.depth = self.open, [], self.depth + 1
        if self.depth > DEEPEST:
            raise ValueError(f"has functions that call each other more than {DEEPEST} deep")
        for statement, here in _statements(text):
            function = "\n" in statement and FUNCTION.fullmatch(statement)
            for joint, part in [(";", statement)] if function else _parts(statement):
                self.command(joint, part)
            if here and (into := INTO.search(statement)):
                self.files[self.value_of(_bare(into[1]))] = self.value_of(here[1]) if here[0] else here[1]
        self.open, self.depth = open_, self.depth - 1
        for name in [name for name in self.variables if name.isdecimal() or name == "@"]:
            del self.variables[name]
        self.variables |= before

    def command(self, joint: str, text: str) -> None:
        """One command, behind `;`, `&&`, `||` or `;;`."""
        if joint == ";;" and self.open:
            self.open[-1].now, self.open[-1].arm = False, False
        text, inverted = self.keywords(text)
        live = True if joint not in ("&&", "||") else self.status if joint == "&&" else _not(self.status)
        for branches in self.open[:-1] if self.asking else self.open:
            live = _both(live, branches.now)
        if not text or live is False:
            return
        status = self.carried_out(text, live)
        status = _not(status) if inverted else status
        join = {"&&": _both, "||": _either}.get(joint)
        self.status = join(self.status, status) if join else status

    def keywords(self, text: str) -> tuple[str, bool]:
        """(what stands behind the keywords of conditions and loops, an exclamation mark among them?)"""
        inverted = False
        if match := FUNCTION.fullmatch(text):
            self.functions[match[1] or match[2]] = match[3]
            return "", False
        while text:
            case = self.open[-1] if self.open and self.open[-1].value is not None else None
            if case and not case.arm and (match := ARM.match(text)):
                held = [fnmatchcase(case.value or "", _bare(pattern)) for pattern in match[1].split("|")]
                case.asked = f"{case.asked.partition(' is ')[0]} is {match[1]}"
                name = _unset(case.value or "")
                case.enter(True if match[1] == "*" else None if _unknown(case.value or "") else any(held))
                if case.now is None and name and not set(match[1]) & set("*?["):
                    self.assume(name, _bare(match[1].split("|")[0]), case.asked)
            elif match := KEYWORD.match(text):
                inverted |= match[1] == "!"
                self.keyword(match[1], text[match.end():])
                if match[1] in ("for", "while", "until"):
                    if loop := LOOP.fullmatch(text):
                        self.turn(loop[1], [part for word in _split(loop[2]) for part in self.expanded(word)])
                    return "", False
                if match[1] == "case":
                    match = re.match(r"case\s+\S+\s+in\b\s*", text) or match
            else:
                break
            text = text[match.end():]
        return text, inverted

    def keyword(self, word: str, rest: str) -> None:
        if word == "if":
            self.open.append(_Branches(rest))
        elif word == "case":
            asked = _bare(rest.partition(" in")[0].strip())
            self.open.append(_Branches(asked, self.value_of(asked), doubtful=bool(self.doubts_of(asked))))
        elif self.open and word == "elif":
            self.open[-1].asked = rest
        elif self.open and word == "then":
            self.open[-1].doubtful |= self.doubted
            self.open[-1].enter(self.status)
            if self.open[-1].now is None and self.equal:
                self.assume(*self.equal, self.open[-1].asked)
        elif self.open and word == "else":
            self.open[-1].asked = f"not {self.open[-1].asked}"
            self.open[-1].enter(True)
        elif self.open and word in ("fi", "esac"):
            self.open.pop()
        if word in ("if", "elif", "then", "else", "fi", "esac"):
            self.status, self.asking, self.equal, self.doubted = True, word in ("if", "elif"), None, False

    def assume(self, name: str, value: str, asked: str) -> None:
        """A variable that nobody set is what a condition holds for, here and later."""
        if any(branches.now is False for branches in self.open):
            return
        self.variables[name] = [value]
        self.doubts[name] = {f"${name}": f"{value}, for that is what {asked} asks"}

    def turn(self, name: str, values: Sequence[str]) -> None:
        """The first of a loop."""
        if values and all(branches.now is not False for branches in self.open):
            self.variables[name] = [values[0]]
            self.doubts[name] = {f"${name}": f"{values[0]}, the first that the loop has of {' '.join(values)}"
                                 } if len(values) > 1 else {}

    def carried_out(self, text: str, live: Verdict) -> Verdict:
        """Does the command succeed? What it sets is set."""
        if found := self.tested(text):
            self.asked = text
            return found[0]
        declared = DECLARED.match(text)
        rest = text[declared.end():] if declared else text
        if array := ARRAY.fullmatch(rest):
            words = _split(self.calculated(array[3]))
            values = [part for word in words for part in self.expanded(word)]
            before = self.variables.get(array[1], []) if array[2] else []
            self.set(array[1], [*before, *values], live, [*words, f"${array[1]}"] if array[2] else words)
            return True
        words = _split(self.calculated(rest))
        while words and (match := SCALAR.fullmatch(words[0])):
            before = self.variables.get(match[1], []) if match[2] else []
            value = " ".join([*before, ""]) if len(before) > 1 else "".join(before)
            self.set(match[1], [value + self.value_of(match[3])], live, [match[3], f"${match[1]}" if match[2] else ""])
            words = words[1:]
        if words and words[0] in self.functions and not declared:
            self.called(self.functions[words[0]], [part for word in words[1:] for part in self.expanded(word)])
            return None if self.asking else True
        return True if not words or declared or words[0] in TOLD else self.program(words)

    def program(self, words: Sequence[str]) -> Verdict:
        given = [part for word in words for part in self.expanded(word)]
        given = [part for word in given for part in (_split(word) if re.search(r"\.py\s", word) else [word])]
        at = next((i for i, word in enumerate(given) if PROGRAM.fullmatch(word)), None)
        self.other = next((word for word in given if word.endswith(".py")), self.other)
        if at is not None:
            doubts = {name: why for word in words for name, why in self.doubts_of(word).items()}
            self.found.append(Launch([*_until_pipe(given[at + 1:])], given[:at], doubts, given[at],
                                     len(self.found) + 1, self.files))
        return None if self.asking else True

    def set(self, name: str, now: list[str], live: Verdict, source: Sequence[str]) -> None:
        """A variable, to what came of these words."""
        if sum(map(len, now)) > LONGEST:
            raise ValueError(f"gives the variable {name} more than {LONGEST:,} letters")
        doubts = {doubted: why for word in source for doubted, why in self.doubts_of(word).items()}
        if live is None:
            doubts |= self.doubts.get(name, {})
        if live is None and now != self.variables.get(name):
            doubts[name] = "; ".join(b.asked for b in self.open if b.now is None) or self.asked
        self.variables[name], self.doubts[name] = now, doubts

    def doubts_of(self, word: str, seen: Collection[str] = ()) -> dict[str, str]:
        names = {match[1] or match[3] for match in REFERENCE.finditer(word)} - {*seen}
        found: dict[str, str] = {}
        for name in sorted(names):
            found |= self.doubts.get(name, {})
            for value in self.variables.get(name, []) if "$" in " ".join(self.variables.get(name, [])) else []:
                found |= self.doubts_of(value, {*seen, *names})
        return found

    # ---- values

    def expanded(self, word: str) -> list[str]:
        """The words that a word becomes; what nobody set stays as $NAME."""
        match = REFERENCE.fullmatch(word)
        parts = self.variables.get(match[1] or match[3], []) if match else []
        if match and (match[1] or match[3]) in ("@", "*"):
            return [*self.variables.get("@", [])]
        if len(parts) > 1:
            return [p for part in parts for p in (_split(part) if part.startswith("--") else [part])]
        value = self.value_of(word)
        return _split(value) if (match and type(word) is not _Quoted) or re.search(r"\s--\w", value) else [value]

    def value_of(self, word: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1] or match[3]
            name = "@" if name == "*" else name
            if name in self.variables and (match[2] is None or self.variables[name] != [""]):
                return " ".join(self.variables[name])
            return match[2] if match[2] is not None else match[0]

        def altered(match: re.Match[str]) -> str:
            parts = self.variables.get(match[1], ["$"])
            if match[2]:
                return parts[int(match[2])] if int(match[2]) < len(parts) and parts != ["$"] else match[0]
            text = " ".join(parts)
            how, pattern = match[3] or match[5], match[4] or match[6] or ""
            known = not _unknown(text) and len(text) <= LONG
            return _altered(text, how, _bare(pattern), match[7] or "") if known else match[0]

        for _ in range(8):                                      # of variables that name variables
            now = REFERENCE.sub(value, ALTERED.sub(altered, word))
            if now == word:
                break
            word = now
            if len(word) > LONGEST:
                raise ValueError(f"gives a word more than {LONGEST:,} letters")
        return word

    def calculated(self, text: str) -> str:
        """With the values of $((...)), where all that it names is known."""
        def value(match: re.Match[str]) -> str:
            return str(number) if (number := self.number(match[1])) is not None else match[0]

        return SUM.sub(value, text)

    def number(self, text: str) -> int | None:
        return _number(re.sub(rf"\$?\{{?({NAME})\}}?", lambda m: " ".join(self.variables.get(m[1], [m[0]])), text))

    # ---- conditions

    def tested(self, text: str) -> tuple[Verdict] | None:
        """What a test says; None for any other command."""
        if text in ("true", ":", "false"):
            return (text != "false",)
        if match := re.fullmatch(r"\(\((.*)\)\)", text, re.DOTALL):
            number = self.number(match[1])
            return (None if number is None else number != 0,)
        match = re.fullmatch(r"\[\[\s(.*)\s\]\]|\[\s(.*)\s\]|test\s(.*)", text, re.DOTALL)
        if not match:
            return None
        words = _split(self.calculated(next(group for group in match.groups() if group is not None)))
        return (self.any_of(words),)

    def any_of(self, words: list[str]) -> Verdict:
        for joints, joined in ((("||", "-o"), _either), (("&&", "-a"), _both)):
            at = next((i for i, word in enumerate(words) if i and word in joints), None)
            if at is not None:
                return joined(self.any_of(words[:at]), self.any_of(words[at + 1:]))
        return _not(self.any_of(words[1:])) if words[:1] == ["!"] else self.one(words)

    def one(self, words: list[str]) -> Verdict:
        """A single test."""
        values = [self.value_of(word) for word in words]
        if len(values) == 3 and values[1] in ("=", "==") and (name := _unset(values[0])) and not _unknown(values[2]):
            self.equal = name, values[2]
        self.doubted |= any(map(self.doubts_of, words))
        if any(map(_unknown, values)):
            return None
        match values:
            case [value]:
                return bool(value)
            case ["-n", value]:
                return bool(value)
            case ["-z", value]:
                return not value
            case [left, "=" | "==", right]:
                return fnmatchcase(left, right)
            case [left, "!=", right]:
                return not fnmatchcase(left, right)
            case [left, how, right] if how in COMPARED:
                a, b = _number(left), _number(right)
                return None if a is None or b is None else COMPARED[how](a, b)
        return None


def _not(a: Verdict) -> Verdict:
    return None if a is None else not a


def _both(a: Verdict, b: Verdict) -> Verdict:
    return False if a is False or b is False else None if a is None or b is None else True


def _either(a: Verdict, b: Verdict) -> Verdict:
    return _not(_both(_not(a), _not(b)))


class _Quoted(str):
    """A word in quotation marks, which is not parted when its variables are known."""


def _unknown(value: str) -> bool:
    """Does it hold what only the machine knows: a variable, what a command prints?"""
    return "$" in value or "`" in value


def _altered(text: str, how: str, pattern: str, other: str) -> str:
    """What ${NAME%pattern} and its like make of a value."""
    ends = range(len(text) + 1)
    if how[0] in "%#":
        fits = [at for at in ends if fnmatchcase(text[at:] if how[0] == "%" else text[:at], pattern)]
        if not fits:
            return text
        at = max(fits) if how in ("%", "##") else min(fits)
        return text[:at] if how[0] == "%" else text[at:]
    if how[0] == "/":
        wanted = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
        return re.sub(wanted, lambda _: other, text, count=len(how) == 1) if wanted else text
    return text.lower() if how == ",," else text.upper()


def _unset(value: str) -> str:
    """The variable that it is and nobody set, or nothing."""
    match = REFERENCE.fullmatch(value)
    return (match[1] or match[3]) if match and match[2] is None else ""


def _bare(word: str) -> str:
    """Without quotation marks around it."""
    word = word.strip()
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


# ---- letters

def _statements(text: str) -> Iterator[tuple[str, tuple[bool, str] | None]]:
    """Lines that belong together: to the end of a quotation, of an array, of a function, of what a backslash continues;
    and the here-document behind them: (are its variables put in?, text)."""
    waiting, here, lines = "", None, list[str]()
    for line in re.sub(r"`\s*#[^`\n]*`", "", text).splitlines():    # a remark within a line that goes on
        bare = line.strip()
        if here is not None:
            if bare == here[2]:
                yield _ended(waiting), (not here[1], "\n".join(lines) + "\n")
                waiting, here, lines = "", None, []
            else:
                lines.append(line)
            continue
        if bare.startswith("#") or not bare and not waiting:
            continue
        waiting += bare[:-1] + " " if bare.endswith("\\") else bare + "\n"
        if bare.endswith(("\\", "&&", "||")) or _open(waiting):
            continue
        here = HERE.search(waiting) if "<<<" not in waiting and not BEGINS.match(waiting) else None
        if here is None:
            yield _ended(waiting), None
            waiting = ""
    if waiting.strip():
        yield waiting.strip(), None


def _ended(statement: str) -> str:
    statement = statement.strip()
    return statement if statement.endswith(";;") else statement.rstrip(";")


def _outside(text: str) -> Iterator[tuple[int, str, int]]:
    """(place, letter, brackets open behind it) of what is in no quotation and no comment. Raises ValueError where a
    quotation does not end."""
    quote, depth, at = "", 0, 0
    while at < len(text):
        c = text[at]
        if c == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if c == quote else quote
        elif c in "'\"`":
            quote = c
        elif c == "#" and (at == 0 or text[at - 1].isspace()):
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        else:
            depth += (c in "({[") - (c in ")}]")
            yield at, c, depth
        at += 1
    if quote:
        raise ValueError("a quotation does not end")


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """(what parts it from the one before, command) of the commands of a line."""
    start, joint = 0, ";"
    try:
        letters = [*_outside(text)]
    except ValueError:
        letters = []
    for at, c, depth in letters:
        if depth <= 0 and at >= start and (c == ";" or text[at:at + 2] in ("&&", "||")):
            yield joint, text[start:at].strip()
            joint = text[at:at + 2] if text[at:at + 2] in ("&&", "||", ";;") else ";"
            start = at + len(joint)
    yield joint, text[start:].strip()


def _split(text: str) -> list[str]:
    """The words of a command as the shell parts them: quotation marks go, $( ) and ${ } stay together."""
    words, word = list[str](), None
    quote, depth, at, kind = "", 0, 0, str
    while at < len(text):
        c = text[at]
        if c == "\\" and quote != "'" and at + 1 < len(text):
            at += 1
            word = (word or "") + (text[at] if text[at] != "\n" else "")
        elif quote:
            quote, word = ("" if c == quote else quote), (word or "") + ("" if c == quote != "`" else c)
        elif c in "'\"`":
            quote, word, kind = c, (word or "") + ("`" if c == "`" else ""), _Quoted if c == '"' else kind
        elif c == "#" and word is None:
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        elif c.isspace() and depth <= 0:
            words, word, kind = words if word is None else [*words, kind(word)], None, str
        else:
            depth += (c in "({" and (depth > 0 or text[at - 1:at] == "$")) - (c in ")}" and depth > 0)
            word = (word or "") + c
        at += 1
    return words if word is None else [*words, kind(word)]


def _open(text: str) -> bool:
    """Is a quotation, an array or a function not closed yet?"""
    try:
        letters = [*_outside(text)]
    except ValueError:
        return True
    if BEGINS.match(text):
        braces = [c for _, c, _ in letters if c in "{}"]
        return not braces or braces.count("{") > braces.count("}")
    array = re.match(rf"\s*(?:\w+\s+)?{NAME}\+?=\(", text)
    return bool(array) and bool(letters) and letters[-1][2] > 0


def _until_pipe(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if re.match(r"[|;&]|\d?>", word):
            return
        yield word


def _number(text: str) -> int | None:
    """Of sums, products and comparisons of whole numbers as the shell has them; None for anything else."""
    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            found = OPERATIONS[type(node.op)](of(node.left), of(node.right))
            if abs(found) < 2**63:
                return found
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATIONS:
            return int(OPERATIONS[type(node.ops[0])](of(node.left), of(node.comparators[0])))
        raise ValueError(text)

    try:
        return of(ast.parse(text.strip(), mode="eval").body) if len(text) < 200 else None
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
        return None
