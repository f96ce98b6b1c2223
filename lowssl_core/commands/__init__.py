"""The subcommands of `lowssl`, one module each."""
