"""One verb a file: what the flows are made of. What the verbs are made of lies in folders, one a subject."""
