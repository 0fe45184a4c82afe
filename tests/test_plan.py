"""Sizes that follow from a configuration, against published ones and formulas."""

import pytest
import torch
from support import SHAPES, TINY, built, resolved

from megazero.plan.architecture import parameter_count
from megazero.plan.checks import checks, remarks
from megazero.plan.cost import memory
from megazero.plan.devices import DEVICES, device_of
from megazero.plan.families import FAMILIES
from megazero.plan.operations import flops_per_token
from megazero.plan.plan import Plan, resolve
from megazero.plan.show import describe
from megazero.plan.sizes import ranks_asked, sizes
from megazero.run import metrics
from megazero.settings import config
from megazero.settings.config import PRESETS
from megazero.units.random import key

COMMON = "--lr 1e-4 --mock-data --train-iters 10"


@pytest.mark.parametrize("model, vocabulary, parameters", [
    ("gpt2-124m", 50257, 124_439_808), ("gpt2-medium", 50257, 354_823_168), ("gpt2-large", 50257, 774_030_080),
    ("gpt2-xl", 50257, 1_557_611_200), ("gpt3-175b", 50257, 174_604_259_328), ("llama-1b", 128256, 1_235_814_400),
    ("llama-7b", 32000, 6_738_415_616), ("llama-8b", 128256, 8_030_261_248), ("llama-13b", 32000, 13_015_864_320),
    ("llama-70b", 32000, 68_976_648_192), ("opt-1.3b", 50272, 1_315_758_080), ("pythia-1.4b", 50304, 1_414_647_808),
    ("gemma2-2b", 256000, 2_614_341_888), ("gemma3-1b", 262144, 999_885_952), ("olmo2-7b", 100352, 7_298_617_344), ("smollm3-3b", 128256, 3_075_098_624),
])
def test_presets_have_the_published_number_of_parameters(model: str, vocabulary: int, parameters: int) -> None:
    assert parameter_count(resolved(f"{COMMON} --model {model} --vocab-size {vocabulary}").architecture) == parameters


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_has_a_plan(model: str) -> None:
    told = describe(resolved(f"{COMMON} --model {model} --vocab-size 50257 --bf16"))
    assert "memory" in told and "FLOPs per token" in told


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_memory_of_the_plan_is_what_is_allocated(shape: str, dtype: str) -> None:
    run = built(f"{TINY} {SHAPES[shape]} --dtype {dtype}")
    units, m = run.units.values(), memory(run.plan)
    assert m["weights"] == sum(u.weights.nbytes for u in units)
    assert m["master weights"] == sum(u.master.nbytes for u in units if u.master is not u.weight_slice)
    assert m["gradients"] == sum(u.grads.nbytes for u in units)
    assert m["optimizer"] == sum(own.tensor.nbytes for state in run.updater.state.values() for own in state.values())
    assert parameter_count(run.plan.architecture) == sum(p.shard.box.numel for u in units for p in u.flat.pieces)


def test_flops_are_six_n_plus_attention() -> None:
    a = resolved(f"{COMMON} --model gpt2-124m --vocab-size 50257").architecture
    assert flops_per_token(a) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 6 * 12 * 768 * 1024
    llama = resolved(f"{COMMON} --model llama-70b --vocab-size 32000").architecture
    block = 8192 * 128 * (64 + 8 + 8 + 64) + 3 * 8192 * 28672
    assert flops_per_token(llama) == 6 * (80 * block + 32000 * 8192) + 6 * 80 * 64 * 128 * llama.seq_length


def test_a_window_counts_in_the_layers_that_have_it() -> None:
    """Of 24 tokens in a window of 8 each sees 6.67 on average, of all of them 12: twice that times 64 channels, three passes, one layer."""
    plain, some = (resolved(f"{TINY} {words}").architecture for words in ("", "--attention-window 8 --window-attn-skip-freq 2"))
    assert flops_per_token(plain) - flops_per_token(some) == 3 * (2 * 64 * 24 - round(2 * 64 * (16 - 64 / 24)))


def test_batches_and_lengths() -> None:
    p = resolved(f"{TINY} --micro-batch-size 2 --global-batch-size 6 --train-samples 62 --lr-warmup-samples 12".replace("--train-iters 5", ""))
    assert (p.micro_batches, p.global_batch, p.train_iters, p.tokens_per_step, p.warmup_iters) == (3, 6, 10, 144, 2)


