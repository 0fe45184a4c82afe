"""Command lines of Megatron-LM and its kin, in this program's words."""

from pathlib import Path

import pytest
from support import SHARED, TINY, resolved

from megazero.base import UserError
from megazero.plan import describe, sizes
from megazero.plan.checks import checks, remarks
from megazero.plan.words import architecture
from megazero.run.train import main
from megazero.settings import from_command_line, in_our_words
from megazero.settings.command_line import leaves, nearest
from megazero.settings.config import Config
from megazero.settings.megatron import SPECIAL
from megazero.settings.megatron_words import PLAIN, REFUSED, RENAMED, VALUES, WITHOUT

OURS = {o.flag[2:] for group in leaves(Config).values() for o in group}

# what is said there -> (here, what is told of it)
SAID = {
    "--tensorboard-dir logs": ("--log-dir logs", "--tensorboard-dir logs: logs go to --log-dir"),
    "--use-distributed-optimizer": ("--zero-stage 1", "--use-distributed-optimizer: is --zero-stage 1"),
    "--use-distributed-optimizer --zero-stage 2": ("--zero-stage 2", "--use-distributed-optimizer: is --zero-stage 1"),
    "--data-parallel-sharding-strategy optim_grads_params": ("--zero-stage 3", "optim_grads_params: is --zero-stage 3"),
    "--group-query-attention --num-query-groups 2": ("--num-query-groups 2", ""),
    "--group-query-attention": ("--num-query-groups 1", "--group-query-attention: is --num-query-groups 1, for no number is given"),
    "--attention-head-type multiquery": ("--num-query-groups 1", "multiquery: is --num-query-groups 1"),
    "--num-key-value-heads=4": ("--num-query-groups 4", "--num-key-value-heads 4: is --num-query-groups"),
    "--num-layers 24 --pp 4 --num-layers-per-virtual-pipeline-stage 2":
        ("--num-layers 24 --pp 4 --num-virtual-stages-per-pipeline-rank 3 --pipeline-schedule interleaved", "stage 2: is --num-virtual-stages"),
    "--num-layers 8 --pp 4 --num-layers-per-virtual-pipeline-stage 2": ("--num-layers 8 --pp 4 --num-virtual-stages-per-pipeline-rank 1", ""),
    "--num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule breadth-first":
        ("--num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule breadth-first", ""),
    "--checkpoint-activations": ("--recompute-granularity full", "is --recompute-granularity full"),
    "--recompute-activations": ("--recompute-granularity selective", "is --recompute-granularity selective"),
    "--no-position-embedding --position-embedding-type rope": ("--position-embedding-type rope", ""),
    "--no-position-embedding": ("--position-embedding-type none", "is --position-embedding-type none"),
    "--use-rotary-position-embeddings": ("--position-embedding-type rope", ""),
    "--train-tokens 1_000_000 --seq-length 1000": ("--train-samples 1000 --seq-length 1000", "--train-tokens 1000000: is --train-samples 1000"),
    "--lr-warmup-tokens 5000 --lr-decay-tokens 9,999 --seq-length 10":
        ("--lr-warmup-samples 500 --lr-decay-samples 999 --seq-length 10", "--lr-decay-tokens 9999: is --lr-decay-samples 999"),
    "--train-tokens 1000 --train-samples 3": ("--train-samples 3", ""),
    "--normalization rmsnorm": ("--normalization RMSNorm", "--normalization rmsnorm: is RMSNorm"),
    "--lr-wsd-decay-style 1-sqrt": ("--lr-wsd-decay-style minus_sqrt", "is minus_sqrt"),
    "--vocab-file v --merge-file m": ("--vocab-file v --merge-file m --tokenizer-type GPT2BPETokenizer", "are files of --tokenizer-type GPT2BPETokenizer"),
    "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path x/y":
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model x/y", "PretrainedFromHF: is HuggingFaceTokenizer"),
    "--window-size 127,0": ("--attention-window 128", "--window-size 127,0: is --attention-window 128, the token itself counted"),
    "--window-size (4095, 0)": ("--attention-window 4096", ""),
    "--pad-vocab-size-to 250880": ("--vocab-size 250880", "--pad-vocab-size-to 250880: is --vocab-size 250880"),
    "--padded-vocab-size 512": ("--vocab-size 512", "--padded-vocab-size 512: is --vocab-size 512"),
    "--padded-vocab-size 512 --vocab-size 500": ("--vocab-size 500", ""),
    "--context-parallel-size 1 --expert-model-parallel-size 1 --main-grads-dtype fp32": ("", ""),
    "--num-workers 4 --use-flash-attn --override-opt_param-scheduler --no-load-rng --apply-layernorm-1p": ("--apply-layernorm-1p", ""),
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 8 --yarn-original-max-position-embeddings 4096": (
        "--position-embedding-type rope --use-rope-scaling --rope-scaling-type yarn --rope-scaling-factor 8 --rope-original-length 4096",
        "--position-embedding-type yarn: is rope with a yarn --rope-scaling-type"),
    "--rotary-seq-len-interpolation-factor 4": ("--use-rope-scaling --rope-scaling-type linear --rope-scaling-factor 4", "is a linear"),
    "--window-attn-skip-freq ([1]*5+[0])*3 --no-rope-freq 4": ("--window-attn-skip-freq ([1]*5+[0])*3 --no-rope-freq 4", ""),
    "--input-embeddings-multiplier 3 --logits-soft-cap 30": ("--embedding-multiplier 3 --final-logit-softcapping 30", "is --embedding-multiplier"),
    "--tp-comm-overlap-rs-dgrad --wandb-project a --profile-ranks 0 8": ("", ""),
    "--lr 1e-3 --seed -3": ("--lr 1e-3 --seed -3", ""),
}


