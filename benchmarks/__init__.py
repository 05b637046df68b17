"""Benchmarks of the library and its alternatives; see `README.md` in this directory."""
