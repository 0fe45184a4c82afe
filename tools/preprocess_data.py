"""Text to a tokenized dataset; see --help and megazero/corpus/preprocess.py."""

import sys

from megazero.base import UserError, say
from megazero.corpus import PreprocessSettings, preprocess
from megazero.settings import of_preprocessing, parse, run

ELSEWHERE = {"split-sentences": "is not here: documents are not cut into sentences here; leave it out"}


def main() -> None:
    argv, idle = of_preprocessing(sys.argv[1:])
    settings = parse(PreprocessSettings, argv, prog="preprocess_data.py", elsewhere=ELSEWHERE.get)
    if idle:
        say(f"no effect   nothing to configure here: {' '.join(idle)}")
    try:
        for report in preprocess(settings):
            print(report)
    except OSError as error:
        raise UserError(f"--output-prefix {settings.output_prefix}: cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    run(main)
