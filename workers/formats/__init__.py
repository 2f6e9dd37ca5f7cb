"""One file a weight format."""
