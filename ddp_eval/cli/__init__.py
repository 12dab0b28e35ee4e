"""Command line in, exit code out: flags, values, and one module per subcommand."""
