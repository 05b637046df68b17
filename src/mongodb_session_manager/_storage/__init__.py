"""Strands' `Storage` in MongoDB."""
