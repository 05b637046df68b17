"""Notifications that are delivered in the background."""
