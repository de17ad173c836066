"""Training: corpus, vocabulary, data, loss, step and the run of them all. It fetches no data."""
