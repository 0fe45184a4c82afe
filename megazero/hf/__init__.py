"""To and from the Hugging Face format."""

from megazero.hf.convert import export_folder, import_folder

__all__ = [
    "export_folder", "import_folder",
]
