"""The house itself: floors, their size, and what must not stand in it. docs/design.md draws the picture."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Folders are floors, the lowest first, each with its files in order and its budget of lines. A file imports from lower folders, or from
# files of its own folder that stand before it. A budget is what the folder may grow to before somebody thinks again.
FLOORS: dict[str, tuple[int, str]] = {
    "base": (650, "errors text dtypes disk memory strict lease"),
    "pipeline": (750, "schedule timeline weighing split"),
    "settings": (2300, "command_line megatron_words megatron config script moving"),
    "plan": (4560, "rules devices layout moments tiles dealing mesh sizes progress action sums homes program verify rope architecture words operations checks plan cost family facets families show"),
    "comm": (1360, "marks group shared gloo nccl fake late ports rendezvous told wires"),
    "units": (2190, "random homes buffers unit gate codes formulas adafactor muon rules watch actions"),
    "model": (860, "products ops activations attention decoder"),
    "data": (2840, "files indexed order tokenizer_base tokenizer_words tokenizer_tiktoken tokenizers sidecar megatron_order dataset fim splits"),
    "corpus": (1260, "tables sources verify edit preprocess"),
    "state": (1520, "tensor_files elsewhere checkpoint saving merge compare record logs"),
    "hf": (520, "files tokenizer convert"),
    "run": (1590, "executor metrics run feed step loop failures ahead train launch generate"),
    "engine": (4430, "hidden sliced aliases keys words rates values blocks groups hooks passes engine optimizers checkpoints monitor full deepspeed_engine initialize zero names"),
    "elsewhere": (1800, "source names dcp megatron others deepspeed arrive leave gguf_file"),
}
DOORS = {"deepspeed": 140, "door.sitecustomize": 70, "trainer": 60}       # above all floors, each with its budget; `door` is what PYTHONPATH gets
PURE = ("base", "pipeline", "settings", "plan")             # no device, no process
SPINE = 3960                            # lines that a newcomer reads in an afternoon
SPINE_FILES = ("run/train run/loop run/step run/run run/executor model/decoder model/ops units/unit plan/layout plan/program pipeline/schedule plan/plan "
               "plan/architecture comm/group comm/shared comm/gloo comm/nccl comm/fake comm/late comm/rendezvous comm/wires comm/__init__")
WIDTH = 120
PICKLES = {ROOT / "tools" / f"{name}.py" for name in ("restricted", "pickled")}     # what reads, and what writes, checkpoints of others
LIBRARY = sorted((ROOT / "megazero").rglob("*.py"))
OURS = [*LIBRARY, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "pretrain_gpt.py"]
ORDER = list(FLOORS)
PLACE = {f"megazero.{folder}.{name}": (ORDER.index(folder), i)
         for folder, (_, names) in FLOORS.items() for i, name in enumerate(names.split())}
PLACE |= {f"megazero.{name}": (len(ORDER), i) for i, name in enumerate(DOORS)}


def module(path: Path) -> str:
    """megazero.plan.layout; of an __init__ its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, tuple(a.name for a in node.names)))
        elif isinstance(node, ast.Import):
            found += [(a.name, ()) for a in node.names]
    return found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_file_has_its_place_and_imports_only_from_below() -> None:
    files = {module(p): p for p in LIBRARY if p.name != "__init__.py"}
    assert set(files) == set(PLACE), set(files) ^ set(PLACE)
    for name, path in files.items():
        floor, place = PLACE[name]
        for other, _ in imports(path):
            if other.startswith("megazero."):
                below = PLACE[other] if other in PLACE else (ORDER.index(other.split(".")[1]), -1)
                assert below < (floor, place) and (other in PLACE) == (below[0] == floor), f"{name} imports {other}"


def test_a_folder_is_entered_by_its_door() -> None:
    """Names of another folder come from the folder, whose __init__ lists what is public: just what others use."""
    used: dict[str, set[str]] = {f"megazero.{folder}": set() for folder in FLOORS}
    for path in [p for p in OURS if p.name != "__init__.py" or p.parent.name in ("megazero", "deepspeed")]:
        for other, names in imports(path):
            if other.startswith("megazero.") and PLACE.get(other, (-1, 0))[0] not in (PLACE.get(module(path), (-2, 0))[0], len(ORDER)):
                assert other in used, f"{path} imports {other}: import from the folder"
                used[other].update(names)
    for folder in FLOORS:
        listed = [n for _, names in imports(ROOT / "megazero" / folder / "__init__.py") for n in names]
        assert len(listed) == len(set(listed)) and set(listed) == used[f"megazero.{folder}"], set(listed) ^ used[f"megazero.{folder}"]


def test_the_pure_floors_start_no_device_and_no_process() -> None:
    for path in LIBRARY:
        if path.parent.name in PURE:
            assert not any(m.split(".")[0] in ("torch", "subprocess", "multiprocessing") for m, _ in imports(path)), path


def test_each_floor_keeps_its_budget_and_the_spine_its_afternoon() -> None:
    for folder, (budget, _) in FLOORS.items():
        assert sum(map(lines, (ROOT / "megazero" / folder).glob("*.py"))) <= budget, folder
    for name, budget in DOORS.items():
        assert lines(ROOT / "megazero" / f"{name.replace('.', '/')}.py") <= budget, name
    assert sum(lines(ROOT / "megazero" / f"{name}.py") for name in SPINE_FILES.split()) <= SPINE


def test_no_line_is_too_wide() -> None:
    wide = [f"{path.name}:{i + 1}" for path in OURS for i, line in enumerate(path.read_text().splitlines()) if len(line) > WIDTH]
    assert not wide


def test_nothing_is_unpickled_and_collectives_live_in_comm() -> None:
    for path in {*LIBRARY, *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt.py"} - PICKLES:
        used = [m for m, _ in imports(path)]
        assert not {"pickle", "dill", "shelve"} & {m.split(".")[0] for m in used}, path
        called = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & called, path
        if path.parent.name != "comm":
            assert not any("distributed" in m for m in used), path


def test_pickles_are_of_others_checkpoints_alone() -> None:
    readers = {p.stem for p in PICKLES}
    assert [p.name for p in OURS if any(m in readers for m, _ in imports(p))] == ["convert_checkpoint.py"]


def test_every_function_has_types() -> None:
    for path in [*LIBRARY, *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}"
                assert all(a.annotation for a in arguments), f"{path.name}:{node.lineno} {node.name}"


def test_one_noun_has_one_meaning() -> None:
    """No two public classes or functions of the library share a name, whatever their files."""
    homes: dict[str, list[str]] = {}
    for path in LIBRARY:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module(path))
    assert not {name: places for name, places in homes.items() if len(places) > 1}
