"""The engine core: one process that plans every step. Never imports torch."""
