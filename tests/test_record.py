"""What of a run outlives it: what an index may lack and what it may not hold, where weights are from, and that all of it is opened once."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import TINY, byte_dataset, drawn_architecture, lines, train

from megazero.base.errors import UserError
from megazero.data import splits
from megazero.data.indexed import IndexedDataset
from megazero.data.megatron_order import MegatronOrder
from megazero.plan.architecture import Architecture
from megazero.plan.progress import LossScale, Progress
from megazero.plan.rope import Llama3, Rotary
from megazero.plan.words import architecture, architecture_of, flags, impossible
from megazero.settings.command_line import build
from megazero.settings.config import Config
from megazero.state.checkpoint import INDEX, Reader, text_checksum
from megazero.state.compare import checkpoints
from megazero.state.record import resumed

RELEASED = Path(__file__).parent / "checkpoints" / "version-2"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the released checkpoint whose index was changed."""
    shutil.copytree(RELEASED, folder)
    path = next(folder.glob("step-*")) / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index | {"crc32": text_checksum(index)}))
    return folder


def test_an_index_without_some_fields_loads_as_before(tmp_path: Path) -> None:
    """As one does that was written before there were such fields."""
    def older(index: dict[str, Any]) -> None:
        for key in ("learned_positions", "epsilon", "qk_norm", "init_std", "attention_dropout", "hidden_dropout", "tied"):
            del index["architecture"][key]
        for key in ("fim_rate", "reduce_every", "hysteresis"):
            del index["config"][key]
        del index["architecture"]["rotary"]["scaling"], index["progress"]["skipped_in_a_row"], index["progress"]["loss_scale"]["good"]

    told = json.loads((RELEASED / "provenance.json").read_text())
    folder = rewritten(tmp_path / "older", older)
    assert architecture_of(Reader(folder).index["architecture"]) == architecture_of(Reader(RELEASED).index["architecture"])
    assert not [d for d in checkpoints(Reader(folder), Reader(RELEASED)) if d.where.startswith(("architecture", "progress"))]
    train(f"{told['words']} --load {folder}", tmp_path / "log")
    assert [line["loss"] for line in lines(tmp_path / "log")] == pytest.approx([loss for _, loss, _ in told["then"]], rel=1e-10, abs=0)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("experts", 8, "--load: the checkpoint's architecture has experts, which is not known here; load it with the version that wrote it."),
    ("rotary", {"base": 1e4, "channels": 8, "yarn": 2}, "--load: the checkpoint's rotary has yarn, which is not known here"),
    ("layers", None, "--load: the checkpoint's architecture has no layers"),
])
def test_a_field_of_a_later_version_is_one_sentence(key: str, value: Any, said: str, tmp_path: Path) -> None:
    def later(index: dict[str, Any]) -> None:
        index["architecture"] |= {key: value}
        if value is None:
            del index["architecture"][key]

    words = json.loads((RELEASED / "provenance.json").read_text())["words"]
    with pytest.raises(UserError) as caught:
        train(f"{words} --load {rewritten(tmp_path / 'later', later)}")
    (sentence,) = caught.value.sentences
    assert sentence.startswith(said)


def test_defaults_are_those_of_the_flags_and_unknown_flags_are_refused() -> None:
    sizes = {"layers": 1, "hidden": 8, "ffn": 32, "heads": 2, "kv_heads": 2, "head_dim": 4, "seq_length": 8, "vocab_size": 9}
    m = Config().model
    assert architecture_of(sizes) == Architecture(
        **sizes, epsilon=m.norm_epsilon, norm=m.normalization, activation="gelu", bias=not m.disable_bias_linear, qkv_bias=True, qk_norm="head" if m.qk_layernorm else "none",
        tied=not m.untie_embeddings_and_output_weights, init_std=m.init_method_std, attention_dropout=m.attention_dropout,
        hidden_dropout=m.hidden_dropout, pad_rows=m.make_vocab_size_divisible_by)
    assert architecture_of({**sizes, "qk_norm": True, "bias": False, "norm": "RMSNorm"}) == Architecture(
        **sizes, qk_norm="head", bias=False, o_bias=False, norm_bias=False, norm="RMSNorm")
    assert architecture_of({**sizes, "rotary": {"base": 5.0, "channels": 4, "scaling": [8.0, 1.0, 4.0, 16]}}).rotary == Rotary(5.0, 4, Llama3(8.0, 1.0, 4.0, 16))
    assert build(Config, {"num_layers": 3}).model.num_layers == 3
    with pytest.raises(UserError, match="--no-such, --nor-this: is not known here"):
        build(Config, {"num_layers": 3, "no_such": 1, "nor_this": 2})


