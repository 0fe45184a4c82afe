"""Says what a configuration of torchtitan is here, and writes it as a run.toml:

    python tools/from_torchtitan.py llama3_8b.toml [--output run.toml]"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from megazero.base import UserError, read_bytes, whole
from megazero.settings import as_file, option, parse, run

# key -> our flag; {} is its value. What stands in torchtitan's table and not in its file has its default there
FLAGS = {
    "training.local_batch_size": "--micro-batch-size {}", "training.batch_size": "--micro-batch-size {}",
    "training.seq_len": "--seq-length {}", "training.steps": "--train-iters {}", "training.max_norm": "--clip-grad {}",
    "training.seed": "--seed {}", "debug.seed": "--seed {}", "optimizer.lr": "--lr {}",
    "optimizer.eps": "--adam-eps {}",
    "optimizer.beta1": "--adam-beta1 {}", "optimizer.beta2": "--adam-beta2 {}",
    "optimizer.weight_decay": "--weight-decay {}", "lr_scheduler.warmup_steps": "--lr-warmup-iters {}",
    "parallelism.tensor_parallel_degree": "--tp {}", "parallelism.pipeline_parallel_degree": "--pp {}",
    "checkpoint.interval": "--save-interval {}", "checkpoint.keep_latest_k": "--keep-last {}",
    "metrics.log_freq": "--log-interval {}", "parallelism.context_parallel_degree": "--context-parallel-size {}",
    "parallelism.expert_parallel_degree": "--expert-model-parallel-size {}",
}
DEFAULTS = {"training.seq_len": 2048, "training.steps": 10000, "training.local_batch_size": 8, "optimizer.lr": 8e-4,
            "optimizer.beta2": 0.95, "optimizer.weight_decay": 0.1, "lr_scheduler.warmup_steps": 200}
SCHEDULES = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved1f1b": "interleaved", "loopedbfs": "breadth-first",
             "interleavedzerobubble": "zb-h1", "zbvzerobubble": "zb-h1"}
LLAMA = ("--swiglu --normalization RMSNorm --position-embedding-type rope --rotary-base 500000 --disable-bias-linear "
         "--untie-embeddings-and-output-weights")
FLAVORS = {                                                     # of its Llama 3
    "debugmodel": "--num-layers 6 --hidden-size 256 --num-attention-heads 16 --vocab-size 2048 --ffn-hidden-size 768",
    "8B": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --num-query-groups 8 --ffn-hidden-size 14336 "
          "--vocab-size 128256",
    "70B": "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --num-query-groups 8 --ffn-hidden-size 28672 "
           "--vocab-size 128256",
    "405B": "--num-layers 126 --hidden-size 16384 --num-attention-heads 128 --num-query-groups 8 --ffn-hidden-size "
            "53248 --vocab-size 128256",
}
# keys without effect here, by table or whole
WITHOUT = ("job.", "profiling.", "comm.", "memory_estimation.", "compile.", "experimental.", "metrics.", "checkpoint.",
           "fault_tolerance.", "training.gc_freq", "training.mixed_precision_reduce", "optimizer.implementation",
           "optimizer.name", "training.dataset", "training.dataset_path", "training.compile", "model.converters",
           "parallelism.enable_", "parallelism.fsdp_reshard_after_forward", "parallelism.pipeline_parallel_",
           "parallelism.disable_loss_parallel", "activation_checkpoint.", "model.", "lr_scheduler.", "validation.",
           "training.mixed_precision_param", "training.global_batch_size", "parallelism.data_parallel_", "float8.",
           "quantize.", "mx.", "debug.", "training.dtype", "training.enable_cpu_offload")


@dataclass(frozen=True)
class Settings:
    """Says what a configuration of torchtitan is here: keys that became flags, those without effect, those missing."""

    file: str = option(help="a configuration of torchtitan", unit="file", word=True)
    output: str = option("run.toml", "file to write, for --config", unit="file")


def main() -> None:
    s = parse(Settings, prog="from_torchtitan.py")
    try:
        keys = dict(flat(tomllib.loads(read_bytes(Path(s.file)).decode())))
    except (OSError, ValueError) as error:
        raise UserError(f"{s.file}: {getattr(error, 'strerror', None) or error}; name a .toml of torchtitan.") from None
    words, more = translated({**DEFAULTS, **keys})
    text, lines = as_file(words, defaults=False)
    unknown = [key for key in keys if key not in FLAGS and not key.startswith(WITHOUT)]
    lines += [f"not known   {' '.join(unknown)}"] if unknown else []
    lines += [f"differs     {sentence}" for sentence in more]
    with whole(Path(s.output)) as file:
        file.write(text.encode())
    print("\n".join(lines))
    print(f"wrote       {s.output}; look at the plan: python pretrain_gpt.py --config {s.output} --check --mock-data")


def flat(said: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def translated(k: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(flags, what is otherwise here all the same)."""
    words = [word for key, flag in FLAGS.items() if key in k for word in flag.format(k[key]).split()]
    differs = ["torchtitan decays norms and biases too; here matrices alone"]
    name, flavor = str(k.get("model.name", "llama3")), str(k.get("model.flavor", "8B"))
    if name.startswith("llama3") and flavor in FLAVORS:
        words += [*LLAMA.split(), *FLAVORS[flavor].split()]
    else:
        differs.append(f"model {name} {flavor} is not known here: write its sizes, or --model")
    if str(k.get("training.mixed_precision_param", "bfloat16")) == "bfloat16":
        words.append("--bf16")
    replicas, shards = (int(k.get(f"parallelism.data_parallel_{d}_degree", one))
                        for d, one in (("replicate", 1), ("shard", -1)))
    if shards != 1:
        reshards = k.get("parallelism.fsdp_reshard_after_forward", "default") != "never"
        words += ["--zero-stage", "3" if reshards else "2"]
        words += ["--zero-shard-size", str(shards)] if shards > 1 and replicas > 1 else []
    if shards > 0:
        words += ["--dp", str(shards * replicas)]
    if int(k.get("training.global_batch_size", -1)) > 0:
        words += ["--global-batch-size", str(k["training.global_batch_size"])]
    schedule = str(k.get("parallelism.pipeline_parallel_schedule", "")).lower()
    if schedule in SCHEDULES and int(k.get("parallelism.pipeline_parallel_degree", 1)) > 1:
        words += ["--pipeline-schedule", SCHEDULES[schedule]]
    mode = str(k.get("activation_checkpoint.mode", "selective"))
    words += ["--recompute-granularity", mode] if mode in ("selective", "full") else []
    steps, ratio = int(k["training.steps"]), k.get("lr_scheduler.decay_ratio")
    kind = str(k.get("lr_scheduler.decay_type", "linear"))
    least = float(k["optimizer.lr"]) * float(k.get("lr_scheduler.min_lr_factor", k.get("lr_scheduler.lr_min", 0.0)))
    words += ["--min-lr", f"{least:g}"]
    if ratio is None:
        words += ["--lr-decay-style", kind if kind in ("linear", "cosine") else "linear"]
    else:
        words += ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", str(max(round(steps * float(ratio)), 1)),
                  "--lr-wsd-decay-style", {"sqrt": "minus_sqrt"}.get(kind, kind)]
    if k.get("checkpoint.enable") or k.get("checkpoint.enable_checkpoint"):
        folder = Path(str(k.get("job.dump_folder", "outputs"))) / str(k.get("checkpoint.folder", "checkpoint"))
        words += ["--save", str(folder), "--load", str(folder)]
    if any(str(c).startswith("quantize") or "float8" in str(c) for c in k.get("model.converters", ())):
        words += ["--fp8-format", "hybrid"]
    return words, differs


if __name__ == "__main__":
    run(main)
