"""Other people's formats: Hugging Face folders and the release's checkpoints, in and out."""
