"""Access to MongoDB: the event loop, the connection, the driver's errors, commands and indexes."""
