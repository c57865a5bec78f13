"""External formats, import and export: Hugging Face folders and the official release's checkpoints."""
