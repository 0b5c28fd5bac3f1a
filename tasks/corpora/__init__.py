"""Where a corpus's texts come from: the `docs:` corpus, and files that people bring."""
