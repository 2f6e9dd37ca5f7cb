"""Key-value cache: which block holds which tokens of whom. Ids only; the bytes are the workers'."""