def test_a_run_remembers_the_family_its_weights_came_from(tmp_path: Path) -> None:
    words = json.loads((RELEASED / "provenance.json").read_text())["words"]
    train(f"{words} --load {RELEASED} --exit-interval 7 --save {tmp_path / 'a'}")
    assert Reader(tmp_path / "a").index["family"] is None, "it was never anybody else's"
    folder = rewritten(tmp_path / "theirs", lambda index: index.update(family="llama"))
    train(f"{words} --load {folder} --finetune --exit-interval 1 --save {tmp_path / 'b'}")
    train(f"{words} --load {tmp_path / 'b'} --exit-interval 2 --save {tmp_path / 'b'}")
    assert Reader(tmp_path / "b").index["step"] == 2 and Reader(tmp_path / "b").index["family"] == "llama"


def test_a_loss_scale_goes_on_by_the_rule_of_now() -> None:
    then = LossScale(8.0, 1.0, 1000, 3, constant=False, good=5, bad=2)
    saved = Progress(then, 9, 7, 18, 1)
    now = LossScale(64.0, 16.0, 10, 2, constant=False)
    assert resumed(saved, now) == Progress(LossScale(16.0, 16.0, 10, 2, False, good=5, bad=1), 9, 7, 18, 1)
    still = LossScale(4.0, 1.0, 10, 2, constant=True)
    assert resumed(saved, still).loss_scale == still


def test_everything_is_opened_and_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        plain = getattr(owner, name)

        def call(*a: Any, **k: Any) -> Any:
            seen[what] += 1
            return plain(*a, **k)
        monkeypatch.setattr(owner, name, call)

    plan, program = import_module("megazero.plan.plan"), import_module("megazero.run.train")
    for owner, name, what in ((Reader, "__init__", "checkpoints"), (splits, "open_stages", "splits"), (MegatronOrder, "__init__", "orders"),
                              (IndexedDataset, "__init__", "datasets"), (program, "checks", "checks"), (plan, "checks", "checks"),
                              (program, "configured_tokenizer", "tokenizers")):
        counted(owner, name, what)
    words = (f"{TINY} --vocab-size 257 --data-path {byte_dataset(tmp_path)} --split 80,20,0 --sample-order megatron --eval-interval 2 --eval-iters 1 "
             f"--save {tmp_path / 'ck'} --load {tmp_path / 'ck'}").replace(" --mock-data", "").replace("--vocab-size 101 ", "").replace(" --eval-iters 0", "")
    train(f"{words} --exit-interval 3")
    assert seen == {"splits": 2, "orders": 2, "datasets": 2, "checks": 1, "tokenizers": 1}, "training and validation, and no checkpoint yet"
    seen.clear()
    train(words)
    assert seen == {"checkpoints": 1, "splits": 2, "orders": 2, "datasets": 2, "checks": 1, "tokenizers": 1}
    assert Reader(tmp_path / "ck").index["step"] == 5


def test_flags_are_the_architecture_turned_round_and_an_index_holds_all_of_it() -> None:
    rng = Random(13)
    for _ in range(500):
        a = drawn_architecture(rng)
        assert architecture(build(Config, flags(a)), a.vocab_size) == a and not list(impossible(a))
        assert architecture_of(json.loads(json.dumps(asdict(a)))) == a
