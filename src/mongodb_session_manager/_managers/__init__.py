"""The session managers that agents are given, and the factory that makes them."""
