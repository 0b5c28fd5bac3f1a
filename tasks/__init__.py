"""One verb a file: what the flows are made of."""
