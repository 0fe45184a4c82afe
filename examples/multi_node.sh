#!/usr/bin/env bash
# One run over several nodes without a scheduler. On each node, with its own NODE_RANK and the address of node 0:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/multi_node.sh --config examples/llama-7b.toml --dp 8
# RANKS_PER_NODE is the number of GPUs unless it is given; MASTER_PORT is 29500. The words after the script are pretrain_gpt.py's.
# All nodes must see the same code, data and checkpoint folder.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?how many nodes there are}" "${NODE_RANK:?the number of this node, from 0}" "${MASTER_ADDR:?the address of node 0}"
ranks=${RANKS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$ranks" = 0 ]; then echo "RANKS_PER_NODE: this node has no GPU; say how many processes to start" >&2; exit 2; fi
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$ranks" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" pretrain_gpt.py "$@"