@pytest.mark.parametrize("there", SAID)
def test_a_word_becomes_ours(there: str) -> None:
    here, told = SAID[there]
    found = in_our_words(there.split())
    assert found.argv == here.split() and not found.missing
    assert not told or any(told in sentence for sentence in found.renamed), found.renamed


def test_what_has_no_effect_is_told_in_one_line_with_its_reason() -> None:
    found = in_our_words("--use-flash-attn --num-workers 2 --sequence-parallel --attention-backend auto --lr 1".split())
    assert found.notes() == ["no effect   always so here: --use-flash-attn --sequence-parallel; nothing to configure here: --num-workers 2; "
                             "a choice of kernels, which are torch's here: --attention-backend auto"]


def test_a_capability_that_is_not_here_is_refused_once_by_name() -> None:
    words = "--num-experts 8 --moe-router-topk 2 --context-parallel-size 2 --optimizer shampoo --shampoo-beta2 0.9 --position-embedding-type alibi"
    with pytest.raises(UserError) as error:
        from_command_line(words.split())
    assert [s.split(":")[0] for s in error.value.sentences] == [
        "--num-experts 8 --moe-router-topk 2", "--context-parallel-size 2", "--optimizer shampoo --shampoo-beta2 0.9", "--position-embedding-type alibi"]
    assert "mixture of experts is not here yet" in error.value.sentences[0]


def test_layers_of_a_virtual_stage_must_divide_those_of_a_stage() -> None:
    with pytest.raises(UserError, match=r"--num-layers-per-virtual-pipeline-stage 3: must divide the layers of a stage \(--num-layers 8 over --pp 2\)"):
        from_command_line("--num-layers 8 --pp 2 --num-layers-per-virtual-pipeline-stage 3".split())


@pytest.mark.parametrize("words, told", {
    "--add-qkv-bias": "--add-qkv-bias: has no effect without --disable-bias-linear.",
    "--use-rope-scaling": "--use-rope-scaling: has no effect without --position-embedding-type rope.",
    "--max-position-embeddings 99 --position-embedding-type rope":
        "--max-position-embeddings 99: has no effect without --position-embedding-type learned_absolute.",
    "--loss-scale 8": "--loss-scale 8.0: has no effect without --fp16.",
    "--save-interval 5": "--save-interval 5: has no effect without --save.",
    "--finetune": "--finetune: has no effect without --load.",
    "--sgd-momentum 0.5": "--sgd-momentum 0.5: has no effect without --optimizer sgd.",
    "--rotary-base 5e5": "--rotary-base 500000.0: has no effect without --position-embedding-type rope.",
    "--merge-file zz": "--merge-file zz: has no effect without --tokenizer-type.",
    "--hysteresis 3 --bf16": "--hysteresis 3: has no effect without --fp16 and a dynamic loss scale.",
    "--split 9,1": "--split 9,1: has no effect without --data-path.",
    "--data-path a b": "--data-path a b: has no effect without data of its own, for --mock-data is given.",
    "--no-overlap-param-gather": "--no-overlap-param-gather: has no effect without --zero-stage 1, 2 or 3.",
}.items())
def test_what_megatron_takes_without_a_word_is_remarked(words: str, told: str) -> None:
    assert told in remarks(from_command_line(f"{TINY} {words}".split()))


