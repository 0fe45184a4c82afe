"""From datasets to samples; tokenizers."""

from megazero.data.dataset import DatasetPart, Samples, SampleSource, open_split
from megazero.data.files import (
    STDIN, Damage, Opened, bytes_of, expand, is_damage, is_packed, library, line_of, size_of, stamp_of, suffix_of)
from megazero.data.fim import FillInTheMiddle
from megazero.data.indexed import BLOCK, COUNT, CRC, SUMMED, IndexedDataset, IndexedWriter, Written, alone, best_dtype
from megazero.data.order import split_ranges
from megazero.data.sidecar import MANY, check_sidecar, miscounts, read_sidecar, sums
from megazero.data.splits import configured_tokenizer, evaluated, samples
from megazero.data.tokenizer_base import END_OF_TEXT, IDENTITY, Tokenizer, is_text, told
from megazero.data.tokenizers import (
    TYPES, build_tokenizer, characters_of, kept_files, load_tokenizer, named_by, same_tokenizer, tokenizer_in)
