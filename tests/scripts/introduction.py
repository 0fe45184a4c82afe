"""DeepSpeed's introduction as it stands, but for the model: its own flags beside the script's, and the four values of initialize."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from transformers import OPTConfig, OPTForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--fp16", action="store_true")
parser.add_argument("--facts")
parser.add_argument("--steps", type=int, default=4)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
torch.manual_seed(1)
model = OPTForCausalLM(OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
                                 word_embed_proj_dim=16, dropout=0.0))
model_engine, optimizer, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
assert model_engine.fp16_enabled() == args.fp16 and isinstance(model_engine, deepspeed.DeepSpeedEngine)
losses = []
for step in range(args.steps):
    samples = torch.randint(32, (model_engine.train_batch_size(), 8), generator=torch.Generator().manual_seed(step))
    micro = samples.chunk(model_engine.gradient_accumulation_steps() * deepspeed.comm.get_world_size())
    sums = []
    for batch in micro[deepspeed.comm.get_rank()::deepspeed.comm.get_world_size()]:
        loss = model_engine(input_ids=batch, labels=batch).loss
        model_engine.backward(loss)
        model_engine.step()
        sums.append(loss.item())
    losses.append(sum(sums) / len(sums))
if args.facts:
    facts = {"losses": losses, "local_rank": args.local_rank, "steps": model_engine.global_steps, "skipped": model_engine.skipped_steps,
             "stage": model_engine.zero_optimization_stage(), "world": deepspeed.comm.get_world_size()}
    Path(f"{args.facts}.{deepspeed.comm.get_rank()}.json").write_text(json.dumps(facts))
