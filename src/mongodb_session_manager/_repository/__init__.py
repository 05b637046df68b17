"""The two public repositories, asynchronous and synchronous."""
