"""Text to a tokenized dataset; see --help and megazero/corpus/preprocess.py."""

from megazero.base import UserError
from megazero.corpus import PreprocessSettings, preprocess
from megazero.settings import parse, run


def main() -> None:
    settings = parse(PreprocessSettings, prog="preprocess_data.py")
    try:
        for report in preprocess(settings):
            print(report)
    except OSError as error:
        raise UserError(f"--output-prefix {settings.output_prefix}: cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    run(main)
