"""To and from the Hugging Face format."""

from megazero.hf.convert import export_folder, import_folder
from megazero.hf.tokenizer import outlook
