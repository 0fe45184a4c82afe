"""To and from the Hugging Face format."""

from megazero.hf.convert import SHARD, export_folder, import_folder
from megazero.hf.files import INDEX, HfFolder, shards
from megazero.hf.tokenizer import outlook
