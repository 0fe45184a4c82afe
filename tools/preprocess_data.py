"""Text to a tokenized dataset; see --help and megazero/data/preprocess.py."""

from megazero.command_line import parse, run
from megazero.data.preprocess import PreprocessSettings, preprocess


def main() -> None:
    for report in preprocess(parse(PreprocessSettings, prog="preprocess_data.py")):
        print(report)


if __name__ == "__main__":
    run(main)
