#!/usr/bin/env bash
# From nothing to a trained, resumed, exported and sampled GPT, on a machine with Python 3.10 or later and nothing else.
#   bash examples/quickstart.sh           makes .venv, installs into it, and works in ./quickstart
#   bash examples/quickstart.sh --here    uses the Python that is active, with megazero installed already
# Reads only what the machine has: the text is the Python standard library's own source. Nothing is downloaded but by pip.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

if [ "${1:-}" = --here ]; then
    python=python
else
    [ -x .venv/bin/python ] || { say "Making .venv"; python3 -m venv .venv; }
    say "Installing (torch takes a minute or two)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot]'
    python=.venv/bin/python
fi
began=$SECONDS
out=quickstart
rm -rf "$out"
mkdir -p "$out"

library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
text=("$library"/*.py)
for package in asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib xml; do
    text+=("$library/$package")
done

say "1/7  A tokenizer of our own: byte-level BPE, 2,048 ids"
"$python" tools/train_tokenizer.py --input "${text[@]}" --vocab-size 2048 --output "$out/tokenizer"

say "2/7  Text to tokens, in Megatron's .bin/.idx format"
"$python" tools/preprocess_data.py --input "${text[@]}" --output-prefix "$out/python" --append-eod \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer" --workers 2

ranks=2 first="--tp 2" second="--dp 2 --zero-stage 1 --micro-batch-size 4"
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
    say "One GPU: NCCL refuses two ranks on a device, so one process trains, and what changes when it resumes is the ZeRO level"
    ranks=1 first="" second="--zero-stage 1"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$python" -c "import os; print(max((os.cpu_count() or 1) // $ranks, 1))")}

train() {
    "$python" -m torch.distributed.run --standalone --nproc_per_node "$ranks" pretrain_gpt.py --config examples/quickstart.toml --data-path "$out/python_text_document" --tokenizer-model "$out/tokenizer" \
        --save "$out/checkpoints" --load "$out/checkpoints" --log-dir "$out/log" "$@"
}
say "3/7  Training a small Llama on $ranks process(es) ($first), stopped on purpose at step 200"
train $first --exit-interval 200

say "4/7  Again, in another layout ($second): it resumes, and the curve is the one of a run that never stopped"
train $second

say "5/7  Checking every byte of the checkpoint, merging it into one file, and exporting it to the Hugging Face format"
"$python" tools/checkpoint.py verify --load "$out/checkpoints"
"$python" tools/checkpoint.py merge --load "$out/checkpoints" --output "$out/merged"
"$python" tools/convert_hf.py export --load "$out/checkpoints" --output "$out/hf"

say "6/7  What it writes after 'def '"
"$python" tools/generate.py --load "$out/checkpoints" --prompt 'def ' --max-new-tokens 96 --temperature 0.7 --top-k 40 --seed 1 | tee "$out/sample.txt"

say "7/7  The loss curve"
"$python" tools/plot_loss.py --log-dir "$out/log" --output "$out/loss.png"

say "Done in $((SECONDS - began)) s. In ./$out:"
cat <<END
  tokenizer/            a byte-level BPE tokenizer             --tokenizer-type HuggingFaceTokenizer --tokenizer-model $out/tokenizer
  python_text_document  the standard library as tokens         .bin and .idx as Megatron-LM writes them
  checkpoints/          weights, optimizer, position           python tools/checkpoint.py inspect --load $out/checkpoints
  merged/               its weights in one file                any tool's --load
  hf/                   the model for transformers             AutoModelForCausalLM.from_pretrained("$out/hf")
  log/metrics.jsonl     every step, exact                      tensorboard --logdir $out/log/tensorboard
  loss.png              the curve
Next: change a number in examples/quickstart.toml and run it again, or read docs/design.md.
END
