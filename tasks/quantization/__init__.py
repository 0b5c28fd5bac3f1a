"""Quantisation for each runtime: calibration, outliers, rounding, sensitivity, and the builds made of them."""
