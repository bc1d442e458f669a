"""Compiled programs read as text: what they send, and what they compute meanwhile."""
