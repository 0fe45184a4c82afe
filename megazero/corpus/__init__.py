"""From text to datasets."""

from megazero.corpus.edit import document_lengths, merge_datasets, split_dataset
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.sources import Place, Unreadable, documents, find_sources, read_chunks
from megazero.corpus.verify import problems
