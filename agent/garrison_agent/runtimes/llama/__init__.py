"""The llama.cpp engine of a worker: sequences in one batch, sampling, prefixes, log-probabilities."""
