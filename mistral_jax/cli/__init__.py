"""The command lines: options, the terminal, errors and exit codes."""
