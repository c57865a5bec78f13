"""Records in, batches out: everything between a file of examples and the model."""
