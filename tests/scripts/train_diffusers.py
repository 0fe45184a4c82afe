"""The loop of diffusers' training scripts, on tiny models: it knows nothing of MegaZero. What it saw goes to a JSON file."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, set_seed
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.optimization import get_scheduler
from torch import Tensor


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 28                                               # on two ranks seven micro-batches: steps of two, two, two and one

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
        return {"image": (x * (1 + i % 7)).sin(), "noise": (x * (3 + i)).cos(), "time": i * 37 % 1000, "kind": i % 4}


def built(kind: str) -> torch.nn.Module:
    set_seed(5)
    if kind == "unet":
        return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                           down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8, patch_size=2,
                                 norm_num_groups=4, num_embeds_ada_norm=4)


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--facts", "--save", "--resume", "--export"):
        parser.add_argument(flag)
    parser.add_argument("--kind", default="unet")
    parser.add_argument("--stage", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--config")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    plugin = (DeepSpeedPlugin(hf_ds_config=args.config, zero_stage=args.stage, gradient_accumulation_steps=2, gradient_clipping=1.0)
              if args.stage is not None else None)
    accelerator = Accelerator(gradient_accumulation_steps=2, deepspeed_plugin=plugin, cpu=args.cpu)
    from diffusers.training_utils import EMAModel  # at stage 3 it must be imported when there is an Accelerator
    model = built(args.kind)
    teacher = built(args.kind).requires_grad_(False).to(accelerator.device).eval()              # one more model, that nobody prepares
    noisy = DDPMScheduler(num_train_timesteps=1000)
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=type(model), model_config=model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=2 * accelerator.num_processes, num_training_steps=12 * accelerator.num_processes)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema.to(accelerator.device)
    if args.resume:
        accelerator.load_state(args.resume)
    losses, norms, rates, seen = [], [], [], []
    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            if args.resume and epoch == 0:
                continue                                                                         # it was seen before the checkpoint
            seen += batch["time"].tolist()
            with accelerator.accumulate(model):
                x = noisy.add_noise(batch["image"], batch["noise"], batch["time"])
                words = {"class_labels": batch["kind"]} if args.kind == "dit" else {}
                found = model(x, batch["time"], **words, return_dict=False)[0]
                with torch.no_grad():
                    like = teacher(x, batch["time"], **words, return_dict=False)[0]
                loss = F.mse_loss(found.float(), batch["noise"].float()) + 0.1 * F.mse_loss(found.float(), like.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    norms.append(float(norm))
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
            losses.append(accelerator.gather(loss.detach()).mean().item())
            rates.append(rate.get_last_lr()[0])
        if args.save and epoch == 0:
            accelerator.save_state(args.save)
    average = [float(p.double().norm()) for p in ema.shadow_params]
    engine = accelerator.deepspeed_engine_wrapped.engine if plugin else None
    bare = accelerator.unwrap_model(model)
    state: dict[str, Tensor] | None = accelerator.get_state_dict(model)
    if args.export and accelerator.is_main_process:
        bare.save_pretrained(args.export, state_dict=state)
    facts = {"losses": losses, "norms": norms, "rates": rates, "seen": seen, "average": average, "type": str(accelerator.distributed_type),
             "processes": accelerator.num_processes, "steps": engine and engine.global_steps, "bare": type(bare).__name__,
             "weights": {name: float(t.double().norm()) for name, t in (state or {}).items()}}
    Path(f"{args.facts}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