def test_sizes_are_those_of_megatron_and_of_a_run_that_goes_on() -> None:
    words = f"{TINY} --tp 2 --pp 2 --micro-batch-size 2 --zero-stage 1 --lr-warmup-fraction 0.1 --train-samples 1000".replace("--train-iters 5", "")
    c = config.from_command_line(words.split())
    s = sizes(c, 12)
    assert (s.tp, s.pp, s.dp, s.shard, s.world, s.global_batch, s.micro_batches) == (2, 2, 3, 3, 12, 6, 1)
    assert (s.train_iters, s.decay_iters, s.warmup_iters) == (166, 166, 16)
    assert s.samples_of(3) == range(18, 24) and [s.step_of(k) for k in (17, 18, 23, 24)] == [2, 3, 3, 4]
    on = s.going_on(50, 700)                                    # 50 steps of 14 samples each, say
    assert on.train_iters == 100 and on.decay_iters == 166 and s.going_on(50, 2000).train_iters == 50
    by_steps = sizes(config.from_command_line(f"{TINY} --lr-decay-samples 40 --lr-warmup-samples 9 --global-batch-size 4".split()), 2)
    assert (by_steps.decay_iters, by_steps.warmup_iters, by_steps.shard) == (10, 2, 1) and by_steps.going_on(3, 99) == by_steps
    assert ranks_asked(c) == 4 and ranks_asked(config.from_command_line([*words.split(), "--dp", "3"])) == 12


def test_sizes_of_what_cannot_run_are_sizes_too() -> None:
    for words in ("--tp 0", "--pp -1", "--micro-batch-size 0", "--tp 8", "--global-batch-size -3"):
        c = config.from_command_line(f"{TINY} {words}".split())
        s = sizes(c, 2)
        assert s.dp >= 1 and s.global_batch >= 1 and ranks_asked(c) >= 1 and checks(c, 2)


def test_a_plan_is_that_of_its_sizes() -> None:
    """`Plan.of` is what is left of `resolve` when the checks were made before."""
    c = config.from_command_line(TINY.split())
    assert Plan.of(c, 1, 101) == resolve(c, 1, 101)


@pytest.mark.parametrize("name, dtype, peak, memory", [
    ("NVIDIA H100 80GB HBM3", "bf16", 989e12, 80), ("NVIDIA H100 PCIe", "bf16", 756e12, 80), ("NVIDIA H100 NVL", "fp32", 60e12, 94),
    ("NVIDIA H200", "fp16", 989e12, 141), ("NVIDIA H200 NVL", "bf16", 835e12, 141), ("NVIDIA H20", "bf16", 148e12, 96), ("NVIDIA H800", "bf16", 989e12, 80),
    ("NVIDIA B200", "bf16", 2250e12, 180), ("NVIDIA GB200", "bf16", 2500e12, 186), ("NVIDIA GH200 480GB", "bf16", 989e12, 96),
    ("NVIDIA L40S", "bf16", 362e12, 48), ("NVIDIA GeForce RTX 4090", "fp32", 82.6e12, 24), ("NVIDIA A100-SXM4-80GB", "bf16", 312e12, 80), ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12, 40), ("NVIDIA A100 80GB PCIe", "bf16", 312e12, 80),
])
def test_devices_are_found_by_the_name_that_cuda_tells(name: str, dtype: str, peak: float, memory: int) -> None:
    device = device_of(name)
    assert device is not None and (device.peaks[dtype], device.memory) == (peak, memory * 10**9)
    assert all(set(d.peaks) == {"bf16", "fp16", "fp32"} for d in DEVICES)


def test_parts_of_devices_and_those_that_are_only_called_alike_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Tesla T4"):
        assert device_of(name) is None, name
    monkeypatch.setattr(metrics, "seconds_of", lambda do, device: (do(), 1e-3)[1])
    monkeypatch.setitem(metrics.SIZES, "cpu", (2, 4, 8))
    assert metrics.measured_peak(torch.device("cpu"), torch.float32, 0.0) == 2 * 2**3 / 1e-3
    assert metrics.measured_peak(torch.device("cpu"), torch.float32, 0.05) == 2 * 8**3 / 1e-3 and metrics.SIZES["cuda"][-1] == 8192


