"""What figures rest on: the node, an engine's footprint and its profile, and intervals by bootstrap."""
