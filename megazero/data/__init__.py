"""From text to samples."""

from megazero.data.dataset import Part, Samples, SampleSource, open_split
from megazero.data.edit import document_lengths, merge, split
from megazero.data.files import library
from megazero.data.fim import FillInTheMiddle
from megazero.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megazero.data.preprocess import PreprocessSettings, preprocess
from megazero.data.sidecar import check_sidecar, read_sidecar
from megazero.data.sources import Place, Unreadable, documents, find_sources, read_chunks
from megazero.data.splits import configured_tokenizer, samples
from megazero.data.tokenizer_base import END_OF_TEXT, Tokenizer
from megazero.data.tokenizers import build_tokenizer, characters_of, load_tokenizer, same_tokenizer
from megazero.data.verify import problems

__all__ = [
    "END_OF_TEXT", "FillInTheMiddle", "IndexedDataset", "IndexedWriter", "Part", "Place", "PreprocessSettings",
    "SampleSource", "Samples", "Tokenizer", "Unreadable", "best_dtype", "build_tokenizer", "characters_of",
    "check_sidecar", "configured_tokenizer", "document_lengths", "documents", "find_sources", "library",
    "load_tokenizer", "merge", "open_split", "preprocess", "problems", "read_chunks", "read_sidecar",
    "same_tokenizer", "samples", "split",
]
