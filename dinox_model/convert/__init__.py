"""Weights of others read and written: key maps, reports, refusals. A file for each format."""
