"""The data of training: records, examples, packed rows, and batches."""
