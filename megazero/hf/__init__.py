"""To and from the Hugging Face format."""

from megazero.hf.convert import CONFIG, SHARD, export_folder, import_folder
from megazero.hf.files import INDEX, HfFolder, read_json, shards
from megazero.hf.tokenizer import import_tokenizer, outlook
