"""What a run leaves for its readers: plots, and the record it can be made again from."""
