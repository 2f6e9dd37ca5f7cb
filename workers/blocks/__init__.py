"""What a model spec is made of."""
