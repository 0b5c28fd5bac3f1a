"""The worker's HTTP faces: one request core, several dialects."""
