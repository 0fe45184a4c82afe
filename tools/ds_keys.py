"""Every key of ds_config.json as a page, from the table that judges them:
python tools/ds_keys.py > docs/deepspeed.md"""

from itertools import groupby

from megazero.engine import HONOURED, MUST, TABLE, Key, form_of

INTRO = """# ds_config.json

Made by `python tools/ds_keys.py > docs/deepspeed.md`; do not edit.

`megazero.initialize(model=model, config=...)` has DeepSpeed's signature and returns its four values: engine,
optimizer, loader, scheduler. `config` is a mapping, the path of a file, or base64 for URLs. A file is JSON; comments
(`//`, `#`, `/* */`) and a comma before a closing bracket may stand in it. Each key is honoured, or has no effect here
(one line at start names those that were given, and says why), or is refused with a sentence. A key that is not in this
table is an error, at any depth, and so are one that stands twice and `"auto"`, which only a trainer fills in. Defaults
are those of DeepSpeed 0.19.8.

Gradients are summed in fp32 at every level and in every dtype. A step that was skipped does not move the scheduler.

## Scripts that say `import deepspeed`

`python -m megazero.deepspeed COMMAND ...` makes that name mean this engine in COMMAND and all that it starts: a
script, `-m MODULE`, `torchrun ...`, `accelerate launch ...`, or the words of DeepSpeed's launcher (`--num_gpus 2 script
...`).
Under torchrun it may stand before the script: `torchrun --nproc_per_node 2 -m megazero.deepspeed train.py --deepspeed
ds_config.json`. transformers and accelerate then find DeepSpeed 0.19.8: `TrainingArguments(deepspeed=...)`, `"auto"`,
`DeepSpeedPlugin`, `HfDeepSpeedConfig`. It works beside the real package, and says so. Without CUDA accelerate sees the
ranks on CPUs; what would make it fall back to plain data parallelism (`--use_cpu`, ACCELERATE_USE_CPU) is refused. A
name that is not there (PipelineModule, MoE layers, init_inference, tensor parallelism) is one sentence. `import
megazero; megazero.Trainer` is transformers' Trainer for a script that is not started so.

- **Layers** are gathered and released one by one at level 3: the children of every nn.ModuleList, or nn.Sequential of
  two of a kind, that is not inside another. A module without any says so.
- **Large models**: `with megazero.zero.Init(config_dict_or_path=...)` keeps slices of each part once the next is made;
  its weights are those of a plain module on rank 0. transformers' from_pretrained does so by itself at stage 3, with
  all files in the memory of rank 0; `megazero.from_pretrained(AutoModelForCausalLM, FOLDER, config)` reads slices.
- **Readers and writers** of weights: `zero.GatheredParameters(parameters, modifier_rank=0)`, or `engine.whole(...)`.
- **Epochs**: `engine.step(partial=True)` ends a step with the micro-batches that it has had, and takes their mean; one
  that `set_gradient_accumulation_boundary` ends (accelerate's `accumulate` does) divides by the micro-batches that a
  step should have, as DeepSpeed and plain accelerate do. Where ranks have unlike numbers of them, `for batch in
  engine.together(loader)` ends the epoch on all when the first has no more.
- **Checkpoints**: [checkpoints.md](checkpoints.md).

# The keys
"""


def page() -> str:
    """The page in Markdown."""
    blocks = groupby(TABLE, key=lambda key: key.path.split(".")[0] if "." in key.path else "")
    named: dict[str, list[Key]] = {}
    for block, keys in blocks:
        named.setdefault(block, []).extend(keys)
    return "\n".join([INTRO, *(table(block, keys) for block, keys in named.items())])


def table(block: str, keys: list[Key]) -> str:
    title = f"## `{block}`\n" if block else "## At the top\n"
    return "\n".join([title, "| key | value | default | here | |", "|---|---|---|---|---|", *map(row, keys), ""])


def row(key: Key) -> str:
    of = f" ({', '.join(key.of.split('|'))})" if key.of else ""
    kind = key.kind if key.kind == HONOURED else f"*{key.kind}*"
    cells = (f"`{key.path}`{of}", form_of(key), default(key), kind, key.what)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default(key: Key) -> str:
    if key.default is None:
        return ""
    if key.default == MUST or isinstance(key.default, bool):
        return key.default if isinstance(key.default, str) else str(key.default).lower()
    return f"`{key.default:g}`" if isinstance(key.default, float) else f"`{key.default}`"


if __name__ == "__main__":
    print(page(), end="")
