"""Frontend processes: HTTP, tokenization, detokenization. Never imports torch."""
