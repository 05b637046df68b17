"""The session managers of agents, and the factory that creates them."""
