"""Launches of other programs as files of this one's words: tools/from_megatron.py, from_deepspeed.py, from_torchtitan.py."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import tool

from megazero.plan import checks
from megazero.settings import from_command_line, from_configuration, launch_of, of_preprocessing

SCRIPT = r'''#!/bin/bash
# Runs a model of 175B
GPUS_PER_NODE=8
NUM_NODES=16
CHECKPOINT_PATH=$1 #<a folder>
VOCAB_FILE=${2:-vocab.json}
export DATA="web_text_document"
MODEL_ARGS=(
    --num-layers 96
    --hidden-size 12288   # wide
    # --num-layers 1
    --num-attention-heads 96
    --seq-length 2048
    --use-flash-attn
)
if [ "$MOE" = 1 ]; then
    MODEL_ARGS+=(--num-experts 8)
fi
TRAINING="
    --micro-batch-size 1 --global-batch-size 1536
    --train-iters 500 --lr 6.0e-5 --bf16 "
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes=$NUM_NODES pretrain_gpt.py \
    ${MODEL_ARGS[@]} $TRAINING \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size $PP --tensorboard-dir "${CHECKPOINT_PATH}/logs" \
    --vocab-file $VOCAB_FILE --merge-file merges.txt --data-path 0.5 $DATA 0.5 other --split 9,1,0 2>&1 | tee log.txt
'''


def words_of_script(text: str) -> tuple[list[str], list[str]]:
    launch = launch_of(text)
    return launch.words, launch.launcher


def test_a_script_is_read_and_not_run(tmp_path: Path) -> None:
    words, launcher = words_of_script(SCRIPT + f"\ntouch {tmp_path}/made\n")
    assert words[:10] == "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --use-flash-attn --num-experts".split()
    assert words[-7:] == "--data-path 0.5 web_text_document 0.5 other --split 9,1,0".split()[-7:]
    assert "vocab.json" in words and "$1/logs" in words and "$PP" in words and launcher[:3] == ["torchrun", "--nproc_per_node", "8"]
    assert not list(tmp_path.iterdir())
    assert words_of_script('CMD="torchrun pretrain_gpt.py --lr 1 --bf16"\neval $CMD\n')[0] == ["--lr", "1", "--bf16"]
    assert words_of_script("srun bash -c 'python -u pretrain_gpt.py --lr 1'\n")[0] == ["--lr", "1"]
    with pytest.raises(ValueError, match="starts no program"):
        words_of_script("echo hello")


def test_from_megatron_reports_and_writes_a_file_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.sh").write_text(SCRIPT)
    code, told, _ = tool(monkeypatch, capsys, "from_megatron.py", "launch.sh")
    assert code == 0
    lines = dict.fromkeys(told.splitlines())
    assert "kept        15 of 18 flags" in lines and "no effect   always so here: --use-flash-attn" in lines
    assert any(line.startswith("missing     --num-experts 8: mixture of experts is not here yet") for line in lines)
    assert "fill in     --pipeline-model-parallel-size $PP" in lines and "fill in     --log-dir $1/logs" in lines
    assert "needs       128 ranks, for 1536 samples a step" in lines and "needs       files: vocab.json merges.txt" in lines
    assert "needs       data: web_text_document other (Megatron's .bin and .idx are read as they are)" in lines
    text = (tmp_path / "run.toml").read_text()
    assert text.startswith("# missing: --num-experts 8: ") and "# fill in: --pipeline-model-parallel-size $PP\n" in text
    c = from_command_line(["--config", "run.toml", "--pp", "16"])
    assert (c.model.num_layers, c.training.global_batch_size, c.optimizer.lr, c.dtype, c.model.hidden_dropout) == (96, 1536, 6e-5, "bf16", 0.1)
    assert c.data.data_path == ("0.5", "web_text_document", "0.5", "other") and c.data.sample_order == "megatron" and not checks(c, 128)
    code, told, _ = tool(monkeypatch, capsys, "from_megatron.py", "--output", "b.toml", "--", "--num-layers", "2", "--lr", "1e-3", "--mock-data")
    assert code == 0 and "num_layers = 2" in (tmp_path / "b.toml").read_text()
    assert tool(monkeypatch, capsys, "from_megatron.py")[0] == 2 and tool(monkeypatch, capsys, "from_megatron.py", "no.sh")[0] == 2
    (tmp_path / "wrong.sh").write_text("python pretrain_gpt.py --lr fast")
    code, _, error = tool(monkeypatch, capsys, "from_megatron.py", "wrong.sh", "--output", "c.toml")
    assert code == 2 and "--lr fast: must be a number." in error and not (tmp_path / "c.toml").exists()


def test_from_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({
        "train_batch_size": 32, "gradient_clipping": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 100}}, "fp16": {"loss_scale": 0}}))
    code, told, error = tool(monkeypatch, capsys, "from_deepspeed.py", "ds.json")
    assert code == 0, error
    assert "not in it   gradient_clipping, zero_optimization.overlap_comm, fp16.loss_scale: for megazero.initialize" in told
    c = from_command_line(["--config", "run.toml"])
    assert (c.training.global_batch_size, c.parallel.zero_stage, c.dtype, c.optimizer.lr, c.optimizer.adam_beta1, c.optimizer.adam_beta2,
            c.optimizer.lr_decay_style, c.optimizer.lr_warmup_iters, c.training.train_iters) == (32, 2, "bf16", 3e-4, 0.8, 0.95, "cosine", 100, 1000)
    (tmp_path / "ds.json").write_text("[1]")
    assert tool(monkeypatch, capsys, "from_deepspeed.py", "ds.json")[0] == 2


def test_from_torchtitan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.toml").write_text(
        '[model]\nname = "llama3"\nflavor = "8B"\n[optimizer]\nlr = 3e-4\n[lr_scheduler]\nwarmup_steps = 20\ndecay_ratio = 0.8\nmin_lr_factor = 0.1\n'
        '[training]\nlocal_batch_size = 2\nseq_len = 8192\nsteps = 1000\n[parallelism]\ntensor_parallel_degree = 2\npipeline_parallel_degree = 2\n'
        'pipeline_parallel_schedule = "Interleaved1F1B"\ncontext_parallel_degree = 2\n[checkpoint]\nenable = true\ninterval = 500\n[odd]\nthing = 1\n')
    code, told, error = tool(monkeypatch, capsys, "from_torchtitan.py", "t.toml")
    assert code == 0, error
    assert "not known   odd.thing" in told and "missing     --context-parallel-size 2: context parallelism is not here yet" in told
    c = from_command_line(["--config", "run.toml"])
    assert (c.model.ffn_hidden_size, c.model.num_query_groups, c.data.vocab_size, c.parallel.zero_stage, c.dtype) == (14336, 8, 128256, 3, "bf16")
    assert (c.optimizer.lr_decay_style, c.optimizer.lr_wsd_decay_iters, c.optimizer.min_lr, c.optimizer.weight_decay) == ("WSD", 800, 3e-5, 0.1)
    assert c.parallel.pipeline_schedule == "interleaved" and c.checkpoint.save == "outputs/checkpoint"


@pytest.mark.parametrize("script, words", {
    "TP=4; PP=2 ; H=$3\npython pretrain_gpt.py --tp $TP --pp ${PP} --hidden-size $H": "--tp 4 --pp 2 --hidden-size $3",
    "H=1024 && F=$((H * 4))\nA=(\n  --ffn-hidden-size $(( $H * 8 / 3 ))\n  --heads ${N:-$((F/256))}   # (flash; or not)\n)\npython pretrain_gpt.py ${A[@]} --x $((F % 1000))":
        "--ffn-hidden-size 2730 --heads 16 --x 96",
    "W=$((GPUS*2))\npython pretrain_gpt.py --x $W --y $((1/0)) --z 'a;b && c'": "--x $((GPUS*2)) --y $((1/0)) --z a;b && c",
    'sudo -E python pretrain_gpt.py --name "what to do then" --lr 1': "--name what to do then --lr 1",
    'if [ "$1" = x ]; then A+=(--moe); else A+=(--dense); fi\npython pretrain_gpt.py "${A[@]}" | tee log': "--moe",
    "cd /x && torchrun --nproc_per_node 8 pretrain_gpt.py --a \"b # c\" # d; e": "--a b # c",
}.items())
def test_a_line_may_hold_several_commands_and_sums(script: str, words: str) -> None:
    assert " ".join(words_of_script(script)[0]) == words


@pytest.mark.parametrize("kind, params, flags", [
    ("AdamW", {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}, "--adam-beta1 0.9 --adam-beta2 0.95 --lr 0.001 --adam-eps 1e-08 --optimizer adam"),
    ("Lion", {"lr": 1e-4, "betas": [0.8, 0.7]}, "--lion-beta1 0.8 --lion-beta2 0.7 --lr 0.0001 --optimizer lion"),
    ("SGD", {"lr": 1e-2, "momentum": 0.5}, "--lr 0.01 --sgd-momentum 0.5 --optimizer sgd"),
    ("Muon", {"lr": 1e-2, "muon_lr": 2e-2, "adam_lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
     "--muon-momentum 0.9 --lr 0.02 --lr-embedding 0.001 --lr-vectors 0.001 --weight-decay 0.1 --optimizer muon --muon-nesterov --muon-coefficient-type simple "
     "--muon-scale-mode shape_scaling"),
    ("Adafactor", {"lr": 1e-2, "beta2_decay": -0.7, "d": 2}, "--adafactor-decay -0.7 --adafactor-clip 2 --lr 0.01 --optimizer adafactor")])
def test_each_rule_of_deepspeed_has_its_own_words(kind: str, params: dict[str, Any], flags: str) -> None:
    found, rest = from_configuration({"optimizer": {"type": kind, "params": params}})
    assert " ".join(found) == flags and not rest


def test_deepspeeds_warm_up_is_logarithmic_unless_it_says_linear() -> None:
    for kind, params, told in (("WarmupLR", {}, True), ("WarmupDecayLR", {"warmup_type": "log"}, True), ("WarmupLR", {"warmup_type": "linear"}, False),
                               ("WarmupCosineLR", {}, False)):
        rest = from_configuration({"scheduler": {"type": kind, "params": params}})[1]
        assert any("scheduler.params.warmup_type" in key for key in rest) == told, (kind, rest)


def test_numbers_of_deepspeed_keep_their_digits_and_auto_is_listed() -> None:
    found, rest = from_configuration({"gradient_clipping": 0.123456789, "optimizer": {"type": "AdamW", "params": {"lr": 0.000123456789, "betas": "auto"}}})
    assert found == ["--clip-grad", "0.123456789", "--lr", "0.000123456789", "--optimizer", "adam"] and rest == ["optimizer.params.betas"]
    assert from_configuration({"optimizer": {"params": {"betas": [0.9, 0.95123456789]}}})[0] == ["--adam-beta1", "0.9", "--adam-beta2", "0.95123456789"]


# what bash itself gives the program is what we read
KNOWN = [
    'SIZE=7b\nif [ "$SIZE" = 7b ]; then HS=64; LR=3e-4\nelse HS=128; LR=1e-4; fi\npython pretrain_gpt.py --hidden-size $HS --lr $LR',
    'SIZE=13b\nif [[ $SIZE == 7b ]]; then\n  HS=64\nelif [[ $SIZE == 13* && -n "$SIZE" ]]; then\n  HS=128\nelse\n  HS=256\nfi\npython pretrain_gpt.py --h $HS',
    'case "medium" in\n small) L=2;;\n medium|large)\n  L=4\n  H=8 ;;\n *) L=9;;\nesac\npython pretrain_gpt.py --l $L --h $H',
    'M=x; case $M in a) L=1;; b) L=2;; *) L=3;; esac; python pretrain_gpt.py --l $L',
    'A=(--a 1)\nfalse && A+=(--b 2)\ntrue && A+=(--c "3 4")\n[ 2 -gt 3 ] || A+=(--d)\n! [ -z "" ] || A+=(--e)\npython pretrain_gpt.py "${A[@]}"',
    'MOE=${MOE:-false}\nARGS="--x 1"\nif [ $MOE = true ]; then\n  ARGS="$ARGS --moe"\n  if [ 1 = 1 ]; then ARGS+=" --y"; fi\nfi\nARGS+=" --z"\npython pretrain_gpt.py $ARGS',
    'N=4; (( N > 2 )) && TP=2\nif (( N % 3 == 0 )); then PP=3; else PP=1; fi\npython pretrain_gpt.py --tp $TP --pp $PP',
    'export A=1 B=2\nC=3 D=4\nCUDA_DEVICE_MAX_CONNECTIONS=1 python pretrain_gpt.py --a $A --b $B --c $C --d $D',
    'DIR=/a; DIR+=/b; N="x#1"\npython pretrain_gpt.py --save ${DIR}/c --name $N # no',
    'A=1\nif [ "$A" -ne 1 -o "$A" -lt 2 ]; then B=1; else B=2; fi\nif test $A = 1 &&\n   [ $B = 1 ]\nthen\n  C=3\nfi\npython pretrain_gpt.py --b $B --c $C',
    "cat <<EOT > /dev/null\nit isn't (here\nEOT\npython pretrain_gpt.py --x 1",
    'run() {\n  python pretrain_gpt.py --x "$V" --y \\\n --z\n}\nV="1 2"\nfunction other {\n  V=3\n}\nfor i in 1; do V="1 2"; done\npython pretrain_gpt.py --x "$V"',
    'add() { ARGS+=("$@"); }; add --swiglu\nadd --bf16 --lr "1 2"\nrun() { if [ "$1" = a ]; then\n  python pretrain_gpt.py "$2" "${ARGS[@]}"\nfi\n}\nrun b --no; run a --yes',
    'L=""\nL=${L:-6}; unset K; K=${K-7}\nCMD="pretrain_gpt.py --l $L"\necho $CMD > /dev/null\nset_it() {\n  case "$1" in\n    big) H=8;;\n    *) H=4;;\n  esac\n}\n'
    'set_it big\npython $CMD --h $H --k $K',
    'N=73_242_187; P=/a/b.c/d_text_document.bin; A=(--x 1 "2 3")\npython pretrain_gpt.py --n ${N//_/} --m ${N/_/} --p ${P%.bin} --q ${P%%.*} --r "${P##*/}" --s ${P#/*/} '
    '--t ${A[1]} "${A[2]}" --u ${N%_*}x --v ${P^^} --w ${P//b*d/Z} --z ${N%q}',
    'if [ a = b ]; then\n  if [ "$V" = 7 ]; then W=1; fi\n  for U in 8 9; do W=2; done\nfi\npython pretrain_gpt.py --v ${V:-1} --u ${U:-2} --w ${W:-3}',
    'if [ a = b ]; then\n  python pretrain_gpt.py --no\nelse\n  python pretrain_gpt.py --yes\nfi',
]


@pytest.mark.parametrize("script", KNOWN)
def test_a_script_gives_the_words_that_bash_gives(script: str) -> None:
    told = subprocess.run(["bash", "-c", "python() { printf '%s\\n' \"$@\"; }\n" + script], capture_output=True, text=True, check=True)
    launch = launch_of(script)
    assert launch.words == told.stdout.splitlines()[1:] and not launch.doubts and launch.programs == 1


@pytest.mark.parametrize("script, words, doubts", [
    ('case $X in\n a) ARGS+=(--bf16);;\nesac\npython pretrain_gpt.py --lr 1 ${ARGS[@]}', "--lr 1 --bf16", {"ARGS": "$X is a"}),
    ('if [ -f a.txt ]; then A=1; B=2; else A=3; B=2; fi\nW=$A\npython pretrain_gpt.py --lr $W --x $B', "--lr 1 --x 2",
     {"A": "[ -f a.txt ]", "B": "[ -f a.txt ]"}),
    ('if [ -z "$PORT" ]; then PORT=1; fi\npython pretrain_gpt.py --lr 1', "--lr 1", {}),
    ('L=1\n[ "$1" = big ] && L=9\nif [ $L = 9 ]; then H=8; else H=4; fi\npython pretrain_gpt.py --l $L --h $H', "--l 9 --h 8",
     {"L": '[ "$1" = big ]', "H": "[ $L = 9 ]"}),
    ('N=$(nproc --all)\nif [ $N -gt 4 ]; then T=4; else T=1; fi\npython pretrain_gpt.py --w "$N" --t $T', "--w $(nproc --all) --t 4", {"T": "[ $N -gt 4 ]"}),
    ('S=$2\nif [ $S = 7B ]; then H=8; F=9\nelif [ $S = 13B ]; then H=16; F=17\nelse H=1; fi\nif [ $S = 13B ]; then F=1; fi\npython pretrain_gpt.py --h $H --f $F --s $S',
     "--h 8 --f 9 --s 7B", {"H": "[ $S = 7B ]", "F": "[ $S = 7B ]", "$2": "7B, for that is what [ $S = 7B ] asks"}),
    ('case $MODE in\n a|b) L=1;;\n c) L=2; H=3;;\nesac\npython pretrain_gpt.py --l $L --mode $MODE $H', "--l 1 --mode a $H",
     {"L": "$MODE is a|b", "$MODE": "a, for that is what $MODE is a|b asks"}),
    ('for lr in 1e-3 2e-3; do\n  SEED=$((SEED0+1))\n  python pretrain_gpt.py --lr $lr --save run_${lr}_x${host}_y\ndone', "--lr 1e-3 --save run_1e-3_x${host}_y",
     {"$lr": "1e-3, the first that the loop has of 1e-3 2e-3"}),
])
def test_what_only_the_machine_knows_is_in_doubt(script: str, words: str, doubts: dict[str, str]) -> None:
    launch = launch_of(script)
    assert " ".join(launch.words) == words and launch.doubts == doubts


def test_from_megatron_says_what_is_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.sh").write_text('if [ -d /data ]; then B=2; else B=4; fi\npython pretrain_gpt.py --lr 1\n'
                                   'torchrun --nproc_per_node 8 pretrain_gpt.py --micro-batch-size $B --lr 1e-3 $MORE --bf16 $EXTRA --save `pwd`/x\n')
    code, told, error = tool(monkeypatch, capsys, "from_megatron.py", "m.sh")
    lines = told.splitlines()
    assert code == 0, error
    assert "in doubt    [ -d /data ], which only your machine knows, is taken as so: it sets B" in lines
    assert "in doubt    m.sh starts 2 programs; the last one is taken" in lines and "needs       8 ranks" in lines
    assert [line for line in lines if line.startswith("fill in")] == ["fill in     $MORE", "fill in     $EXTRA", "fill in     --save `pwd`/x"]
    assert from_command_line(["--config", "run.toml"]).dtype == "bf16"
    (tmp_path / "c.sh").write_text('S=$1\nLR=${11}\ncat <<EOT > $S.json\n{"train_batch_size": 64, "fp16": {"enabled": true, "initial_scale_power": 11}}\nEOT\n'
                                   'srun bash -c "torchrun pretrain_gpt.py --num-layers $S --deepspeed --deepspeed_config $S.json --lr $LR --use-flash-attn --$EXTRA"\n')
    code, told, error = tool(monkeypatch, capsys, "from_megatron.py", "c.sh", "--", *"4 b c d e f g h i j 1e-3".split())
    c = from_command_line(["--config", "run.toml"])
    assert code == 0 and "fill in     --$EXTRA" in told and "behind --" not in told, error
    code, told, error = tool(monkeypatch, capsys, "from_megatron.py", "c.sh", "--output", "d.toml")
    assert code == 0 and "fill in     what c.sh is called with, behind --: from_megatron.py c.sh -- ARGUMENT ..." in told, error
    (tmp_path / "n.sh").write_text("python nemo_pretraining.py model.num_layers=2")
    assert "n.sh: starts nemo_pretraining.py, whose words are not Megatron-LM's, and no program such as pretrain_gpt.py" in tool(
        monkeypatch, capsys, "from_megatron.py", "n.sh")[2]
    assert (c.model.num_layers, c.training.global_batch_size, c.dtype, c.precision.initial_loss_scale, c.optimizer.lr) == (4, 64, "fp16", 2048, 1e-3)
    (tmp_path / "b.sh").write_text("torchrun pretrain_bert.py --lr 1 --deepspeed --deepspeed_config made.json")
    code, told, error = tool(monkeypatch, capsys, "from_megatron.py", "b.sh")
    assert code == 0 and "b.sh starts pretrain_bert.py: this program trains decoders on text, and no bert;" in told and "missing" not in told


def test_preprocessing_takes_megatrons_words() -> None:
    words = "--input a.jsonl --tokenizer-type GPTSentencePieceTokenizer --vocab v.json --dataset-impl mmap --log-interval=100 --partitions 1 --keep-newlines --append-eod"
    assert of_preprocessing(words.split()) == (
        "--input a.jsonl --tokenizer-type SentencePieceTokenizer --vocab-file v.json --append-eod".split(), "--dataset-impl mmap --log-interval 100 --partitions 1 --keep-newlines".split())
