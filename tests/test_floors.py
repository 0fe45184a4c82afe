"""The house itself: floors, and what must not stand in it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A file imports from lower floors, or from files of its own floor that stand before it. docs/design.md draws the picture.
FLOORS = [
    ["errors"],
    ["command_line", "pipeline", "timeline", "config", "layout", "mesh", "program", "architecture", "checks", "plan", "cost", "schedules", "random",
     "data.files", "data.indexed", "data.order", "data.tokenizer_base", "data.tokenizer_tiktoken",
     "data.tokenizers", "data.sidecar",
     "data.megatron_order", "data.dataset", "data.fim", "data.splits", "data.verify", "data.edit", "data.sources",
     "data.preprocess"],
    ["comm.group", "comm.shared", "comm.gloo", "comm.nccl", "comm.fake", "comm.late", "comm.wires"],
    ["unit", "ops", "attention", "blocks"],
    ["data.loader", "decoder", "executor", "models.families"],
    ["tensor_files", "optimizer", "checkpoint", "saving", "merge", "compare", "metrics", "models.hf_files", "models.hf_tokenizer", "models.hf"],
    ["run", "train", "generate", "engine"],
]
PLACE = {f"megazero.{name}": (floor, i) for floor, names in enumerate(FLOORS) for i, name in enumerate(names)}
PLACE["megazero.comm"] = PLACE["megazero.comm.wires"]           # the package: all of it


def modules() -> dict[str, ast.Module]:
    files = [p for p in (ROOT / "megazero").rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text()) for p in files}


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def test_every_file_has_its_floor_and_imports_only_from_below() -> None:
    trees = modules()
    assert set(trees) == set(PLACE) - {"megazero.comm"}, set(trees) ^ set(PLACE)
    for name, tree in trees.items():
        for other in imports(tree) & set(PLACE):
            assert PLACE[other] < PLACE[name], f"{name} imports {other}, which is not below it"


def test_the_pure_floor_starts_no_device_and_no_process() -> None:
    for name, tree in modules().items():
        if PLACE[name][0] <= 1 and name not in ("megazero.random", "megazero.data.preprocess"):
            assert not any(m.split(".")[0] in ("torch", "subprocess", "multiprocessing") for m in imports(tree)), name


def test_nothing_is_unpickled_and_collectives_live_in_comm() -> None:
    for path in [*(ROOT / "megazero").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt.py"]:
        tree = ast.parse(path.read_text())
        assert not {"pickle", "dill", "shelve"} & {m.split(".")[0] for m in imports(tree)}, path
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & called, path
        if path.parent.name != "comm":
            assert not any("distributed" in m for m in imports(tree)), path


def test_every_function_has_types() -> None:
    for path in [*(ROOT / "megazero").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}"
                assert all(a.annotation for a in arguments), f"{path.name}:{node.lineno} {node.name}"
