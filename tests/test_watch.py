"""What a run logs of its weights when asked, against plain sums, and in any layout."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool
from support import SHAPES, TINY, built, lines, named, stepping, train

WATCH = "--log-params-norm --log-num-zeros-in-grad --log-update-ratio"
WORDS = f"{TINY} {SHAPES['llama']} --dtype fp64 --global-batch-size 4 {WATCH}"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


def test_it_is_what_plain_sums_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = built(WORDS)
    step, before = stepping(run), {n: w.clone() for n, w in named(run).items()}
    step.start()
    zeros = sum(int((g == 0).sum()) for g in named(run, "grad_slice").values())
    settled = step.settle(last=True)
    assert settled is not None
    seen, after = settled.figures, named(run)
    assert seen["num_zeros"] == zeros > 0 and seen["params_norm"] == pytest.approx(sum(float(w.square().sum()) for w in after.values()) ** 0.5, rel=1e-12)
    for layer in ("embedding", "layers.0", "layers.1", "head"):
        own = [n for n in after if n.startswith(f"{layer}.")]
        moved, size = (sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in ([after[n] - before[n] for n in own], [after[n] for n in own]))
        assert seen[f"update_ratio/{layer}"] == pytest.approx(moved / size, rel=1e-12)
    records = train(f"{WORDS} --log-interval 1", tmp_path)
    assert [r["params_norm"] for r in records][0] == seen["params_norm"] and "| params norm" in capsys.readouterr().out
    assert not any("norm" in key and key != "grad_norm" or "zeros" in key for key in train(f"{TINY}", tmp_path / "plain")[0])


@pytest.mark.parametrize("layout, ranks", [("--tp 2 --dp 2 --zero-stage 3", 4), ("--pp 2 --dp 2 --zero-stage 1", 4), ("--dp 3 --zero-stage 2 --global-batch-size 6", 3)])
def test_any_layout_logs_the_same(layout: str, ranks: int, pool: Pool, tmp_path: Path) -> None:
    batch = "--global-batch-size 6" if "6" in layout else ""
    want = train(f"{WORDS} {batch}", tmp_path / "one")
    pool.run(ranks, train, f"{WORDS} {layout}", tmp_path / "many")
    for got, wanted in zip(lines(tmp_path / "many"), want, strict=True):
        keys = [key for key in wanted if key in ("params_norm", "num_zeros") or key.startswith("update_ratio")]
        assert len(keys) == 6 and all(got[key] == pytest.approx(wanted[key], rel=1e-10) for key in keys)
