"""One small file a family: spec and name map."""