def test_a_plan_is_pure_and_checks_report_everything_at_once() -> None:
    c = config.from_command_line(f"{TINY} --hidden-size 65 --micro-batch-size 3 --global-batch-size 4 --min-lr 1 --keep-last 2".split())
    found = checks(c, 1)
    assert len(found) == 3 and found == checks(c, 1) and remarks(c) == ["--keep-last 2: has no effect without --save."]
    assert all(s.startswith("--") and s.endswith(".") for s in found)
    good = config.from_command_line(TINY.split())
    assert resolve(good, 1, 101) == resolve(good, 1, 101) and key(1) == key(1)


def test_what_ranks_share_is_read_from_the_cuts_of_the_weights() -> None:
    """Key-value heads may have copies; heads and the MLP's channels not. Sizes that are missing or absurd are told and not multiplied."""
    def found(words: str, world: int) -> list[str]:
        return [s for s in checks(config.from_command_line(f"{TINY} {words}".split()), world) if s.startswith("--tp")]
    assert found("--tp 8", 8) == ["--tp 8: does not divide --num-attention-heads 4; write one of 1, 2, 4."]
    assert found("--tp 3 --ffn-hidden-size 7 --num-query-groups 2", 3) == [
        "--tp 3: does not divide --num-attention-heads 4; write one of 1, 2, 4.",
        "--tp 3: does not divide --ffn-hidden-size 7; write one of 1, 7.",
        "--tp 3: neither divides --num-query-groups 2 nor is a multiple of it; change one of them."]
    assert found("--tp 4 --num-query-groups 2", 4) == []
    absurd = "--tp 2 --ffn-hidden-size 7 --num-layers 0 --num-attention-heads 0 --position-embedding-type rope --rotary-percent"
    for percent in ("inf", "nan", "-1"):
        assert found(f"{absurd} {percent}", 2) == ["--tp 2: does not divide --ffn-hidden-size 7; write one of 1, 7."]


def test_the_plan_says_what_a_run_can_be_exported_as_or_what_is_in_the_way() -> None:
    """Before training, when it can still be chosen otherwise: for every shape there is."""
    def told(words: str) -> str:
        return next(line for line in describe(resolved(f"{TINY} {words}")).splitlines() if line.startswith("export"))[12:]
    none = f"to no Hugging Face family known here ({', '.join(FAMILIES)}): "
    expected = {"gpt2": "to Hugging Face as gpt2", "gpt2-plain": "to Hugging Face as gpt2", "llama": "to Hugging Face as llama",
                "llama-tied-scaled": f"{none}--rotary-percent 0.5, llama has --rotary-percent 1.0", "qwen": "to Hugging Face as qwen3", "mistral": "to Hugging Face as mistral", "relu2": f"{none}",
                "yarn-kinds": f"{none}", "dynamic": "to Hugging Face as gpt_neox", "gemma": f"{none}", "olmo": "to Hugging Face as olmo2", "neox": f"{none}", "opt": f"{none}"}
    for shape, words in SHAPES.items():
        assert told(words).startswith(expected[shape]), told(words)
    assert told("--num-query-groups 2") == f"{none}--num-query-groups 2, gpt2 has --num-query-groups 4"


def test_patterns_of_layers_are_megatrons() -> None:
    """N is a sliding window in N - 1 of N layers, and no rotation in one of N; lists may be sums and products."""
    def kinds(words: str, layers: int = 4) -> tuple[str, ...]:
        return resolved(f"{TINY} --num-layers {layers} --position-embedding-type rope {words}").architecture.kinds
    assert kinds("--attention-window 8") == kinds("--window-attn-skip-freq 2") == ()                     # all alike
    assert kinds("--attention-window 8 --window-attn-skip-freq 2") == ("local", "full") * 2
    assert kinds("--no-rope-freq 4") == ("local", "local", "local", "local-nope")
    assert kinds("--attention-window 8 --window-attn-skip-freq ([1]*2+[0])*2 --no-rope-freq 0,0,1,0,0,1", 6) == ("local", "local", "full-nope") * 2
    for text in ("0", "-1", "1,1,0", "[2,1,0,1]", "[[1],1,1,0]", "x", "[1]*9**9", "1+1", "(", "print(1)", "[1]*[1]", "'a'", "[1]*4*4"):
        found = checks(config.from_command_line([*TINY.split(), "--num-layers", "4", f"--no-rope-freq={text}"]), 1)
        assert found == [f"--no-rope-freq {text}: must be a number N, for the last of each N layers, or a list of 4 times 0 or 1, "
                         "such as [1]*3+[0]."], text
