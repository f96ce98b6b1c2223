"""Subcommands of `lowssl` that work on a server's data."""
