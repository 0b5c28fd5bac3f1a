"""The pipeline: Prefect flows and the command line."""
