"""From text to samples."""

from megazero.data.dataset import DatasetPart, Samples, SampleSource, open_split
from megazero.data.edit import document_lengths, merge_datasets, split_dataset
from megazero.data.files import library
from megazero.data.fim import FillInTheMiddle
from megazero.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megazero.data.preprocess import PreprocessSettings, preprocess
from megazero.data.sidecar import check_sidecar, read_sidecar
from megazero.data.sources import Place, Unreadable, documents, find_sources, read_chunks
from megazero.data.splits import configured_tokenizer, evaluated, samples
from megazero.data.tokenizer_base import END_OF_TEXT, IDENTITY, Tokenizer, is_text
from megazero.data.tokenizers import (
    build_tokenizer, characters_of, kept_files, load_tokenizer, same_tokenizer, tokenizer_in)
from megazero.data.verify import problems
