"""The command `svit`: one module a command, whose `main` takes its arguments and returns the exit status."""
