"""Draws the loss curve of a run, on the screen and as a PNG: python tools/plot_loss.py --log-dir DIR [--output FILE]"""

from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, said
from megazero.settings import option, parse, run
from megazero.state import log_lines


@dataclass(frozen=True)
class Settings:
    """Draws the losses that a run wrote to LOG_DIR/metrics.jsonl."""

    log_dir: str = option(help="the run's --log-dir", unit="dir")
    output: str | None = option(None, "PNG to write; needs matplotlib", unit="file")
    width: int = option(72, "columns on the screen")
    height: int = option(12, "rows on the screen")


Curve = list[tuple[int, float]]         # (step, loss)
MOST = 1e100                            # of a loss: means and differences of smaller ones are finite


def main() -> None:
    settings = parse(Settings, prog="plot_loss.py")
    for flag, size in (("--width", settings.width), ("--height", settings.height)):
        if size < 2:
            raise UserError(f"{flag} {size}: must be at least 2.")
    train, valid, left = read(Path(settings.log_dir) / "metrics.jsonl")
    print(drawn(train, settings.width, settings.height))
    if left:
        print(f"losses left out, no finite numbers or beyond {MOST:g}: {left}")
    print("  ".join(f"valid {loss:.3f} at step {step:,}" for step, loss in valid[-3:]))
    if settings.output:
        paint(train, valid, Path(settings.output))


def read(path: Path) -> tuple[Curve, Curve, int]:
    """Training and validation losses that can be drawn, and how many cannot: NaN, infinity, beyond MOST. Raises
    UserError."""
    curves: dict[str, Curve] = {"train": [], "valid": []}
    left = 0
    for (step, split), r in log_lines(path).items():
        if split not in curves or "loss" not in r or r.get("skipped"):
            continue
        loss = r["loss"]
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise UserError(f"{path}: the loss of step {step} ({split}) is {said(loss)}, not a number; repair or "
                            "remove that line.")
        if abs(loss) < MOST:
            curves[split].append((step, loss))
        else:
            left += 1
    if not curves["train"]:
        raise UserError(f"{path}: holds no training step" + (" with a finite loss." if left else "."))
    return curves["train"], curves["valid"], left


def drawn(curve: Curve, width: int, height: int) -> str:
    """The curve in characters: the mean loss of each column's steps."""
    columns = [curve[i * len(curve) // width:(i + 1) * len(curve) // width] for i in range(width)]
    means = [sum(loss for _, loss in part) / len(part) for part in columns if part]
    low, high = min(means), max(means)
    rows = [round((high - m) / (high - low or 1) * (height - 1)) for m in means]
    lines = [f"{high - (high - low) * r / max(height - 1, 1):7.3f} |"
             + "".join("o" if r == row else " " for row in rows).rstrip() for r in range(height)]
    return "\n".join([*lines, "        +" + "-" * len(means), f"         step {curve[0][0]:,} to {curve[-1][0]:,}"])


def paint(train: Curve, valid: Curve, path: Path) -> None:
    """The same as a PNG."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError(f"--output {path}: needs matplotlib; pip install 'megazero[plot]', "
                        "or leave --output out.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), lw=0.8, alpha=0.7, label="train")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", ms=4, label="valid")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path}: cannot be written ({error}); "
                        "name a .png in a folder that is there.") from None


if __name__ == "__main__":
    run(main)