def test_a_configuration_of_deepspeed_says_what_no_flag_says(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    c = from_command_line(f"{TINY} --deepspeed --deepspeed_config {path} --clip-grad 0.25".split())
    assert (c.training.micro_batch_size, c.optimizer.clip_grad, c.parallel.zero_stage, c.dtype) == (2, 0.25, 2, "bf16")
    told = in_our_words(f"--deepspeed_config {path} --clip-grad 0.25 --micro-batch-size 2.0".split()).renamed
    assert told[1:] == [f"--deepspeed_config {path}: --clip-grad 0.25 counts, not its 0.5"]
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        from_command_line(f"{TINY} --deepspeed --deepspeed_config {path}".split())
    with pytest.raises(UserError, match=r"--deepspeed_config no.json: cannot be read; name a file, or leave it out."):
        from_command_line(f"{TINY} --deepspeed --deepspeed_config no.json".split())
    assert "is not on this machine" in in_our_words("--check --deepspeed_config no.json".split()).renamed[0]


@pytest.mark.parametrize("word", ["--compile", "--num-expert", "--deep-speed", "--adam-beta3", "--lr-wsd-warmup-samples", "--no-save-rng"])
def test_no_suggestion_means_something_else(word: str) -> None:
    assert nearest(word, [f"--{flag}" for flag in OURS]) == ""


def test_each_word_stands_in_one_table_and_can_be_reached() -> None:
    """A flag of ours is looked at before the tables."""
    places = [words.split() for table in (WITHOUT, REFUSED) for words in table.values()]
    words = [word for place in places for word in place]
    assert len(words) == len(set(words)) > 400, sorted(w for w in words if words.count(w) > 1)
    exact = {w for w in words if not w.endswith("*")}
    assert not exact & OURS and not exact & set(RENAMED) and not exact & set(SPECIAL) and not set(RENAMED) & OURS
    reached = [w for w in exact for start in words if start.endswith("*") and w.startswith(start[:-1])]
    assert not [w for w in PLAIN if w in OURS]
    assert not set(reached) & set(RENAMED)
    assert set(VALUES) - OURS == {"data-parallel-sharding-strategy"}


def test_every_word_of_megatron_and_its_kin_is_known() -> None:
    """Those of Megatron-LM at the end of 2025, and what Megatron-DeepSpeed, BigScience, BigCode, Pai, MindSpeed and Apertus added."""
    both = OURS | {f"no-{word}" for word in OURS}
    words = (Path(__file__).parent / "golden" / "megatron_words.txt").read_text().split()
    assert len(words) > 500
    assert not [w for w in words if f"--{w}" in in_our_words([f"--{w}"]).argv and w not in both]


def test_files_that_say_the_data_in_others_words(tmp_path: Path) -> None:
    def said(train: str, valid: str = "") -> list[str]:
        (tmp_path / "t").write_text(train)
        (tmp_path / "v").write_text(valid)
        flags = f"--train-weighted-split-paths-path {tmp_path / 't'}" + (f" --valid-weighted-split-paths-path {tmp_path / 'v'}" if valid else "")
        told = in_our_words(flags.split())
        return told.argv or [*told.missing]

    assert said('"train: 0.3 0:0.95 a, 0.7 0:0.95 b"', '"valid: 0.3 0.95:1 a, 0.7 0.95:1 b"') == "--data-path 0.3 a 0.7 b --split 950,50,0".split()
    assert said("TRAIN: 1 0:1 a", "V1: 1 0:1 b\nV2: 2 0:1 c") == "--train-data-path 1 a --valid-data-path 1 b 2 c".split()
    assert said("TRAIN: 1 0:0.9 a, 1 0:0.8 b") == ["each dataset is cut elsewhere, where --split cuts all alike; cut them before"]
    assert said("TRAIN: a b") == ["is not lines such as `TRAIN: 0.3 0:0.95 PREFIX, ...`"]
    assert in_our_words("--check --train-weighted-split-paths-path no".split()).argv == "--check --data-args-path no".split()
    (tmp_path / "t").write_text('{"train": ["0.5", "a", "0.5", "b"], "valid": ["c"], "test": null}')
    assert in_our_words(["--per-split-data-args-path", str(tmp_path / "t")]).argv == "--train-data-path 0.5 a 0.5 b --valid-data-path c".split()


@pytest.mark.parametrize("words, dropout, activation, lag, order, scale", [
    ("--tokenizer-type ByteTokenizer --data-path x --lr-warmup-iters 2", 0.1, "gelu_tanh", True, "megatron", 2.0**16),
    ("--mock-data --fp16 --hidden-dropout 0", 0.1, "gelu_tanh", False, "keyed", 2.0**32),
    ("--mock-data --swiglu --disable-bias-linear", 0.1, "swiglu", False, "keyed", 2.0**16),
    ("--mock-data --disable-bias-linear --attention-dropout 0", 0.0, "gelu", False, "keyed", 2.0**16),
    ("--mock-data --no-bias-gelu-fusion", 0.1, "gelu", False, "keyed", 2.0**16),
])
def test_megatrons_defaults(words: str, dropout: float, activation: str, lag: bool, order: str, scale: float) -> None:
    c = from_command_line(f"{TINY} --megatron-defaults {words}".replace(" --mock-data", "", 1).split())
    assert (c.model.attention_dropout, c.optimizer.lr_warmup_from_init, c.data.sample_order) == (dropout, lag, order)
    assert architecture(c, 101).activation == activation and c.precision.initial_loss_scale == scale
    assert c.model.hidden_dropout == (0.0 if "hidden" in words else 0.1)
    assert c.model.add_norm_bias == ("--disable-bias-linear" in words)          # its norms are no linear layers


def test_the_plan_says_where_megatron_would_differ() -> None:
    told = describe(resolved(f"{TINY} --lr-warmup-iters 2 --attention-dropout 0.2"))
    assert "dropout     0 on embeddings and blocks, 0.2 on attention" in told and "ffn 256 exact GELU" in told
    assert told.splitlines()[-1] == ("Megatron-LM by default has --hidden-dropout 0.1 --openai-gelu --lr-warmup-from-init (--megatron-defaults takes what is "
                                     "not said); would count 27 ids of padding in the softmax")
    same = describe(resolved(f"{TINY} --megatron-defaults --lr-warmup-iters 2".replace("--vocab-size 101", "--vocab-size 128")))
    assert "Megatron-LM" not in same


def test_warm_up_of_megatron_counts_the_steps_before() -> None:
    plan = resolved(f"{TINY} --lr-warmup-iters 2 --lr-warmup-init 1e-3 --lr-warmup-from-init --lr-decay-style constant")
    assert [plan.curve.rate(k) for k in range(3)] == pytest.approx([1e-3, 5.5e-3, 1e-2])


def test_the_final_part_of_wsd_may_be_said_in_samples() -> None:
    c = from_command_line(f"{TINY} --global-batch-size 4 --lr-decay-style WSD --lr-wsd-decay-samples 9 --train-iters 10".split())
    assert sizes(c, 1).final_iters == 2 and not checks(c, 1)
    long = from_command_line(f"{TINY} --global-batch-size 4 --lr-decay-style WSD --lr-wsd-decay-samples 41 --train-iters 10".split())
    assert checks(long, 1) == ["--lr-wsd-decay-samples 41: is longer than the whole curve of 10 steps; write at most 40."]


# public launch scripts: flags (kept, renamed, without effect, missing), what is missing by the first flag that asks for it, and what must be added to plan it here
SCRIPTS = {
    "bigcode_starcoder-7b": ((29, 7, 6, 0), [], "--vocab-size 49152"),
    "bigscience_bloom-176b": ((34, 8, 14, 2), ["--embed-layernorm", "--position-embedding-type alibi"], ""),
    "bigscience_tr1-13b": ((37, 4, 9, 0), [], ""),
    "mds_gpt3-175b": ((31, 3, 0, 0), [], ""),
    "mds_llama2": ((37, 5, 9, 0), [], "--vocab-size 32000"),
    "megatron_gpt3-175b": ((31, 2, 1, 0), [], ""),
    "megatron_llama3-8b_fp8": ((51, 2, 20, 4), ["--fp8-format"], ""),
    "megatron_mixtral-8x7b": ((42, 2, 8, 7), ["--num-experts"], ""),
    "pai_llama2-70b": ((51, 7, 20, 5), ["--cpu-offloading", "--fp8-format"], ""),
    "slime_qwen3-4b_sft": ((17, 0, 10, 2), ["--use-dynamic-batch-size"], ""),
    "swiss-ai_apertus-8b": ((59, 3, 22, 4), ["--xielu", "--goldfish-loss"], ""),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_launch_scripts_are_planned_or_name_what_is_not_here(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "data" / "launch" / f"{name}.argv"
    if not path.exists():
        pytest.skip("needs the flags of public launch scripts beside the checkout")
    counts, capabilities, more = SCRIPTS[name]
    said = [line.split(" ", 1) for line in path.read_text().splitlines() if line]
    # a placeholder with blanks is one word of a shell; behind some flags stands a comment of the script
    words = [word for flag, *values in said
             for word in (flag, *(values if any("<" in v for v in values) else [w for v in values for w in v.split("#")[0].split()]))]
    words = [word for word in words if word not in "when cpu offloading is on...".split()]
    found = in_our_words([*words, "--check"])
    amounts = len(found.renamed), sum(map(len, found.without.values())), sum(map(len, found.missing.values()))
    assert (len(said) - sum(amounts), *amounts) == counts
    if capabilities:
        with pytest.raises(UserError) as error:
            from_command_line([*words, "--check"])
        assert len(error.value.sentences) == len(capabilities)
        assert all(any(c in s.split(":")[0] for c in capabilities) for s in error.value.sentences)
        return
    if more:
        with pytest.raises(UserError, match="^--vocab-size is missing: the file of --tokenizer-type [A-Za-z]* is not on this machine"):
            main(from_command_line([*words, "--check"]))
    main(from_command_line([*words, "--check", *more.split()]))
    told = capsys.readouterr().out
    assert "\nranks " in told and "\nnot here " in told
