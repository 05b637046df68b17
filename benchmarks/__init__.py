"""What the library costs, measured side by side with its alternatives; see `README.md` beside this file."""
