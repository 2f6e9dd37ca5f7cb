"""One file an endpoint family: schema, then handler."""
