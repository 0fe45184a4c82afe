"""A training run of our own decoder."""

from megazero.run.executor import Turn
from megazero.run.feed import Feed, open_splits
from megazero.run.generate import build_from_checkpoint, generate, stream_text, tokenizer_of
from megazero.run.launch import launch
from megazero.run.metrics import memory_bytes, seconds_of
from megazero.run.run import Run
from megazero.run.step import Step
