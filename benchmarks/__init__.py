"""Measurements: each bench appends rows to results/ and prints them as one JSON document on its last line."""
