"""Block pool, prefix cache, and groups by state spec."""
