"""How MongoDB is reached: the event loop, the connection, the driver's errors, commands and indexes."""
