"""Model folders: fetched, checked, counted and loaded, and the one architecture of our own."""
