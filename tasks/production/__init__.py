"""A published bundle's way into production and back: judged, delivered, proved, and told of."""
