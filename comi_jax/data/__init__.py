"""Records in, batches out: everything between a data file and the model."""
